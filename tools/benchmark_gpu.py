"""Measure pictures on a GPU beside diffusers, within ten minutes: one `ldm bench` after the other, each to a JSON file.

    python tools/benchmark_gpu.py --out benchmarks/gpu

Weights are random, of the real shapes. What does not begin in time is left out, and said. `--small` does the same with
the built-in model and few steps, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

ROWS = {  # name of the file -> what is measured; the most telling first
    "sdxl": "sdxl --size 1024 --steps 30 --rounds 3 --against diffusers,channels-last",
    "sd15": "sd15 --size 512 --steps 50 --rounds 5 --against diffusers,channels-last",
    "sd15-batch": "sd15 --size 512 --steps 50 --rounds 2 --batch 16 --against diffusers,channels-last",
    "sdxl-batch": "sdxl --size 1024 --steps 20 --rounds 2 --batch 8 --against channels-last",
    "sdxl-compiled": "sdxl --size 1024 --steps 30 --rounds 3 --against compiled",
    "sd15-compiled": "sd15 --size 512 --steps 50 --rounds 3 --against compiled",
    "emoji": "emoji --steps 20 --rounds 9 --cold --against diffusers,channels-last",
}
SMALL = "emoji --steps 2 --rounds 1 --against diffusers"


def main() -> None:
    """Print a table; the exit code says whether all rows were measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the numbers")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more is begun")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("benchmark_gpu: no GPU is found; --small tries the script itself")
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table("row", "side", "a step, s", "a picture, s", "pictures a second", "of the limit")
    end, left = time.monotonic() + 60 * options.minutes, []
    for name, arguments in ROWS.items():
        file = options.out / f"{name}.json"
        if time.monotonic() > end or not measured(SMALL if options.small else arguments, file):
            left.append(name)
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        for side, rows in found["seconds"].items():
            step, image = (median(row[stage] for row in rows) for stage in ("step", "image"))
            each = found["options"]["batch"] / image
            table.add_row(
                name, side, f"{step:.4f}", f"{image:.3f}", f"{each:.2f}", f"{found['limit of a step'] / step:.0%}"
            )
    Console(width=110).print(table)
    if left:
        raise SystemExit(f"benchmark_gpu: not measured: {', '.join(left)}")


def measured(arguments: str, file: Path) -> bool:
    """Whether a run of `ldm bench` wrote its numbers; if not, its last line says why."""
    command = [sys.executable, "-m", "ldm", "bench", *arguments.split(), "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(command[3:])}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return not done.returncode


if __name__ == "__main__":
    main()
