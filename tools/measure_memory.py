"""Measure the memory of making an image, ours beside diffusers', each in a process of its own.

The process's memory is read every 10 ms: what is its own (anonymous), and what is mapped from files, such as PyTorch's
libraries and weights, and can be taken away and read again. The peaks are those after loading and of the whole call.

    python tools/measure_memory.py sd15 --dtype bf16 --size 512 --side ldm --side diffusers
    python tools/measure_memory.py FOLDER --dtype bf16 --size 1024 --quantize int8-weights
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import threading
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
KINDS = {"all": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}
PERIOD = 0.01  # seconds


class MemoryWatch:
    """The peak of each kind of memory since the last look, in GB."""

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(KINDS, 0.0)
        self.pause = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._read()
            self.pause.wait(PERIOD)

    def _read(self) -> None:
        text = STATUS.read_text(encoding="ascii")
        for kind, name in KINDS.items():
            found = re.search(rf"{name}:\s*(\d+) kB", text)
            self.peaks[kind] = max(self.peaks[kind], int(found[1]) * 1024 / 1e9 if found else 0.0)

    def look(self) -> dict[str, float]:
        """The peaks, which are forgotten."""
        self._read()
        found, self.peaks = self.peaks, dict.fromkeys(KINDS, 0.0)
        return found


def serve(pipe: Any, name: str, given: argparse.Namespace) -> None:
    """Load a side, make an image twice, and tell the peaks of loading, of the steps and of decoding."""
    import torch

    from ldm.bench.options import BenchOptions, Call
    from ldm.bench.sides import make_side
    from ldm.runtime.quiet import quiet
    from pipelines.tuning import dtype_named

    quiet()
    watch, found = MemoryWatch(), {}
    options = BenchOptions(given.source, dtype=given.dtype, quantize=given.quantize if name == "ldm" else None)
    dtype = dtype_named(given.dtype) or torch.float32
    side = make_side(name, options, Call(given.size, given.size, 1, 7.5), torch.device("cpu"), dtype)
    found["loading"] = watch.look()
    steps: list[dict[str, float]] = []
    for number in range(given.images):
        side(given.steps, lambda: steps.append(watch.look()))
        highest = {kind: max(step[kind] for step in steps) for kind in KINDS}
        found |= {f"steps {number}": highest, f"decoding {number}": watch.look()}
        steps.clear()
    pipe.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a model, or a family's name for random weights")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--quantize")
    parser.add_argument("--side", action="append", help="ldm, diffusers …; by default both")
    given = parser.parse_args()
    for name in given.side or ["ldm", "diffusers"]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, name, given))
        process.start()
        theirs.close()
        found = ours.recv()
        process.join()
        peak = {kind: max(one[kind] for one in found.values()) for kind in KINDS}
        print(json.dumps({"side": name, "peak": peak, **found}, default=float))
        for what, one in {**found, "peak": peak}.items():
            print(f"{name:12} {what:12}", *(f"{kind} {number:6.2f} GB" for kind, number in one.items()), flush=True)


if __name__ == "__main__":
    main()
