"""Seconds of a call by its stages, memory, and what the multiplications of a step must take on this machine."""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.families import Family
from ldm.models.unet import UNet
from ldm.training.stages.denoiser import blank

STAGES = ("before", "step", "decode", "image")  # of a call: text and all else before the steps; one step; the end; all
SIZES = {"cpu": 4096, "cuda": 8192}  # of the matrices whose multiplication says what a device can do at the most
Side = Callable[[int, Callable[[], None]], None]  # make images with that many steps, and tell after each


@dataclass(frozen=True)
class Seconds:
    """How long the stages of one call took."""

    before: float
    step: float
    decode: float
    image: float


def timed(side: Side, steps: int, device: torch.device) -> Seconds:
    """Make images once and time the stages; each step but the first is timed, and their median counts."""
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":  # the GPU runs behind the CPU: it records the times itself
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    side(steps, mark)
    mark()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        marks = [marks[0].elapsed_time(event) / 1000 for event in marks]
    start, *after, end = marks
    step = median(later - earlier for earlier, later in pairwise(after))
    return Seconds(after[0] - start - step, step, end - after[-1], end - start)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a plain product of large matrices: what a device can do at the most."""
    size = SIZES.get(device.type, SIZES["cpu"])
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        began = now(device)
        a @ b
        best = min(best, now(device) - began)
    return 2 * size**3 / best


def products(family: Family, height: int, width: int) -> int:
    """Floating-point operations of the U-Net's multiplications, for one image of these many latents, once."""
    with torch.device("meta"):
        unet = UNet(family.unet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*blank(family, height, width))
    return counter.get_total_flops()


def reset_peak(device: torch.device) -> None:
    """Forget how much memory was needed so far, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux's highest resident size


def peak(device: torch.device) -> float:
    """The most memory that was needed, GB: a GPU's, or what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def device_name(device: torch.device) -> str:
    """What a reader must know of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
