"""End runs at random moments, start them again until they are through, and compare them with whole ones.

    python tools/check_resume.py --kills 50 --stops 20
    python tools/check_resume.py --kills 20 --stops 10 --processes 2

For every stage, with and without caches, with and without loader processes. Runs are killed (SIGKILL) and asked to stop
(SIGTERM), half of the time at any moment, half while a checkpoint is written. Every loss, and every byte of the result,
must be those of the undisturbed run, and a run that is asked to stop must have ended within 30 seconds. Of several
processes one is killed and the others are ended as launchers do; all of them are asked to stop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ldm.training.config import Config
from ldm.training.loop import Stopped
from ldm.training.run import train
from ldm.training.selftest import Ground, draw_images
from ldm.training.stages.stage import Cached
from ldm.training.stages.table import KINDS

STEPS = 12
TIMING = ("images_per_s", "waiting", "tflops")  # figures that no two runs share
SLOWEST = 120.0  # seconds after which an attempt hangs
LONGEST = 30.0  # seconds that a run may go on after it was asked to stop
PATIENCE = 0.5  # seconds that processes have to end themselves once another was killed
STOPPED = 128 + signal.SIGTERM  # exit code of a run that stopped because it was asked to
Kind = tuple[str, str, dict[str, Any]]  # of a run: its name, what it trains, and how


@dataclass
class Outcome:
    """What came of one kind of run."""

    name: str
    kills: int = 0
    stops: int = 0
    writing: int = 0  # of them, while a checkpoint was written
    runs: int = 0
    slowest: float = 0.0  # seconds from a request to stop to the end
    problems: list[str] = field(default_factory=list)


def main() -> None:
    """Print a table; the exit code says whether all runs were the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--stops", type=int, default=20, help="in all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the kinds of runs, only every Nth")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = Table("run", "kills", "stops", "while writing", "runs", "slowest stop, s", "problems")
    with tempfile.TemporaryDirectory() as folder:
        ends = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.stops
        chosen, draw = list(kinds())[:: options.every], random.Random(options.seed)
        outcomes = list(check(Path(folder), chosen, ends, draw, options.processes))
    for row in outcomes:
        numbers = (row.kills, row.stops, row.writing, row.runs, f"{row.slowest:.2f}")
        table.add_row(row.name, *map(str, numbers), "; ".join(row.problems) or "–")
    Console().print(table)
    print(f"{sum(row.kills for row in outcomes)} kills, {sum(row.stops for row in outcomes)} stops")
    raise SystemExit(any(row.problems for row in outcomes))


def check(
    folder: Path, kinds: list[Kind], ends: list[signal.Signals], draw: random.Random, processes: int = 1
) -> Iterator[Outcome]:
    """Runs of these kinds, which share the ends, of so many processes each."""
    torch.set_num_threads(1)
    ground = Ground(folder, "no", 8)
    draw_images(folder / "images")
    draw.shuffle(ends)
    for number, kind in enumerate(kinds):
        yield check_kind(ground, kind, ends[number :: len(kinds)], draw, processes)


def kinds() -> Iterator[Kind]:
    """Every kind of stage, with loader processes too, and with caches where it reads them."""
    for kind in KINDS:
        stage = kind.name
        for cached in (False, True) if kind.cached(kind.section()) != Cached() else (False,):
            for workers in (0, 2):
                changes = {
                    "stages": [stage], "data__cache": cached, "data__workers": workers, "data__holdout": 8,
                    f"{stage}__steps": STEPS, f"{stage}__validate_every": 5,
                }  # fmt: skip
                yield f"{stage}{', cached' * cached}{', 2 workers' * bool(workers)}", stage, changes


