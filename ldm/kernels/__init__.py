"""Kernels of our own, in C++: compiled for this machine at first use, kept in the user's folder for caches."""
