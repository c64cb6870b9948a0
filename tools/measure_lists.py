"""Measure how fast a list of prompts becomes images: made without saving them, and by `ldm generate` in processes.

    python tools/measure_lists.py [--images 168] [--steps 4] [--processes 1,2]

The time is from the last image of the first batch (of each process) to the last image of all, so that the start does
not count. The last column is the ratio to images that one process makes in the same batches, and does not save.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

MADE = """
import sys, time
from pathlib import Path
from pipelines import Pipeline

lines, steps, batch = Path(sys.argv[1]).read_text().splitlines(), int(sys.argv[2]), int(sys.argv[3])
pipeline = Pipeline()
made = pipeline.make(pipeline.request(lines, steps=steps, seed=0, batch=batch))
next(made)
began = time.perf_counter()
for _ in made:
    pass
print((time.perf_counter() - began) / (len(lines) - batch))
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=168, help="of the built-in model")
    parser.add_argument("--batch", type=int, default=28)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--processes", default="1,2", help="comma-separated")
    options = parser.parse_args()
    steps, batch = str(options.steps), str(options.batch)
    with tempfile.TemporaryDirectory() as temporary:
        prompts = Path(temporary, "prompts.txt")
        prompts.write_text("".join(f"a cat, style {line}\n" for line in range(options.images)))
        made = [sys.executable, "-c", MADE, str(prompts), steps, batch]
        done = subprocess.run(made, check=True, capture_output=True, text=True)
        rows = {"made, not saved": float(done.stdout.split()[-1])}
        for processes in map(int, options.processes.split(",")):
            out = Path(temporary, str(processes))
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = ["-m", "ldm", "generate", "--prompts", str(prompts), "--steps", steps, "--batch", batch]
            command = [sys.executable, *(launch if processes > 1 else []), *command, "--out", str(out)]
            subprocess.run(command, check=True, capture_output=True)
            times = sorted(path.stat().st_mtime for path in out.iterdir())
            first = options.batch * processes
            rows[f"ldm generate, processes: {processes}"] = (times[-1] - times[first - 1]) / (len(times) - first)
    table = Table("", "images/s", "ratio")
    for name, seconds in rows.items():
        table.add_row(name, f"{1 / seconds:.2f}", f"{rows['made, not saved'] / seconds:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
