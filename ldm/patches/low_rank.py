"""Changes of weights by adapters: LoRA, LoHa, LoKr, DoRA and plain differences, multiplied out.

O output channels, I input channels, kh×kw kernel of a convolution, R rank. A change of a linear layer is (O, I), one of
a convolution (O, I, kh, kw); one of a bias (O,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # the least norm by which weights are divided: rows may be zeros


class Change(Protocol):
    """A change of one weight, as an adapter stores it."""

    def delta(self, weight: Tensor) -> Tensor:
        """The adapter's addition to a layer's weight, at a weight of 1: float32, in its shape and on its device."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: a product of two narrow matrices (Hu et al. 2021, arXiv 2106.09685), in convolutions too (LoCon)."""

    up: Tensor  # (O, R), or (O, R, 1, 1)
    down: Tensor  # (R, I), or (R, I, kh, kw); (R, I, 1, 1) with a core
    scale: float = 1.0  # alpha / rank
    core: Tensor | None = None  # (R, R, kh, kw), the core of a Tucker decomposition

    def delta(self, weight: Tensor) -> Tensor:
        up, down = (exact(part.flatten(1), weight.device) for part in (self.up, self.down))
        if self.core is None:
            return ((self.scale * up) @ down).reshape(weight.shape)
        return self.scale * tucker(exact(self.core, weight.device), up.T, down).reshape(weight.shape)


@dataclass(frozen=True)
class Factors:
    """A matrix as a product of two, with a core between them if it is a convolution's Tucker decomposition."""

    a: Tensor  # (O, R); (R, O) with a core
    b: Tensor  # (R, I·kh·kw); (R, I) with a core
    core: Tensor | None = None  # (R, R, kh, kw)

    def product(self, device: torch.device) -> Tensor:
        """The matrix (O, I·kh·kw), or the kernel (O, I, kh, kw), float32."""
        a, b = exact(self.a, device), exact(self.b, device)
        return a @ b if self.core is None else tucker(exact(self.core, device), a, b)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

    first: Factors
    second: Factors
    scale: float = 1.0  # alpha / rank

    def delta(self, weight: Tensor) -> Tensor:
        first, second = (factors.product(weight.device) for factors in (self.first, self.second))
        return self.scale * (first * second).reshape(weight.shape)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, each whole or low-rank (Yeh et al. 2023, arXiv 2309.14859)."""

    first: Tensor | Factors  # (O1, I1)
    second: Tensor | Factors  # (O2, I2), or (O2, I2, kh, kw)
    scale: float = 1.0  # alpha / rank if a factor is low-rank, else 1

    def delta(self, weight: Tensor) -> Tensor:
        first, second = (
            factor.product(weight.device) if isinstance(factor, Factors) else exact(factor, weight.device)
            for factor in (self.first, self.second)
        )
        if weight.ndim == 4:
            kernel = weight.shape[2:]
            second = second.reshape(second.shape[0], -1, *kernel)
            first = first[:, :, None, None]
        else:
            second = second.flatten(1)
        return self.scale * torch.kron(first, second.contiguous()).reshape(weight.shape)


@dataclass(frozen=True)
class Difference:
    """The difference of two weights or biases as it is."""

    value: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        return exact(self.value, weight.device).reshape(weight.shape)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: the sum of weight and change, scaled to learned norms (Liu et al. 2024, arXiv 2402.09353, equation 5).

    An adapter weight other than 1 goes that part of the way from the base's weight to the scaled sum, as the web
    interfaces do. For gradients, the norms of the sum are constants (section 4.3).
    """

    change: Change
    norms: Tensor  # with the weight's number of axes: (O, 1, …), norms over inputs; or (1, I, …), over outputs

    def delta(self, weight: Tensor) -> Tensor:
        base = weight.float()
        moved = base + self.change.delta(weight)
        kept = 1 if self.norms.shape[0] == 1 and self.norms.shape[1] > 1 else 0
        axes = [axis for axis in range(base.ndim) if axis != kept]
        norms = torch.linalg.vector_norm(moved.detach(), dim=axes, keepdim=True).clamp_min(EPS)
        return moved * (exact(self.norms, weight.device) / norms) - base


def add(change: Change, amount: float, weight: Tensor, total: Tensor) -> None:
    """Add the change of a weight, times `amount`, to `total`, in place: float32, in the weight's shape."""
    if isinstance(change, LowRank) and change.core is None and total.is_contiguous():  # in one pass over memory
        up, down = (exact(part.flatten(1), total.device) for part in (change.up, change.down))
        total.view(len(total), -1).addmm_(up, down, alpha=amount * change.scale)
    else:
        total.add_(change.delta(weight), alpha=amount)


def exact(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in float32 on a device."""
    return tensor.to(device, torch.float32)


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The kernel (O, I, kh, kw) of a core (R, S, kh, kw), `outputs` (R, O) and `inputs` (S, I)."""
    return torch.einsum("rskl,ro,si->oikl", core, outputs, inputs)
