"""Compare generation and training on a GPU with diffusers, by a series of `ldm bench` or `measure_training.py` runs.

    python tools/benchmark_gpu.py images --out benchmarks/gpu
    python tools/benchmark_gpu.py compiled --out benchmarks/gpu
    python tools/benchmark_gpu.py training --out benchmarks/gpu

Each command takes at most ten minutes: rows that do not start in time are left out and reported. For each row, a JSON
file holds all numbers, updated after every round, and a log beside it holds the output. Weights are random with the
real shapes. `--small` uses the built-in model and few steps, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

BENCH = [sys.executable, "-m", "ldm", "bench"]
TRAINING = [sys.executable, str(Path(__file__).with_name("measure_training.py"))]
GROUPS = {  # group -> {row and name of its file: arguments of the command}; the most informative rows first
    "images": {
        "sdxl": "sdxl --size 1024 --steps 30 --rounds 3 --against diffusers,channels-last",
        "sd15": "sd15 --size 512 --steps 50 --rounds 5 --against diffusers,channels-last",
        "sd15-batch": "sd15 --size 512 --steps 50 --rounds 2 --batch 16 --against diffusers,channels-last",
        "sdxl-batch": "sdxl --size 1024 --steps 20 --rounds 2 --batch 8 --against channels-last",
        "emoji": "emoji --steps 20 --rounds 5 --against diffusers",
    },
    "compiled": {
        "sdxl-compiled": "sdxl --size 1024 --steps 30 --rounds 3 --compile --against compiled-blocks",
        "sd15-compiled": "sd15 --size 512 --steps 50 --rounds 5 --compile --against compiled-blocks",
        "sdxl-fp8": "sdxl --size 1024 --steps 20 --rounds 2 --batch 8 --compile --quantize fp8 --against ",
        "sdxl-compiled-batch": "sdxl --size 1024 --steps 20 --rounds 2 --batch 8 --compile --against ",
        "sd15-compiled-batch": "sd15 --size 512 --steps 50 --rounds 2 --batch 16 --compile --against ",
        "sd15-autotuned": "sd15 --size 512 --steps 50 --rounds 3 --compile --against compiled",
    },
    "training": {
        "train-sd15-plain": "--family sd15 --size 512 --batch 32 --precision bf16 --steps 10 --rounds 1",
        "train-sd15": "--family sd15 --size 512 --batch 32 --precision bf16 --compile --steps 10 --rounds 1",
        "train-sdxl": "--family sdxl --size 1024 --batch 8 --checkpointing --precision bf16 --steps 5 --rounds 1",
    },
}
SMALL = {
    "images": "emoji --steps 2 --rounds 1 --against diffusers",
    "compiled": "emoji --steps 2 --rounds 1 --compile --against plain",
    "training": "--family sd15 --size 64 --batch 1 --steps 1 --rounds 1",
}


def main() -> None:
    """Print a table; the exit code says whether all rows were measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the numbers")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit; rows that are not done are left out")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("benchmark_gpu: no GPU is found; --small tests the script without one")
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table("row", "side", "a step, s", "an image, s", "images a second", "of the limit")
    end, left = time.monotonic() + 60 * options.minutes, []
    for name, usual in GROUPS[options.group].items():
        file = options.out / f"{name}.json"
        arguments = SMALL[options.group] if options.small else usual
        if not measured(TRAINING if options.group == "training" else BENCH, arguments, file, end - time.monotonic()):
            left.append(name)
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        for row in trained(found) if options.group == "training" else made(found):
            table.add_row(name, *row)
    Console(width=110).print(table)
    if left:
        raise SystemExit(f"benchmark_gpu: not measured: {', '.join(left)}")


def measured(command: list[str], arguments: str, file: Path, seconds: float) -> bool:
    """Run a command; returns whether it wrote the numbers of at least one round. Prints why rounds are missing."""
    if seconds <= 0:
        return False
    file.unlink(missing_ok=True)
    log = file.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.Popen(
            [*command, *arguments.split(" "), "--out", str(file)], stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code: int | None = done.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)  # the command and its child processes
            code = None
    if code != 0:
        said = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        print(f"{arguments}: {'no time is left' if code is None else said}", file=sys.stderr)
    return file.exists()


def made(found: dict[str, Any]) -> list[list[str]]:
    """The results of `ldm bench`: a row for each side."""
    rows = []
    for side, seconds in found["seconds"].items():
        step, image = (median(row[stage] for row in seconds) for stage in ("step", "image"))
        each, limit = found["options"]["batch"] / image, found["limit of a step"] / step
        rows.append([side, f"{step:.4f}", f"{image:.3f}", f"{each:.2f}", f"{limit:.0%}"])
    return rows


def trained(found: dict[str, Any]) -> list[list[str]]:
    """The results of `measure_training.py`: a row for each side."""
    batch, ours = found["options"]["batch"], median(found["seconds"]["ours"])
    rows = []
    for side, seconds in found["seconds"].items():
        step = median(seconds)
        use = f"{found['tflops'] * ours / step / found['peak']:.0%}" if found["peak"] else ""
        rows.append([side, f"{step:.4f}", "", f"{batch / step:.2f}", use])
    return rows


if __name__ == "__main__":
    main()
