"""`python -m ldm` is the command `ldm`."""

from ldm.cli.main import command

if __name__ == "__main__":
    command()
