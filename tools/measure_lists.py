"""Measure how fast a list of prompts becomes images: made without saving them, and by `ldm generate` in processes.

    python tools/measure_lists.py [--images 112] [--steps 4] [--processes 1,2]

Each row is the time for twice as many images, less the time for so many, so that the start does not count. The last
column is the ratio to images that one process makes in the same batches, and does not save.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

MADE = """
import sys, time
from pathlib import Path
from pipelines import Pipeline

lines, steps = Path(sys.argv[1]).read_text().splitlines(), int(sys.argv[2])
pipeline = Pipeline()
pipeline(lines[:2], steps=2)
times = []
for count in (len(lines) // 2, len(lines)):
    began = time.perf_counter()
    for _ in pipeline.make(pipeline.request(lines[:count], steps=steps, seed=0)):
        pass
    times.append(time.perf_counter() - began)
print(times[1] - times[0])
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=112, help="of the built-in model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--processes", default="1,2", help="comma-separated")
    options = parser.parse_args()
    count, steps = options.images, str(options.steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lists = [folder / "some.txt", folder / "twice.txt"]
        for number, path in enumerate(lists, 1):
            path.write_text("".join(f"a cat, style {line}\n" for line in range(number * count)))
        alone = subprocess.run(
            [sys.executable, "-c", MADE, str(lists[1]), steps], check=True, capture_output=True, text=True
        )
        rows = {"made, not saved": float(alone.stdout.split()[-1])}
        for processes in map(int, options.processes.split(",")):
            times = [generated(path, steps, processes, folder / f"{path.stem}-{processes}") for path in lists]
            rows[f"ldm generate, processes: {processes}"] = times[1] - times[0]
    table = Table("", "images/s", "ratio")
    for name, seconds in rows.items():
        table.add_row(name, f"{count / seconds:.2f}", f"{rows['made, not saved'] / seconds:.3f}")
    Console().print(table)


def generated(prompts: Path, steps: str, processes: int, out: Path) -> float:
    """The seconds that the command takes for a list."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = ["-m", "ldm", "generate", "--prompts", str(prompts), "--steps", steps, "--out", str(out)]
    began = time.perf_counter()
    subprocess.run([sys.executable, *launch, *command], check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
