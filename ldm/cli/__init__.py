"""The command line `ldm`: main.py declares the commands, and a module for each does the work."""
