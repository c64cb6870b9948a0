"""What programs share that measure a training step beside diffusers': sides that take turns, each in its own process.

The command itself runs the sides, one after the other, by the same command with `--side`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ldm.bench.measuring import device_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse(parser: argparse.ArgumentParser, sides: Sequence[str]) -> argparse.Namespace:
    """The command's options, with those that all such programs have."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with all numbers")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(step: Callable[[int], Any], steps: int) -> list[float]:
    """Seconds of each of the steps, after a first one that is not counted."""
    seconds = []
    for number in range(steps + 1):
        start = time.perf_counter()
        step(number)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def in_turn(sides: Sequence[str], rounds: int) -> dict[str, list[Any]]:
    """What each side prints as JSON, in each of its processes; of a side of diffusers' that fails, nothing.

    It may need more memory than there is.
    """
    found: dict[str, list[Any]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for side in sides:
                command = [sys.executable, *sys.argv, "--side", side, "--folder", folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode and side == "ours":
                    raise SystemExit(f"{Path(sys.argv[0]).stem}: ours failed")
                if not done.returncode:
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def write_found(options: argparse.Namespace, found: Mapping[str, Any], **versions: str) -> None:
    """All numbers as JSON, with what they were measured with, on stdout or in the file of `--out`."""
    result = {
        "options": {name: value for name, value in vars(options).items() if name != "out"}, **found,
        "device": device_name(DEVICE),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, **versions},
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    else:
        print(json.dumps(result))
