"""Interrupt training runs at random moments, restart them until they finish, and compare them with undisturbed runs.

    python tools/check_resume.py --kills 50 --stops 20
    python tools/check_resume.py --kills 20 --stops 10 --processes 2

All stages are checked, with and without caches, with and without loader processes; and class images, trained text
encoders, pivotal tuning. Runs are killed (SIGKILL) or asked to stop (SIGTERM), half of the time at any moment, half
while a checkpoint is written. Every loss and every byte of the result must equal those of the undisturbed run, and a
run that is asked to stop must end within 30 seconds. In runs of several processes, one process is killed and the others
are then ended as launchers do; SIGTERM goes to all processes.
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
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ldm.cli.train import make_images
from ldm.training.config import Config
from ldm.training.forecast import Forecast, forecast
from ldm.training.layout import CHECKPOINTS, EVALUATION, METRICS
from ldm.training.loop import Stopped
from ldm.training.run import TrainingRun
from ldm.training.selftest import Ground, lay_out
from ldm.training.stages.sections import SECTIONS
from ldm.training.stages.stage import Cached
from ldm.training.stages.table import KINDS, kind_named

STEPS = 12
TIMING = ("images_per_s", "waiting", "tflops")  # timing values of the log, which differ between runs
SLOWEST = 120.0  # seconds after which an attempt counts as hanging
LONGEST = 30.0  # seconds within which a run must end after it was asked to stop
PATIENCE = 0.5  # seconds that the other processes have to end after one was killed
STOPPED = 128 + signal.SIGTERM  # exit code of a run that was asked to stop
Kind = tuple[str, str, dict[str, Any]]  # a kind of run: name, stage, changes of the configuration
MORE: tuple[Kind, ...] = (  # with changes of the stage's section alone
    (
        "adapter, class images",
        "adapter",
        {"prior": {"prompt": "an image", "images": 6, "steps": 2, "batch": 4}},
    ),
    ("base, text encoders too", "base", {"train_text": True}),
    ("pivotal tuning", "textual-inversion", {"pivotal": True, "train_text": True, "rank_dropout": 0.2}),
)


@dataclass
class Outcome:
    """The results of one kind of run."""

    name: str
    kills: int = 0
    stops: int = 0
    writing: int = 0  # number of kills and stops while a checkpoint was written
    runs: int = 0
    slowest: float = 0.0  # longest time from a request to stop to the end, in seconds
    problems: list[str] = field(default_factory=list)


def main() -> None:
    """Run the checks and print a table; the exit code is 0 if all runs gave the same result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--stops", type=int, default=20, help="in all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="check only every Nth kind of run")
    parser.add_argument("--brief", action="store_true", help="check one kind of run of every stage")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of each run")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="updates of each run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = Table("run", "kills", "stops", "while writing", "runs", "slowest stop, s", "problems")
    with tempfile.TemporaryDirectory() as folder:
        ends = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.stops
        found = one_each(options.steps) if options.brief else kinds(options.steps)
        chosen, draw = list(found)[:: options.every], random.Random(options.seed)
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
    """Check these kinds of runs with so many processes each; the signals in `ends` are divided among the kinds."""
    torch.set_num_threads(1)
    ground = Ground(folder, "no", 8)
    lay_out(folder)
    draw.shuffle(ends)
    for number, kind in enumerate(kinds):
        if own := ends[number :: len(kinds)]:
            yield check_kind(ground, kind, own, draw, processes)


def kinds(steps: int) -> Iterator[Kind]:
    """All kinds of runs: every stage, with and without loader processes and caches; and those of `MORE`."""
    for kind in KINDS:
        stage = kind.name
        for cached in (False, True) if kind.cached(SECTIONS[stage]()) != Cached() else (False,):
            for workers in (0, 2):
                changes = {
                    "stages": [stage], "data__cache": cached, "data__workers": workers, "data__holdout": 8,
                    f"{stage}__steps": steps, f"{stage}__validate_every": 5,
                }  # fmt: skip
                yield f"{stage}{', cached' * cached}{', 2 workers' * bool(workers)}", stage, changes
        for name, own, more in MORE:
            if own == stage:
                changes = {f"{stage}__{key}": value for key, value in more.items()}
                yield name, stage, {"stages": [stage], f"{stage}__steps": steps, **changes}


def one_each(steps: int) -> Iterator[Kind]:
    """One kind of run of every stage, each with caches and loader processes of its own."""
    for number, (_, same) in enumerate(groupby(kinds(steps), lambda kind: kind[1])):
        yield (rows := list(same))[number % len(rows)]


