"""How threads wait: what decides, the switch of GNU's runtime, and when it is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import reduce
from types import SimpleNamespace

import pytest
import tiny
from launched import PATIENCE, ROOT

from ldm.runtime import waiting
from ldm.runtime.waiting import Load, Policy, Reading, decide, own_policy, threads_in_words, times
from pipelines import Pipeline

linux = pytest.mark.skipif(sys.platform != "linux", reason="the switch is of GNU's runtime on Linux")
STARVED, QUIET, BETWEEN, IDLE, OWN = (
    Load(0.1, *times, 2) for times in ((0.1, 0.1), (0.2, 0.0), (0.17, 0.015), (0.001, 0.0), (0.195, 0.3))
)


@pytest.mark.parametrize(
    ("readings", "short"),
    [
        ([], False),
        ([STARVED], False),  # a moment
        ([STARVED] * 2, True),
        ([STARVED, QUIET, STARVED], False),
        ([STARVED, IDLE, STARVED], True),  # an idle process learns nothing
        ([STARVED] * 2 + [QUIET] * 9, True),
        ([STARVED] * 2 + [QUIET] * 10, False),
        ([STARVED] * 2 + [QUIET] * 9 + [BETWEEN] + [QUIET] * 9, True),
        ([STARVED] * 2 + [IDLE] * 99, True),
        ([STARVED] * 2 + [QUIET] * 10 + [STARVED] * 2, True),
        ([BETWEEN] * 99, False),
        ([OWN] * 99, False),  # threads of the process wait for each other
        ([STARVED] * 2 + [OWN] * 10, False),
    ],
)
def test_the_decision(readings: list[Load], short: bool) -> None:
    assert reduce(decide, readings, Policy()).short == short


@linux
def test_readings() -> None:
    """A thread that computes has run; one that has ended has zeros."""
    before = Reading()
    while Reading().since(before).ran == 0:
        sum(range(10_000))
    load = Reading().since(before)
    assert load.elapsed > 0 < load.ran
    assert load.waited >= 0
    assert times("0") == (0, 0)


PROGRAM = """
import os, sys, threading, time
import numpy as np, torch
from ldm.runtime import waiting
from pipelines import Pipeline

def threads():
    return set(os.listdir("/proc/self/task"))

def image():
    return np.asarray(pipeline("a smiling cat", steps=2, seed=0).images[0])

pipeline = Pipeline("emoji")
assert not waiting.RUNNING  # nothing before the first call
long, (watcher,) = image(), waiting.RUNNING.values()
watcher.ended.set()  # the test decides
watcher.thread.join()
before, count = threads(), torch.get_num_threads()
watcher.follow(waiting.Policy(short=True))
while len(new := threads() - before) < watcher.team:  # the one that holds the others, and the others
    time.sleep(0.01)
assert (image() == long).all()
assert torch.get_num_threads() == count == 2
if (child := os.fork()) == 0:
    os._exit(len(waiting.RUNNING.keys() & {os.getpid()}))
assert os.waitpid(child, 0)[1] == 0  # the child has no watcher
watcher.follow(waiting.Policy())
while threads() & new:
    time.sleep(0.01)
assert (image() == long).all()
waiting.stop()
image()  # a new watcher, with which the process ends
assert waiting.RUNNING
print("waiting by the machine's load" in waiting.threads_in_words(2))
"""


@linux
def test_the_switch() -> None:
    """Short waits and long ones: the same number of threads and the same image; a forked process, and the end."""
    environment = {name: value for name, value in os.environ.items() if name not in (waiting.POLICY, *waiting.SPINS)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without a policy, in which no program is watched afterwards."""
    for name in (waiting.POLICY, *waiting.SPINS):
        monkeypatch.delenv(name, raising=False)
    yield
    waiting.stop()


@linux
@pytest.mark.usefixtures("free")
def test_a_watcher_ends() -> None:
    waiting.watch("cpu", 2)
    (watcher,) = waiting.RUNNING.values()
    waiting.watch("cpu", 2)
    assert [thread.name for thread in threading.enumerate()].count("ldm watcher") == 1
    watcher.follow(Policy(short=True))
    waiting.stop()
    assert not waiting.RUNNING and watcher.waits is None
    assert not {"ldm watcher", "ldm short waits"} & {thread.name for thread in threading.enumerate()}


@linux
@pytest.mark.usefixtures("free")
def test_a_watcher_that_can_read_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and waits are as they were."""
    waiting.watch("cpu", 2)
    (watcher,) = waiting.RUNNING.values()
    watcher.follow(Policy(short=True))
    monkeypatch.setattr(waiting, "TASKS", "/nothing")
    watcher.thread.join(PATIENCE)
    assert not watcher.thread.is_alive() and watcher.waits is None


@linux
@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    "case", ["GPU", "policy", "spins", "one thread", "few threads left", "preloaded", "no libgomp"]
)
def test_what_is_left_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "spinning_runtime", waiting.spinning_runtime.__wrapped__)
    if case in ("policy", "spins"):
        monkeypatch.setenv(*{"policy": ("OMP_WAIT_POLICY", "active"), "spins": ("GOMP_SPINCOUNT", "7")}[case])
    if case == "few threads left":
        monkeypatch.setattr(waiting, "free_threads", lambda: os.cpu_count())
    if case == "preloaded":
        monkeypatch.setenv("LD_PRELOAD", "/opt/intel/lib/libiomp5.so")
    if case == "no libgomp":
        monkeypatch.setattr(
            waiting, "MAPS", SimpleNamespace(read_text=lambda encoding: "0-1 r-xp 0 0:0 1 /libomp.so\n")
        )
    waiting.watch("cuda" if case == "GPU" else "cpu", 1 if case == "one thread" else 2)
    assert not waiting.RUNNING


def test_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "cores", lambda: 8)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert own_policy({}) == []
    assert threads_in_words(4) == "4 threads (OMP_WAIT_POLICY=passive) on 8 cores"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(waiting, "spinning_runtime", lambda: None)
    assert threads_in_words(1) == "1 thread (OpenMP's own waits) on 8 cores"


def test_a_call_of_a_pipeline_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("pipelines.run.watch", lambda device, threads: seen.append(device))
    pipeline = Pipeline(tiny.model("sd15"))
    assert not seen
    pipeline("a fox", steps=1)
    assert seen == ["cpu"]
