"""Measure the time of a sampling step outside the U-Net for every scheduler, compared with diffusers' pipeline.

Both pipelines have a tiny U-Net with the same weights. The time of its calls is subtracted, which leaves scheduler,
guidance and loop. Runs of the two alternate; the medians over all runs of the runs' median steps are printed.

    python tools/measure_overhead.py --steps 30 --runs 7
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny

from ldm.sampling.schedulers import SCHEDULERS
from pipelines import Pipeline


class Timed:
    """Times each call of a module's forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds: list[float] = []
        forward = module.forward

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = forward(*arguments, **options)
            self.seconds.append(time.perf_counter() - start)
            return result

        module.forward = timed  # type: ignore[method-assign]


def outside(marks: list[float], timer: Timed) -> float:
    """Milliseconds of the median step, from end to end of consecutive steps, without the U-Net's call."""
    steps = [after - before for before, after in pairwise(marks)]
    return median(step - call for step, call in zip(steps, timer.seconds[1:], strict=True)) * 1000


def ours(pipeline: Pipeline, timer: Timed, name: str, steps: int) -> float:
    """Milliseconds per step outside the U-Net in our pipeline."""
    marks: list[float] = []
    timer.seconds = []
    pipeline(
        "a cat",
        steps=steps,
        scheduler=name,
        seed=0,
        output="latents",
        on_step=lambda _: marks.append(time.perf_counter()),
    )
    return outside(marks, timer)


def theirs(pipeline: Any, timer: Timed, name: str, steps: int, config: Any) -> float:
    """Milliseconds per step outside the U-Net in diffusers' pipeline."""
    kind, options = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(config, **options)
    marks: list[float] = []
    timer.seconds = []

    def mark(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return values

    pipeline("a cat", num_inference_steps=steps, output_type="latent", callback_on_step_end=mark)
    return outside(marks, timer)


def main() -> None:
    """Print a line for each scheduler, and all numbers as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--scheduler", action="append", choices=list(SCHEDULERS), help="only this one (repeatable)")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tiny.model("sd15").save_pretrained(Path(folder) / "model")
        pipeline = Pipeline(Path(folder) / "model", device="cpu", dtype=torch.float32)
        reference = diffusers.StableDiffusionPipeline.from_pretrained(Path(folder) / "model")
    reference.set_progress_bar_config(disable=True)
    config = reference.scheduler.config
    timers = Timed(pipeline.model.unet), Timed(reference.unet)
    rows = {}
    for name in options.scheduler or SCHEDULERS:
        pairs = [
            (ours(pipeline, timers[0], name, options.steps), theirs(reference, timers[1], name, options.steps, config))
            for _ in range(options.runs + 1)
        ][1:]
        mine, other = (median(column) for column in zip(*pairs, strict=True))
        rows[name] = {"ours_ms": round(mine, 3), "diffusers_ms": round(other, 3), "ratio": round(other / mine, 2)}
        print(f"{name:12s} ours {mine:.3f} ms   diffusers {other:.3f} ms   ratio {other / mine:.2f}", flush=True)
    print(json.dumps({"torch": torch.__version__, "diffusers": diffusers.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
