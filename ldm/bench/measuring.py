"""Measurements: the time of each stage of a call, memory, and the least time of a step's matrix products."""

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
from ldm.runtime.bf16 import computes_bf16
from ldm.runtime.waiting import threads_in_words
from ldm.training.stages.denoiser import blank

STAGES = ("before", "step", "decode", "image")  # text encoding etc.; one step; decoding; the whole call
SIZES = {"cpu": 4096, "cuda": 8192}  # size of the square matrices that measure a device's peak speed
Side = Callable[[int, Callable[[], None]], None]  # (steps, callback after each step): makes a batch of images


@dataclass(frozen=True)
class Seconds:
    """The time of each stage of one call, in seconds."""

    before: float
    step: float
    decode: float
    image: float


def timed(side: Side, steps: int, device: torch.device) -> Seconds:
    """Make images once and time the stages; `step` is the median of all steps but the first."""
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":  # the GPU runs asynchronously, so its own events give the times
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
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of large matrices, the device's practical peak."""
    size = SIZES.get(device.type, SIZES["cpu"])
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        began = now(device)
        a @ b
        best = min(best, now(device) - began)
    return 2 * size**3 / best


def products(family: Family, height: int, width: int) -> int:
    """Floating-point operations of one U-Net pass for one image with `height`×`width` latents."""
    with torch.device("meta"):
        unet = UNet(family.unet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*blank(family, height, width))
    return counter.get_total_flops()


def reset_peak(device: torch.device) -> None:
    """Reset the record of peak memory, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux's highest resident size


def peak(device: torch.device) -> float:
    """Peak memory in GB: allocated memory of a GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def device_name(device: torch.device) -> str:
    """A description of the machine: of a CPU with its instruction set, its threads and how they wait."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = torch.backends.cpu.get_cpu_capability() + (" with bf16" if computes_bf16(device) else "")
    return f"{processor() or platform.machine()}, {kind}, {threads_in_words(torch.get_num_threads())}"


def processor() -> str:
    """The name of the processor, if the system tells it."""
    with suppress(OSError):
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
        if found:
            return found[1]
    return platform.processor()


def others_busy(seconds: float = 0.5) -> float | None:
    """How many cores other processes keep busy, measured while this one sleeps; None where the system does not tell."""
    before = _busy()
    time.sleep(seconds)
    after = _busy()
    return None if before is None or after is None else (after - before) / seconds


def _busy() -> float | None:
    """Seconds for which cores were busy since the system started, over all cores."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft = map(int, first[:7])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
