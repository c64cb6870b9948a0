"""What changes a network's result: one file for each method, applied in one order by `patching.patched`."""
