"""How OpenMP's threads wait for each other on the CPU: spinning on a quiet machine, asleep beside busy processes.

A thread that spins sees the end of a wait at once; a thread that sleeps must be woken, which a small model's layers
notice. But beside other busy processes a spinning thread keeps from its core the very thread that it waits for.

PyTorch's packages for Linux bring GNU's runtime (libgomp), whose threads spin for a millisecond or more, or hardly at
all while the runtime manages more threads than there are cores. A team of threads of our own that does nothing makes it
so (`ShortWaits`): a switch for the whole process that leaves the number of computing threads, and so every rounding, as
it is. A thread decides (`Watcher`) by how long the threads of this process were ready to run and had no core, which
Linux counts for each: neighbours, quotas of control groups and launched siblings all show in it. Threads that waited
for each other do not count, as when images are saved beside those that are made: then the process had all cores.

Nothing is done where the environment has a policy already; with one thread; where Linux's counts are missing; or with
another runtime: LLVM's and Intel's (on macOS, or preloaded) and Microsoft's have no such switch for a whole process.
Theirs follow `KMP_BLOCKTIME` and `OMP_WAIT_POLICY`, which are the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ldm.limits import cores, free_threads
from ldm.threads import POLICY, SPINS

TASKS, MAPS = "/proc/self/task", Path("/proc/self/maps")
OTHERS = re.compile(r"lib(iomp5|omp)\b")  # Intel's and LLVM's runtimes; preloaded, they serve PyTorch in place of GNU's
INTERVAL, IDLE_INTERVAL = 0.1, 0.5  # seconds between two readings, and while the process does nothing
BUSY, QUIET = 0.2, 0.1  # cores that others have, on average: above, below it the machine is taken as such
BUSY_READINGS, QUIET_READINGS = 2, 10  # in a row, to change the policy
IDLE = 0.1  # threads that run or wait for a core, on average, below which a reading says nothing


@dataclass(frozen=True)
class Load:
    """What the threads of this process did between two readings, in seconds, added over all threads."""

    elapsed: float  # by the clock
    ran: float
    waited: float  # ready to run, but without a core
    cores: int  # that the process may run on

    @property
    def lacked(self) -> float:
        """The number of cores, on average, that its threads waited for and others had."""
        return min(self.waited / self.elapsed, max(self.cores - self.ran / self.elapsed, 0.0))


@dataclass(frozen=True)
class Policy:
    """Whether waits are short, and how many readings in a row spoke against that."""

    short: bool = False
    against: int = 0


def decide(policy: Policy, load: Load) -> Policy:
    """The policy after a reading."""
    if load.ran + load.waited < IDLE * load.elapsed:
        return policy
    if not (load.lacked <= QUIET if policy.short else load.lacked >= BUSY):
        return Policy(policy.short)
    if policy.against + 1 < (QUIET_READINGS if policy.short else BUSY_READINGS):
        return Policy(policy.short, policy.against + 1)
    return Policy(not policy.short)


class ShortWaits:
    """While it lasts, libgomp's threads hardly spin: a thread holds a team of as many threads as there are cores."""

    def __init__(self, runtime: ctypes.CDLL, team: int) -> None:
        self.runtime, self.team = runtime, team
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._hold, name="ldm short waits", daemon=True)
        self.thread.start()

    def _hold(self) -> None:
        # each thread of the team calls a function that does nothing; libgomp ends them when this thread ends
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        self.runtime.GOMP_parallel(nothing, None, ctypes.c_uint(self.team), ctypes.c_uint(0))
        self.ended.wait()

    def end(self) -> None:
        """Let the team end; long waits are back."""
        self.ended.set()
        self.thread.join()