def check_kind(
    ground: Ground, kind: Kind, ends: list[signal.Signals], draw: random.Random, processes: int = 1
) -> Outcome:
    """One undisturbed run, and others that are ended on the way."""
    name, stage, changes = kind
    outcome = Outcome(name)
    plain = ground.config(f"{name}-0", **changes)
    began = time.monotonic()
    if forked(plain, lambda children: None, processes) != 0:
        outcome.problems.append("the undisturbed run failed")
        return outcome
    whole, left = time.monotonic() - began, list(ends)
    while left and not outcome.problems:
        outcome.runs += 1
        settings = ground.config(f"{name}-{outcome.runs}", **changes)
        checkpoints = Path(settings.output) / stage / "checkpoints"
        for _ in range(10 * STEPS):
            writing = draw.random() < 0.5
            wait = draw.uniform(0, 0.02) if writing else draw.uniform(0, whole)
            end = End(left[-1] if left else None, checkpoints if writing else None, wait, draw.randrange(processes))
            code = forked(settings, end, processes)
            if code == 0:
                break
            if not end.sent or code not in (-end.sent, STOPPED):
                outcome.problems.append(f"a run that went on ended with {code}")
                return outcome
            left.pop()
            outcome.kills += end.sent == signal.SIGKILL
            outcome.stops += end.sent == signal.SIGTERM
            outcome.writing += writing
            outcome.slowest = max(outcome.slowest, end.seconds if end.sent == signal.SIGTERM else 0)
        else:
            outcome.problems.append("the run got nowhere")
            return outcome
        outcome.problems += differences(Path(plain.output) / stage, Path(settings.output) / stage)
    if outcome.slowest > LONGEST:
        outcome.problems.append("a stop took too long")
    return outcome


@dataclass
class End:
    """Sends processes a signal after a while, or that long after they begin to write a checkpoint."""

    signal: signal.Signals | None
    checkpoints: Path | None
    wait: float  # seconds
    first: int = 0  # which process is killed first
    sent: signal.Signals | None = None
    seconds: float = 0.0  # from the signal to the end of the processes

    def __call__(self, processes: Sequence[int]) -> None:
        """Returns when they have ended."""
        if not self.signal or not self._moment(processes[self.first]):
            return
        self.sent, began = self.signal, time.monotonic()
        if self.signal == signal.SIGKILL:
            os.kill(processes[self.first], signal.SIGKILL)
        for process in processes:
            os.kill(process, signal.SIGTERM)  # which means nothing to one that has ended
        while not all(_ended(process) for process in processes):
            if self.signal == signal.SIGKILL and time.monotonic() - began > PATIENCE:
                for process in processes:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.001)
        self.seconds = time.monotonic() - began

    def _moment(self, process: int) -> bool:
        """Wait for it; whether the process lives to see it."""
        while self.checkpoints and not any(self.checkpoints.glob(".step-*.part")):
            if _ended(process):
                return False
            time.sleep(0.0005)
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            if _ended(process):
                return False
            time.sleep(0.001)
        return True


def forked(settings: Config, end: Callable[[Sequence[int]], None], processes: int = 1) -> int:
    """Train in processes that are ended on the way; the exit code of the first that did not end well, or 0.

    Forks, so that each attempt need not import PyTorch again.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [_child(settings, rank, processes, port) for rank in range(processes)]
    end(children)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if -signal.SIGKILL in codes:
        return -signal.SIGKILL
    return next((code for code in codes if code), 0)


def _child(settings: Config, rank: int, processes: int, port: int) -> int:
    """A process that trains, as that rank of several; its number."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    signal.alarm(int(SLOWEST))
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        train(settings)
    except Stopped:
        os._exit(STOPPED)
    except BaseException as error:  # nothing of the parent's must run on in the child
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def _ended(process: int) -> bool:
    """Whether a child has ended; it is not yet waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def differences(expected: Path, found: Path) -> Iterator[str]:
    """Where two results of a stage are not the same: lines of the log, bytes of the weights."""
    if _lines(expected) != _lines(found):
        yield "the logs differ"
    for path in sorted((expected / "model").rglob("*.safetensors")):
        if weights(path) != weights(found / path.relative_to(expected)):
            yield f"{path.relative_to(expected)} differs"


def weights(path: Path) -> bytes:
    """A file's tensors; its header tells of the run's folder."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def _lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


if __name__ == "__main__":
    main()
