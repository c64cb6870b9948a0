"""Memory of this process, by calls of the system: freed tensors' is kept, unchanged pages of files are given back.

GNU's C library asks the system for every block of more than 32 MB, and returns it as soon as it is free. The system
hands it out page by page, filled with zeros, when it is first touched: a quarter of the time of decoding an image.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# names of `mallopt` in malloc.h: how much is kept at the end of the heap, blocks outside it, and heaps of threads
TRIM, MMAP_MAX, ARENA_MAX = -1, -4, -8
LARGE = 2**25  # bytes of a tensor, beside which it pays to give memory back
PAGES = Path("/proc/self/pagemap")  # of Linux: 8 bytes for each page, with these bits
PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
DONT_NEED = 4  # name of `madvise` on Linux


def keep_freed() -> bool:
    """Keep freed memory in this process, and return whether that succeeded.

    It fails with other C libraries than GNU's, and is not tried where the environment configures the allocator.
    """
    return _set(TRIM, -1) and _set(MMAP_MAX, 0) and share_heap()  # -1: all of them


def share_heap() -> bool:
    """Let all threads take memory from one heap, and return whether that succeeded, as `keep_freed`.

    To be called before there are threads that took memory: their heaps stay. Else each of up to 8 for each core has one
    of its own, the end of which is never given back: it stays as large as what was once freed there.
    """
    return _set(ARENA_MAX, 1)


def give_back() -> None:
    """Give the pages of freed memory back to the system, with GNU's C library and despite `keep_freed`."""
    trim = _c_library("malloc_trim")
    if trim:
        trim(0)


def give_back_beside(x: Tensor) -> Tensor:
    """Return `x`, the first tensor of a new shape, after giving freed memory back to the system if `x` is large.

    What tensors of another shape have left does not hold those of this one, and would lie idle beside them.
    """
    if x.nbytes >= LARGE:
        give_back()
    return x


def drop_pages(tensor: Tensor) -> bool:
    """Give back the pages of a tensor that is mapped from a file; the system reads them again when they are used.

    Only on Linux, and only if all of its whole pages are as in the file: pages that were written to since, and other
    memory, would be lost. Returns whether it was done.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    if count <= 0 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return False
    try:
        with PAGES.open("rb", buffering=0) as file:
            file.seek(8 * first)
            pages = np.frombuffer(file.read(8 * count), dtype=np.uint64)
    except OSError:  # another system
        return False
    madvise = _c_library("madvise")
    own = (pages & SWAPPED != 0) | ((pages & PRESENT != 0) & (pages & OF_FILE == 0))
    if len(pages) < count or own.any() or not madvise:
        return False
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise(first * mmap.PAGESIZE, count * mmap.PAGESIZE, DONT_NEED) == 0


def _set(name: int, value: int) -> bool:
    """Set an option of GNU's allocator, where the environment sets none."""
    mallopt = _c_library("mallopt")
    configured = any(key.startswith("MALLOC_") or key == "GLIBC_TUNABLES" for key in os.environ)
    return bool(mallopt) and not configured and mallopt(name, value) == 1


def _c_library(name: str) -> Any:
    """A function of the C library, or None if it has no such function, as on Windows."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):
        return None
