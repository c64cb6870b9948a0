"""Freed memory is kept: the same block again, without new pages from the system; not for tensors of another shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import Program
from torch import nn

from ldm.models.layers import ResnetBlock, Upsample
from ldm.runtime import fused_cpu
from ldm.runtime.kernels import memory

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


OF_THREADS = """
import sys, threading
from pathlib import Path
from ldm.runtime.kernels.memory import give_back, keep_freed
from ldm.server.engine import loaded

def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

def work():
    all_there.wait()
    with one_at_a_time:
        bytes([1]) * 2**25
    all_there.wait()

loaded({"source": sys.argv[1], "device": "cpu"})
arranged = keep_freed()
give_back()
before = megabytes()
all_there, one_at_a_time = threading.Barrier(12), threading.Lock()
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back()
print(arranged, int(megabytes() - before))
"""


def run(script: Path, how: str, **environment: str) -> tuple[str, int]:
    """What it said: whether memory is kept, and the fewest pages of a round of tensors."""
    script.write_text(SCRIPT)
    program = Program(script, how, **environment)
    out, err = program.communicate()
    assert program.returncode == 0, err
    arranged, pages = out.split()
    return arranged, int(pages)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that does not configure the allocator."""
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)


@pytest.mark.skipif(sys.platform != "linux", reason="it is for GNU's C library")
def test_freed_memory_is_kept(tmp_path: Path, plain: None) -> None:
    script = tmp_path / "script.py"
    arranged, pages = run(script, "keep")
    assert arranged == "True" and pages < 10_000
    assert run(script, "return")[1] > 100_000
    assert run(script, "keep", MALLOC_ARENA_MAX="2")[0] == "False"  # whoever says so has reasons


@pytest.mark.skipif(sys.platform != "linux", reason="it is for GNU's C library")
def test_a_server_gives_back_what_its_threads_took(plain: None, models: Path) -> None:
    """From the heap of all threads; one that a thread has alone stays as large as what it once took."""
    command = [sys.executable, "-c", OF_THREADS, models / "sd15"]  # not forked from a process that had threads
    arranged, megabytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert arranged == "True" and int(megabytes) < 20


def test_memory_is_given_back_when_large_tensors_get_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[None] = []
    model = nn.Sequential(ResnetBlock(32, 32, 8, 1e-6), ResnetBlock(32, 64, 8, 1e-6))
    up = Upsample(32)
    for network in (model, up):
        fused_cpu.fuse(network)
    monkeypatch.setattr(memory, "LARGE", 2**20)
    monkeypatch.setattr(memory, "give_back", lambda: called.append(None))
    with torch.inference_mode():
        model(torch.randn(1, 32, 16, 16))  # small
        assert not called
        model[0](torch.randn(1, 32, 128, 128))  # of the same shape
        assert not called
        model[1](torch.randn(1, 32, 128, 128))
        assert len(called) == 1
        up(torch.randn(1, 32, 64, 64), torch.Size((128, 128)))
        assert len(called) == 2
