"""Imports of PyTorch without garbage collection.

They make a million objects that stay, and the collector looks through all of them again and again, and at the end of
the process once more: a third of the time from `import torch` to the end.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """A context for imports. What there is at its end is not looked through any more; what is made later is.

    It has no effect if PyTorch is imported already.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_freeze)


def _freeze() -> None:
    """Let the collector look through nothing at the end; but what it leaves of Triton's, Triton reports as leaked."""
    if "triton" not in sys.modules:
        gc.freeze()
