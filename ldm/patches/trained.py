"""Trained changes of layers: LoRA and its kin beside frozen linear layers and convolutions.

The formulas are those of `ldm.patches.low_rank`, so that a trained change, once merged, gives what it gave in training.
A new change is zero.

B batch, O output channels, I input channels, kh×kw kernel of a convolution, R rank
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.layers import TokenLinear, laid_out_like
from ldm.patches.low_rank import Change, Decomposed, Factors, Hadamard, Kronecker, LowRank


@dataclass(frozen=True)
class ChangeForm:
    """The form of a layer's change."""

    kind: Literal["lora", "loha", "lokr"]
    rank: int
    alpha: float
    norms: bool = False  # whether the norms of the weight's rows are trained too (DoRA)
    factor: int | None = None  # the most rows and columns of LoKr's first matrix; None: about the root of the layer's

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class TrainedChange(nn.Module, ABC):
    """The parameters of one layer's change."""

    @abstractmethod
    def change(self) -> Change:
        """The change as it is now, with gradients."""

    @abstractmethod
    def factors(self) -> list[nn.Parameter]:
        """The parameters whose product the change is."""

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """What the change adds to the layer's output for `x`.

        The whole matrix of the change is not kept for the backward pass, which computes it anew.
        """
        added: Tensor = checkpoint(self._added, x, layer, use_reentrant=False, preserve_rng_state=False)
        return added

    def _added(self, x: Tensor, layer: nn.Module) -> Tensor:
        with _exactly(x.device):
            delta = self.change().delta(layer.weight)  # type: ignore[arg-type]
        return product(layer, x, delta)


class LoRA(TrainedChange):
    """LoRA, in a convolution LoCon: two narrow products, one after the other."""

    def __init__(self, weight: Tensor, form: ChangeForm) -> None:
        super().__init__()
        self.scale, rank = form.scale, form.rank
        self.down = _drawn((rank, *weight.shape[1:]), weight.device)
        self.up = _zeros((len(weight), rank, *(1 for _ in weight.shape[2:])), weight.device)
        self.kept: Tensor | None = None  # (B, R): factors of the ranks for each sample, while ranks are dropped

    def change(self) -> Change:
        return LowRank(self.up, self.down, self.scale)

    def factors(self) -> list[nn.Parameter]:
        return [self.up, self.down]

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        narrow = product(layer, x, self.down)
        channels = 1 if isinstance(layer, (nn.Conv2d, TokenLinear)) else -1
        if self.kept is not None:
            sides = [1] * narrow.ndim
            sides[0], sides[channels] = self.kept.shape
            narrow = narrow * self.kept.view(sides)
        up = self.scale * self.up
        return F.conv2d(narrow, up) if isinstance(layer, nn.Conv2d) else product(layer, narrow, up)


class LoHa(TrainedChange):
    """LoHa, with the initial values of LyCORIS."""

    def __init__(self, weight: Tensor, form: ChangeForm) -> None:
        super().__init__()
        self.scale, rank, device = form.scale, form.rank, weight.device
        rows, columns = len(weight), math.prod(weight.shape[1:])
        self.first_a, self.first_b = _normal((rows, rank), 0.1, device), _normal((rank, columns), 1.0, device)
        self.second_a, self.second_b = _zeros((rows, rank), device), _normal((rank, columns), 1.0, device)

    def change(self) -> Change:
        return Hadamard(Factors(self.first_a, self.first_b), Factors(self.second_a, self.second_b), self.scale)

    def factors(self) -> list[nn.Parameter]:
        return [self.first_a, self.first_b, self.second_a, self.second_b]


class LoKr(TrainedChange):
    """LoKr: a small whole matrix, and one that is low-rank unless it is small too."""

    def __init__(self, weight: Tensor, form: ChangeForm) -> None:
        super().__init__()
        rank, device = form.rank, weight.device
        (rows, more_rows), (columns, more_columns) = (split(side, form.factor) for side in weight.shape[:2])
        self.first = _drawn((rows, columns), device)
        self.whole = rank >= max(more_rows, more_columns) / 2
        self.scale = 1.0 if self.whole else form.scale
        if self.whole:
            self.second = _zeros((more_rows, more_columns, *weight.shape[2:]), device)
        else:
            self.second_a = _drawn((more_rows, rank), device)
            self.second_b = _zeros((rank, more_columns * math.prod(weight.shape[2:])), device)

    def change(self) -> Change:
        second = self.second if self.whole else Factors(self.second_a, self.second_b)
        return Kronecker(self.first, second, self.scale)

    def factors(self) -> list[nn.Parameter]:
        return [self.first, self.second] if self.whole else [self.first, self.second_a, self.second_b]


class DoRA(TrainedChange):
    """Any change with trained norms of the weight's rows."""

    def __init__(self, weight: Tensor, inner: TrainedChange) -> None:
        super().__init__()
        self.inner = inner
        axes = list(range(1, weight.ndim))
        self.norms = nn.Parameter(torch.linalg.vector_norm(weight.detach().float(), dim=axes, keepdim=True))

    def change(self) -> Change:
        return Decomposed(self.inner.change(), self.norms)

    def factors(self) -> list[nn.Parameter]:
        return self.inner.factors()


KINDS: dict[str, type[LoRA | LoHa | LoKr]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}


def new_change(weight: Tensor, form: ChangeForm) -> TrainedChange:
    """A change of a weight that is zero; its other initial values come from PyTorch's generator of the CPU."""
    change = KINDS[form.kind](weight, form)
    return DoRA(weight, change) if form.norms else change


class ChangedLayer(nn.Module):
    """A frozen linear layer or convolution, and the trained change of its weight."""

    def __init__(self, layer: nn.Module, change: TrainedChange) -> None:
        super().__init__()
        self.layer = layer
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.change(x, self.layer)


def product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The output of a linear layer or convolution with another weight, and without its bias."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, None)
    if isinstance(layer, TokenLinear):
        return laid_out_like(F.linear(x.movedim(1, -1), weight).movedim(-1, 1), x)
    return F.linear(x, weight)


@torch.no_grad()
def shrink(change: TrainedChange, weight: Tensor, most: float) -> Tensor:
    """Scale the factors of a change down, all alike, to a norm of at most `most`; the norm before, ()."""
    inner = change.inner if isinstance(change, DoRA) else change
    norm = inner.change().delta(weight).norm()
    part = (most / norm.clamp_min(most)) ** (1 / len(change.factors()))
    for factor in change.factors():
        factor.mul_(part)
    return norm


def split(side: int, most: int | None) -> tuple[int, int]:
    """Two factors of a number, as near to each other as can be; the first, which is the smaller, is at most `most`."""
    highest = math.isqrt(side) if most is None else min(most, math.isqrt(side))
    first = next(number for number in range(highest, 0, -1) if side % number == 0)
    return first, side // first


def _exactly(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _zeros(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))


def _normal(shape: tuple[int, ...], std: float, device: torch.device) -> nn.Parameter:
    return nn.Parameter((std * torch.randn(shape, device="cpu")).to(device))


def _drawn(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    """Uniform values with PyTorch's bound for a linear layer, 1 / √(number of inputs)."""
    bound = math.prod(shape[1:]) ** -0.5
    return nn.Parameter((bound * (2 * torch.rand(shape, device="cpu") - 1)).to(device))