def check_kind(
    ground: Ground, kind: Kind, ends: list[signal.Signals], draw: random.Random, processes: int = 1
) -> Outcome:
    """Make one undisturbed run and several interrupted runs, and compare them."""
    name, stage, changes = kind
    outcome = Outcome(name)
    plain = ground.config(f"{name}-0", **changes)
    forecasts = forecast(plain, processes)  # once for all runs, which take little longer than it
    began = time.monotonic()
    if forked(plain, forecasts, lambda children: None, processes) != 0:
        outcome.problems.append("the undisturbed run failed")
        return outcome
    whole, left = time.monotonic() - began, list(ends)
    while left and not outcome.problems:
        outcome.runs += 1
        settings = ground.config(f"{name}-{outcome.runs}", **changes)
        checkpoints = Path(settings.output) / stage / CHECKPOINTS
        for _ in range(10 * STEPS):
            writing = draw.random() < 0.5
            wait = draw.uniform(0, 0.02) if writing else draw.uniform(0, whole)
            end = End(left[-1] if left else None, checkpoints if writing else None, wait, draw.randrange(processes))
            code = forked(settings, forecasts, end, processes)
            if code == 0:
                break
            if not end.sent or code not in (-end.sent, STOPPED):
                outcome.problems.append(f"a resumed run ended with exit code {code}")
                return outcome
            left.pop()
            outcome.kills += end.sent == signal.SIGKILL
            outcome.stops += end.sent == signal.SIGTERM
            outcome.writing += writing
            outcome.slowest = max(outcome.slowest, end.seconds if end.sent == signal.SIGTERM else 0)
        else:
            outcome.problems.append(f"the run was not done after {10 * STEPS} attempts")
            return outcome
        outcome.problems += differences(Path(plain.output) / stage, Path(settings.output) / stage)
    if outcome.slowest > LONGEST:
        outcome.problems.append(f"a stop took more than {LONGEST:.0f} s")
    return outcome


@dataclass
class End:
    """Sends a signal to processes `wait` seconds after their start, or after they begin to write a checkpoint."""

    signal: signal.Signals | None
    checkpoints: Path | None
    wait: float  # seconds
    first: int = 0  # index of the process that is killed first
    sent: signal.Signals | None = None
    seconds: float = 0.0  # from the signal to the end of the processes

    def __call__(self, processes: Sequence[int]) -> None:
        """Send the signal and wait until the processes have ended."""
        if not self.signal or not self._moment(processes[self.first]):
            return
        self.sent, began = self.signal, time.monotonic()
        if self.signal == signal.SIGKILL:
            os.kill(processes[self.first], signal.SIGKILL)
        for process in processes:
            os.kill(process, signal.SIGTERM)  # no effect on a process that has ended
        while not all(_ended(process) for process in processes):
            if self.signal == signal.SIGKILL and time.monotonic() - began > PATIENCE:
                for process in processes:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.001)
        self.seconds = time.monotonic() - began

    def _moment(self, process: int) -> bool:
        """Wait for the moment of the signal; returns False if the process ends before."""
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


def forked(
    settings: Config, forecasts: list[Forecast], end: Callable[[Sequence[int]], None], processes: int = 1
) -> int:
    """Train in processes that `end` interrupts; returns the exit code of the first process that failed, or 0.

    Processes are forked, so that they need not import PyTorch again.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [_child(settings, forecasts, rank, processes, port) for rank in range(processes)]
    end(children)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if -signal.SIGKILL in codes:
        return -signal.SIGKILL
    return next((code for code in codes if code), 0)


def _child(settings: Config, forecasts: list[Forecast], rank: int, processes: int, port: int) -> int:
    """Fork a process that trains as `rank` of `processes`; returns its process id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    signal.alarm(int(SLOWEST))
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        (stage,) = settings.stages
        makes = kind_named(stage).prior(getattr(settings, stage)) is not None  # class images; previews take longer
        run = TrainingRun(settings, make_images if makes else None, lambda *_: None)
        run.forecasts = forecasts
        run.all()
    except Stopped:
        os._exit(STOPPED)
    except BaseException as error:  # the child must not continue with the parent's code
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def _ended(process: int) -> bool:
    """Whether a child process has ended; it is not reaped."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def differences(expected: Path, found: Path) -> Iterator[str]:
    """The differences between two results of a stage, in the log's lines and the weights' bytes."""
    if _lines(expected) != _lines(found):
        yield "the logs differ"
    for path in sorted(expected.rglob("*.safetensors")):
        if path.relative_to(expected).parts[0] in (CHECKPOINTS, EVALUATION):
            continue
        if weights(path) != weights(found / path.relative_to(expected)):
            yield f"{path.relative_to(expected)} differs"


def weights(path: Path) -> bytes:
    """The bytes of a file's tensors, without the header, which names the run's folder."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def _lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


if __name__ == "__main__":
    main()
