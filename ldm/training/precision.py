"""The precision that a run computes in on its device: the configuration's, or for `auto` the device's own."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ldm.runtime.bf16 import computes_bf16
from ldm.training.config import Config


def run_device() -> torch.device:
    """The device that a run uses in this process."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def precision_on(device: torch.device, precision: str) -> str:
    """The precision on a device: `auto` is bf16 where the device computes in it, and else fp32 ("no")."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device) else "no"


def resolved(config: Config, device: torch.device) -> Config:
    """The configuration with the precision on a device in place of `auto`."""
    return config.model_copy(update={"precision": precision_on(device, config.precision)})


def costs(device: torch.device, precision: str) -> str | None:
    """A warning of slow emulation, if a device is told to compute in bf16 and cannot; else None."""
    if precision != "bf16" or device.type not in ("cpu", "cuda") or computes_bf16(device):
        return None
    if device.type == "cuda":
        return f"precision bf16: {torch.cuda.get_device_name(device)} emulates it, slowly; set precision=auto or fp16"
    return (
        "precision bf16: this processor emulates it, so that a step takes about eight times as long as in fp32 "
        "(measured on Zen 3: 14.5 s and 1.74 s); set precision=auto"
    )
