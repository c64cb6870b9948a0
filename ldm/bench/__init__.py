"""The measurements of the command `ldm bench`."""
