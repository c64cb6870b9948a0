"""`python -m ldm` is the command `ldm`."""

from ldm.cli.main import main

main()
