"""Optimisers by name, and learning rates as functions of the update's number alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.muon import Muon
from ldm.training.parallel.spread import is_spread
from ldm.training.sections import OptimizerSection

STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "adafactor": 0, "prodigy": 16, "muon": 4}  # for each parameter
Group = tuple[list[nn.Parameter], float]  # parameters and their highest learning rate


def make_optimizer(
    section: OptimizerSection, groups: Iterable[Group], undecayed: Iterable[Group] = ()
) -> torch.optim.Optimizer:
    """The optimiser that a section names, for groups of parameters with a learning rate each.

    The `undecayed` groups have no weight decay. Each group keeps its highest learning rate as "highest", for
    `set_learning_rate`.

    Raises:
        LdmError: the method's package is not installed.
    """
    rows: list[dict[str, Any]] = [{"params": ps, "lr": rate, "highest": rate} for ps, rate in groups if ps]
    rows += [{"params": ps, "lr": rate, "highest": rate, "weight_decay": 0.0} for ps, rate in undecayed if ps]
    common: dict[str, Any] = {
        "betas": section.betas, "weight_decay": section.weight_decay, "eps": section.epsilon,
    }  # fmt: skip
    if section.name == "adamw":
        fused = all(p.device.type in ("cuda", "cpu") for row in rows for p in row["params"])  # 4 times as fast on a CPU
        return torch.optim.AdamW(rows, fused=fused or None, **common)
    if section.name == "muon":
        return Muon(rows, **common)
    if section.name == "adafactor":
        return torch.optim.Adafactor(rows, weight_decay=section.weight_decay)
    package, name = {"adamw-8bit": ("bitsandbytes.optim", "AdamW8bit"), "prodigy": ("prodigyopt", "Prodigy")}[
        section.name
    ]
    try:
        kind = getattr(importlib.import_module(package), name)
    except ImportError:
        raise LdmError(
            f"optimizer {section.name} needs one more package: pip install {package.split('.')[0]}"
        ) from None
    with redirect_stdout(None):  # Prodigy prints a greeting
        return kind(rows, **common)


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their weights, which fused optimisers need: moments of a run on another device
    may have another one."""
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and not is_spread(moment):
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The part of the highest learning rate at update `step` (from 1) of `steps`.

    With a cooldown it stays at its highest until so many updates are left, so that a run can be made longer and its
    updates so far remain the same (Hägele et al. 2024, arXiv 2405.18392).
    """
    if step <= section.warmup:
        return step / section.warmup
    if section.schedule == "constant":
        return 1.0
    begin = max(steps - section.cooldown, section.warmup) if section.cooldown else section.warmup
    done = min(max(step - begin, 0) / max(steps - begin, 1), 1.0)
    left = 1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return section.final + (1 - section.final) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, part: float) -> None:
    """Set each group's learning rate to that part of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["highest"] * part
