"""Kernels of our own, compiled at first use: in C++, kept in the user's folder for caches, and in Triton."""
