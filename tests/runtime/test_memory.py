"""Freed memory is kept: the same block again, without new pages from the system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from launched import Program

SCRIPT = """
import os, resource, sys
import torch
from ldm.runtime.kernels.memory import keep_freed
arranged = keep_freed() if sys.argv[1] == "keep" else None
block = torch.ones(2**24)  # 64 MB
pages = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for number in range(8):
        block = block + number
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(arranged, min(pages))
"""


def run(script: Path, how: str, **environment: str) -> tuple[str, int]:
    """What it said, and the fewest pages that a round of eight tensors got from the system."""
    script.write_text(SCRIPT)
    program = Program(script, how, **environment)
    out, err = program.communicate()
    assert program.returncode == 0, err
    arranged, pages = out.split()
    return arranged, int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="it is for GNU's C library")
def test_freed_memory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    script = tmp_path / "script.py"
    arranged, pages = run(script, "keep")
    assert arranged == "True" and pages < 10_000
    assert run(script, "return")[1] > 100_000
    assert run(script, "keep", MALLOC_ARENA_MAX="2")[0] == "False"  # whoever says so has reasons
