"""The time that a run will take on this machine, measured with a few of its own steps."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ldm.training.config import Config
from ldm.training.phases import phases
from ldm.training.run import TrainingRun


@dataclass(frozen=True)
class Measured:
    """The measurements of a few real steps of the first stage."""

    seconds_per_step: float  # the median
    images_per_second: float  # over all processes
    waiting: float  # part of the time spent waiting for data
    peak_bytes: int  # of the GPU's memory; 0 where there is none
    hours: float  # for all of the stage's steps at this rate
    tflops: float  # of each device
    use: float | None  # part of the device's peak speed; None if that is not known


def measure(config: Config, steps: int) -> Measured:
    """Measure a few updates of the first stage, but the first one, on the run's own data and in a temporary folder.

    Raises:
        LdmError: the run itself would fail with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(config.model_copy(update={"output": folder, "trackers": []}), None, lambda *_: None)
        name = config.stages[0]
        training = run.training(name, run.start(name, None), Path(folder) / name)
        device = training.accelerator.device
        batches = training.batches(0)
        seconds, waits = [], []
        for _ in range(steps + 1):
            start = time.perf_counter()
            micro_batches = next(batches)
            waits.append(time.perf_counter() - start)
            training.train_step(micro_batches)
            training.step += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        processes = training.accelerator.num_processes
    typical = median(seconds[1:])
    section = getattr(config, name)
    rate = phases(section)[0].batch / typical
    work = training.work(0)
    assert work is not None
    tflops = rate / processes * work.tflop
    return Measured(
        typical, rate, sum(waits[1:]) / sum(seconds[1:]), peak,
        typical * section.steps / 3600, tflops, tflops / work.peak if work.peak else None,
    )  # fmt: skip
