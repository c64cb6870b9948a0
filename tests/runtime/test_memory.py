"""Freed memory is kept: the same block again, without new pages from the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, resource, sys
import torch
from ldm.runtime.kernels.memory import keep_freed
arranged = keep_freed() if sys.argv[1] == "keep" else None
block = torch.ones(2**24)  # 64 MB
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for number in range(8):
        block = block + number
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(arranged, pages)
"""


def run(how: str, **environment: str) -> tuple[str, int]:
    """What it said, and how many pages the system gave for the last eight tensors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    arguments = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(arguments, env=kept | environment, capture_output=True, text=True, check=True)
    arranged, pages = done.stdout.split()
    return arranged, int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="it is for GNU's C library")
def test_freed_memory_is_kept() -> None:
    arranged, pages = run("keep")
    assert arranged == "True" and pages < 10_000
    assert run("return")[1] > 100_000
    assert run("keep", MALLOC_ARENA_MAX="2")[0] == "False"  # whoever says so has reasons
