"""The command line `ldm`: one module declares the commands, one for each of them does the work."""
