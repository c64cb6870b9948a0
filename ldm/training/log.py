"""The log of a stage: means of the steps' figures, a line every `log_every` steps, and where the time goes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from ldm.training.layout import METRICS
from ldm.training.stages.stage import Stage

Report = Callable[[str, int, int, dict[str, float]], None]  # stage, step, steps, figures


@dataclass(frozen=True)
class StepCost:
    """The operations of one image, and the device's peak speed."""

    tflop: float  # of an image, forward and backward
    peak: float | None  # TFLOP/s of a device; None if it is not known


@dataclass
class Throughput:
    """Images, and where the time went, since the last line of the log."""

    since: float = field(default_factory=time.monotonic)
    waiting: float = 0.0  # seconds spent waiting for data
    images: int = 0

    def figures(self) -> dict[str, float]:
        """Images a second over all ranks, and the part of the time spent waiting for data."""
        seconds = time.monotonic() - self.since
        return {"images_per_s": self.images / seconds, "waiting": self.waiting / seconds}


class StageLog:
    """Lines of figures, written to metrics.jsonl and given to `report`."""

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        folder: Path,
        report: Report,
        work: Callable[[int], StepCost | None],
    ) -> None:
        """Args:
        accelerator: tells which process is the main one, which writes.
        stage: name of the stage.
        folder: of the stage.
        report: is called with every line, on the main process.
        work: gives the cost of an image at a step.
        """
        self.accelerator, self.stage, self.report, self.work = accelerator, stage.name, report, work
        self.steps = stage.section.steps
        self.path = folder / METRICS
        self.sums: dict[str, list[float]] = {}  # sum and number of each figure since the last line
        self.clock = Throughput()

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        for name, value in figures.items():
            if math.isfinite(value):  # an fp16 gradient that overflowed was not used
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value, count + 1]

    def add_images(self, images: int) -> None:
        """Count the images of a step, over all ranks."""
        self.clock.images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within this context as spent waiting for data."""
        started = time.monotonic()
        yield
        self.clock.waiting += time.monotonic() - started

    def restart_clock(self) -> None:
        """Leave the time until now out, as it was not spent on training."""
        self.clock = Throughput()

    def write_means(self, step: int, learning_rate: float) -> None:
        """Write a line with the means since the last one, each over the steps that had the figure."""
        figures = {name: total / count for name, (total, count) in self.sums.items()}
        figures |= {"learning_rate": learning_rate, **self.clock.figures()}
        if work := self.work(step - 1):
            figures["tflops"] = figures["images_per_s"] / self.accelerator.num_processes * work.tflop
            if work.peak:
                figures["model_flops_use"] = figures["tflops"] / work.peak
        self.write(step, figures)
        self.sums = {}
        self.restart_clock()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write one line, on the main process."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            self.report(self.stage, step, self.steps, figures)

    def size(self) -> int:
        """Bytes of the log so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Cut the log to the whole lines within its first `size` bytes, on the main process."""
        if self.accelerator.is_main_process and self.path.exists():
            with self.path.open("rb") as file:
                kept = file.read(size)
            os.truncate(self.path, kept.rfind(b"\n") + 1)