class Watcher:
    """A thread that shortens the waits of OpenMP's threads while they lack cores."""

    def __init__(self, runtime: ctypes.CDLL, team: int) -> None:
        self.runtime, self.team = runtime, team
        self.policy = Policy()
        self.waits: ShortWaits | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="ldm watcher", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def end(self) -> None:
        """End the thread, and what it has switched on."""
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # where nothing can be read any longer, waits are OpenMP's own again
            self._follow_readings()
        self.follow(Policy())

    def _follow_readings(self) -> None:
        before, interval = Reading(), INTERVAL
        while not self.ended.wait(interval):
            now = Reading()
            load = now.since(before)
            self.follow(decide(self.policy, load))
            before, interval = now, INTERVAL if load.ran + load.waited >= IDLE * load.elapsed else IDLE_INTERVAL

    def follow(self, policy: Policy) -> None:
        """Make waits what the policy says."""
        self.policy = policy
        if policy.short and self.waits is None:
            self.waits = ShortWaits(self.runtime, self.team)
        elif not policy.short and self.waits is not None:
            self.waits.end()
            self.waits = None


class Reading:
    """The times of all threads of this process at this moment, in nanoseconds: on a core, and waiting for one."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.times = {thread: times(thread) for thread in os.listdir(TASKS)}  # noqa: PTH208, pathlib is slow

    def since(self, before: Reading) -> Load:
        """What happened after another reading; threads that have ended since are left out."""
        found = [(now, before.times.get(thread, (0, 0))) for thread, now in self.times.items()]
        ran, waited = (sum(max(now[part] - then[part], 0) for now, then in found) / 1e9 for part in (0, 1))
        return Load(self.at - before.at, ran, waited, cores())


def times(thread: str) -> tuple[int, int]:
    """The two times of a thread, in nanoseconds; zeros if it has ended."""
    try:
        file = os.open(f"{TASKS}/{thread}/schedstat", os.O_RDONLY)
    except OSError:
        return 0, 0
    try:
        ran, waited, _ = os.read(file, 100).split()
    except OSError:
        return 0, 0
    finally:
        os.close(file)
    return int(ran), int(waited)


RUNNING: dict[int, Watcher] = {}  # by process, because a forked one has none of its parent's threads


def watch(device: str, threads: int) -> None:
    """Let waits follow the load from now on, if the device is the CPU, threads are several, and it can be done here."""
    if device != "cpu" or threads < 2 or os.getpid() in RUNNING or own_policy():
        return
    if (runtime := spinning_runtime()) is None:
        return
    team = runtime.omp_get_num_procs() + 1
    if 4 * team > free_threads():  # libgomp ends the process if it cannot start a thread
        return
    watcher = Watcher(runtime, team)
    if RUNNING.setdefault(os.getpid(), watcher) is watcher:  # not another thread's
        watcher.start()
        atexit.register(stop)


def stop() -> None:
    """Leave the waits of this process to OpenMP again."""
    if watcher := RUNNING.pop(os.getpid(), None):
        watcher.end()


def own_policy(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the environment says of waits."""
    return [f"{name}={environment[name]}" for name in (POLICY, *SPINS) if name in environment]


@cache
def spinning_runtime() -> ctypes.CDLL | None:
    """GNU's runtime, if it serves PyTorch and Linux counts how long threads wait for cores; PyTorch is loaded."""
    if OTHERS.search(os.environ.get("LD_PRELOAD", "")) or not Path(TASKS, str(os.getpid()), "schedstat").is_file():
        return None
    found = {line.split(maxsplit=5)[-1].strip() for line in MAPS.read_text(encoding="utf-8").splitlines()}
    paths = [path for path in found if Path(path).name.startswith("libgomp")]  # other packages may bring their own
    return ctypes.CDLL(min(paths, key=lambda path: "/torch" not in path)) if paths else None


def threads_in_words(threads: int) -> str:
    """The threads that compute on the CPU, how they wait and on how many cores, for reports."""
    how = ", ".join(own_policy()) or ("waiting by the machine's load" if spinning_runtime() else "OpenMP's own waits")
    return f"{threads} {'thread' if threads == 1 else 'threads'} ({how}) on {cores()} cores"
