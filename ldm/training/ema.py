"""Averages of the weights over a run: an exponential one, and power-function ones that can be recombined afterwards.

Karras et al. 2024 (arXiv 2312.02696), section 3: an average with profile (γ + 1) τ^γ / t^(γ + 1) over the updates τ up
to t has a width relative to the length of the run, σ² = (γ + 1) / ((γ + 2)² (γ + 3)). From snapshots of two such
averages, an average of any other width is computed after training, by least squares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.files import check_digest, replacing
from ldm.training.sections import EmaSection
from ldm.weights.tensors import Output, Store, TensorInfo, write_safetensors

SNAPSHOT = re.compile(r"(\d+)-([\d.]+)\.safetensors")


@dataclass(frozen=True)
class Exponential:
    """The profile of an exponential average."""

    section: EmaSection
    name: ClassVar[str] = "ema"

    def decay(self, step: int) -> float:
        """The weight of the old average at update number `step` (from 1)."""
        longest = self.section.decay
        return min(longest, (1 + step) / (10 + step)) if self.section.ramp else longest


@dataclass(frozen=True)
class Power:
    """The profile of a power-function average."""

    width: float  # relative
    gamma: float  # the exponent that has this width

    @property
    def name(self) -> str:
        return f"width-{self.width:g}"

    def decay(self, step: int) -> float:
        """The weight of the old average at update number `step` (from 1)."""
        return (1 - 1 / step) ** (self.gamma + 1)


def profiles(section: EmaSection) -> list[Exponential | Power]:
    """The profiles of the averages that the section asks for, the exponential one first.

    Raises:
        LdmError: a width is impossible.
    """
    powers = [Power(width, exponent(width)) for width in section.widths]
    return [Exponential(section), *powers] if section.decay else list(powers)


class Averages:
    """The averages of a module's trained parameters; `update` is called after each update of the weights."""

    def __init__(self, module: nn.Module, section: EmaSection) -> None:
        self.section = section
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.profiles = profiles(section)
        self.averages = [[p.detach().clone() for p in self.parameters.values()] for _ in self.profiles]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the weights after update number `step` (from 1)."""
        weights = [p.detach() for p in self.parameters.values()]
        for average, profile in zip(self.averages, self.profiles, strict=True):
            torch._foreach_lerp_(average, weights, 1 - profile.decay(step))

    @property
    def names(self) -> list[str]:
        """The names of the averages: `ema`, `width-0.05`; without any, `weights`, the weights themselves."""
        return [profile.name for profile in self.profiles] or ["weights"]

    def named(self, which: int = 0) -> dict[str, Tensor]:
        """One of the averages by the parameters' names; without any, the weights."""
        tensors = self.averages[which] if self.averages else [p.detach() for p in self.parameters.values()]
        return dict(zip(self.parameters, tensors, strict=True))

    def in_place(self, which: int = 0) -> AbstractContextManager[None]:
        """Put one of the averages in the place of the module's weights, if there are averages."""
        return self._placed(self.averages[which]) if self.averages else nullcontext()

    def read_in_place(self, path: Path) -> AbstractContextManager[None]:
        """Put the weights that `save` wrote in the place of the module's weights.

        Raises:
            LdmError: the file is missing or damaged.
        """
        if not path.exists():
            raise LdmError(f"{path} is missing; put it back")
        check_digest(path)
        device = next(iter(self.parameters.values())).device
        found = dict(Store([path]).read(list(self.parameters), None, device))
        return self._placed([found[name] for name in self.parameters])

    @contextmanager
    def _placed(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        weights = [p.data for p in self.parameters.values()]
        for p, tensor in zip(self.parameters.values(), tensors, strict=True):
            p.data = tensor
        try:
            yield
        finally:
            for p, weight in zip(self.parameters.values(), weights, strict=True):
                p.data = weight

    def save(self, path: Path, which: int) -> None:
        """Write one of the averages to a file, whole or not at all."""
        self._write(path, list(self.named(which).values()), torch.float32, {})

    def save_snapshots(self, folder: Path, step: int) -> None:
        """Write the power-function averages, in fp16 as their authors do, for `recombine`."""
        folder.mkdir(parents=True, exist_ok=True)
        for profile, average in zip(self.profiles, self.averages, strict=True):
            if isinstance(profile, Power):
                width = f"{profile.width:g}"
                path = folder / f"{step:08d}-{width}.safetensors"
                self._write(path, average, torch.float16, {"step": str(step), "width": width})

    def _write(self, path: Path, tensors: Sequence[Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        outputs = [
            Output(name, TensorInfo(dtype, tuple(tensor.shape)), partial(Tensor.detach, tensor))
            for name, tensor in zip(self.parameters, tensors, strict=True)
        ]
        size = sum(output.info.nbytes for output in outputs)
        with replacing(path, folder=False, overwrite=True, need=size) as temporary:
            write_safetensors(temporary, outputs, metadata)

    def state_dict(self) -> dict[str, Any]:
        """The state of the averages, for a checkpoint."""
        return {"averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            LdmError: the checkpoint has other averages.
        """
        if len(state["averages"]) != len(self.averages):
            raise LdmError(
                f"the checkpoint has {len(state['averages'])} averages, the configuration {len(self.averages)} (ema)"
            )
        with torch.no_grad():
            for average, saved in zip(self.averages, state["averages"], strict=True):
                torch._foreach_copy_(average, saved)


def exponent(width: float) -> float:
    """The exponent γ of the profile with relative width σ.

    Raises:
        LdmError: no profile has this width: widths lie between 0 and 0.288, the width of a plain mean.
    """
    if not 0 < width < math.sqrt(1 / 12):
        raise LdmError(f"width {width!r} of an average: a number above 0 and below 0.288 is needed (ema.widths)")
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])  # (γ + 2)² (γ + 3) σ² = γ + 1
    return float(roots.real.max())


def overlap(t1: np.ndarray, gamma1: np.ndarray, t2: np.ndarray, gamma2: np.ndarray) -> np.ndarray:
    """∫ p1 p2 dτ of profiles that end at t1 and t2."""
    first = t1 <= t2
    later, ratio = np.where(first, t2, t1), np.where(first, t1 / t2, t2 / t1)
    beyond = np.where(first, gamma2, gamma1)  # exponent of the profile that ends later
    return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * ratio**beyond / later


def coefficients(steps: Sequence[int], widths: Sequence[float], step: int, width: float) -> np.ndarray:
    """Coefficients of snapshots, taken at `steps` of averages of `widths`, whose sum is nearest to another average."""
    t, gamma = np.array(steps, float), np.array([exponent(value) for value in widths])
    wanted = np.array([float(step)]), np.array([exponent(width)])
    a = overlap(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    b = overlap(t, gamma, *wanted)
    return np.linalg.lstsq(a, b, rcond=None)[0]


def recombine(folder: Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """Weights averaged with another width, from the snapshots of a run (`Averages.save_snapshots`): fp32 by name.

    Args:
        folder: of the snapshots.
        width: relative, as in `EmaSection.widths`.
        step: the update at which the average ends; by default the last one.

    Raises:
        LdmError: there are no snapshots, one is damaged, or the width is impossible.
    """
    found = [
        (int(m[1]), float(m[2]), path) for path in sorted(folder.glob("*")) if (m := SNAPSHOT.fullmatch(path.name))
    ]
    if not found:
        raise LdmError(f"{folder} has no snapshots of averages; train with ema.widths=[0.05,0.1]")
    end = max(row[0] for row in found) if step is None else step
    found = [row for row in found if row[0] <= end]
    if not found:
        raise LdmError(f"{folder} has no snapshots up to update {end}")
    weights = coefficients([row[0] for row in found], [row[1] for row in found], end, width)
    total: dict[str, Tensor] = {}
    for (_, _, path), weight in zip(found, weights, strict=True):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    value = file.get_tensor(name).float() * weight
                    total[name] = total[name] + value if name in total else value
        except (OSError, SafetensorError):
            raise LdmError(f"{path} cannot be read; it is damaged") from None
    return total
