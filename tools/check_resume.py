"""Kill runs at random moments (SIGKILL), start them again until they are through, and compare them with whole ones.

    python tools/check_resume.py --kills 50

For every stage, with and without caches, with and without loader processes. Half of the kills come at any moment, half
while a checkpoint is written. Every loss, and every byte of the result, must be those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ldm.training.config import Config, StageName
from ldm.training.run import train
from ldm.training.selftest import STAGES, Ground, draw_pictures

STEPS = 12
TIMING = ("images_per_s", "waiting", "tflops")  # figures that no two runs share
SLOWEST = 120.0  # seconds after which an attempt hangs


@dataclass
class Outcome:
    """What came of one kind of run."""

    name: str
    kills: int = 0
    writing: int = 0  # of them, while a checkpoint was written
    runs: int = 0
    problems: list[str] = field(default_factory=list)


def main() -> None:
    """Print a table; the exit code says whether all runs were the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = Table("run", "kills", "while writing", "runs", "problems")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(check(Path(folder), options.kills, random.Random(options.seed)))
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            str(outcome.kills),
            str(outcome.writing),
            str(outcome.runs),
            "; ".join(outcome.problems) or "–",
        )
    Console().print(table)
    raise SystemExit(any(outcome.problems for outcome in outcomes))


def check(folder: Path, kills: int, draw: random.Random) -> Iterator[Outcome]:
    """Kill runs of every kind, so often in all."""
    torch.set_num_threads(1)
    ground = Ground(folder, "no", 8)
    draw_pictures(folder / "pictures")
    found = list(kinds())
    for number, (name, stage, changes) in enumerate(found):
        share = kills * (number + 1) // len(found) - kills * number // len(found)
        yield check_kind(ground, name, stage, changes, share, draw)


def kinds() -> Iterator[tuple[str, StageName, dict[str, Any]]]:
    """Every stage; base and refiner with caches too, and all with loader processes."""
    for stage in STAGES:
        for cached in (False, True) if stage in ("base", "refiner") else (False,):
            for workers in (0, 2):
                changes = {
                    "stages": [stage], "data__cache": cached, "data__workers": workers, "data__holdout": 8,
                    f"{stage}__steps": STEPS, f"{stage}__validate_every": 5,
                }  # fmt: skip
                yield f"{stage}{', cached' * cached}{', 2 workers' * bool(workers)}", stage, changes


def check_kind(
    ground: Ground, name: str, stage: StageName, changes: dict[str, Any], kills: int, draw: random.Random
) -> Outcome:
    """One undisturbed run, and killed ones until there were `kills` kills."""
    outcome = Outcome(name)
    plain = ground.config(f"{name}-0", **changes)
    began = time.monotonic()
    if forked(plain, lambda process: None) != 0:
        outcome.problems.append("the undisturbed run failed")
        return outcome
    whole = time.monotonic() - began
    while outcome.kills < kills and not outcome.problems:
        outcome.runs += 1
        settings = ground.config(f"{name}-{outcome.runs}", **changes)
        checkpoints = Path(settings.output) / stage / "checkpoints"
        for _ in range(10 * STEPS):
            writing = draw.random() < 0.5
            wait = draw.uniform(0, 0.02) if writing else draw.uniform(0, whole)
            kill = Kill(checkpoints if writing else None, wait) if outcome.kills < kills else lambda process: None
            code = forked(settings, kill)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                outcome.problems.append(f"a run that went on ended with {code}")
                return outcome
            outcome.kills += 1
            outcome.writing += writing
        else:
            outcome.problems.append("the run got nowhere")
            return outcome
        outcome.problems += differences(Path(plain.output) / stage, Path(settings.output) / stage)
    return outcome


@dataclass
class Kill:
    """Kills a process after a while, or that long after it begins to write a checkpoint."""

    checkpoints: Path | None
    wait: float  # seconds

    def __call__(self, process: int) -> None:
        """Returns when the process is killed or gone."""
        if self.checkpoints:
            while not any(self.checkpoints.glob(".step-*.part")):
                if _ended(process):
                    return
                time.sleep(0.0005)
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            if _ended(process):
                return
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)


def forked(settings: Config, kill: Callable[[int], None]) -> int:
    """Train in a process that is killed on the way; its exit code, negative for a signal.

    A fork, so that each attempt need not import PyTorch again.
    """
    process = os.fork()
    if process == 0:
        os.setsid()
        signal.alarm(int(SLOWEST))
        try:
            train(settings)
        except BaseException as error:  # nothing of the parent's must run on in the child
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    kill(process)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


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
