"""Patches, which change a network's result: one file for each, applied in one order by `patching.patched`."""
