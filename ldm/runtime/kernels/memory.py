"""Keeping the memory of freed tensors in the process, for the next ones.

GNU's C library asks the system for every block of more than 32 MB, and returns it as soon as it is free. The system
hands it out page by page, filled with zeros, when it is first touched: a quarter of the time of decoding an image.
"""

from __future__ import annotations

import ctypes
import os

TRIM, MMAP_MAX = -1, -4  # names of `mallopt` in malloc.h: how much is kept at the end of the heap, blocks outside it


def keep_freed() -> bool:
    """Keep freed memory in this process, and return whether that succeeded.

    It fails with other C libraries than GNU's, and is not tried where the environment configures the allocator.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library, or Windows
        return False
    return mallopt(TRIM, -1) == mallopt(MMAP_MAX, 0) == 1  # -1: all of them
