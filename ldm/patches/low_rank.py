"""Changes of weights by adapters: LoRA, LoHa, LoKr, DoRA and plain differences, multiplied out and added to a network.

O output channels, I input channels, kh×kw kernel of a convolution, R rank. A change of a linear layer is (O, I), one of
a convolution (O, I, kh, kw); one of a bias (O,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ldm.models.surgery import reweighted

M = TypeVar("M", bound=nn.Module)


class Change(Protocol):
    """A change of one weight, as an adapter stores it."""

    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter, at a weight of 1, adds to a layer's weight: float32, in the weight's shape."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: a product of two narrow matrices (Hu et al. 2021, arXiv 2106.09685), in convolutions too (LoCon)."""

    up: Tensor  # (O, R), or (O, R, 1, 1)
    down: Tensor  # (R, I), or (R, I, kh, kw); (R, I, 1, 1) with a core
    scale: float = 1.0  # alpha / rank
    core: Tensor | None = None  # (R, R, kh, kw), the core of a Tucker decomposition

    def delta(self, weight: Tensor) -> Tensor:
        if self.core is not None:
            return self.scale * tucker(self.core, self.up.flatten(1).T, self.down.flatten(1)).reshape(weight.shape)
        return self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float()).reshape(weight.shape)


@dataclass(frozen=True)
class Factors:
    """A matrix as a product of two, with a core between them if it is a convolution's Tucker decomposition."""

    a: Tensor  # (O, R); (R, O) with a core
    b: Tensor  # (R, I·kh·kw); (R, I) with a core
    core: Tensor | None = None  # (R, R, kh, kw)

    def product(self) -> Tensor:
        """The matrix (O, I·kh·kw), or the kernel (O, I, kh, kw), float32."""
        if self.core is None:
            return self.a.float() @ self.b.float()
        return tucker(self.core, self.a, self.b)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

    first: Factors
    second: Factors
    scale: float = 1.0  # alpha / rank

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.first.product() * self.second.product()).reshape(weight.shape)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, each whole or low-rank (Yeh et al. 2023, arXiv 2309.14859)."""

    first: Tensor | Factors  # (O1, I1)
    second: Tensor | Factors  # (O2, I2), or (O2, I2, kh, kw)
    scale: float = 1.0  # alpha / rank if a factor is low-rank, else 1

    def delta(self, weight: Tensor) -> Tensor:
        first, second = (f.product() if isinstance(f, Factors) else f.float() for f in (self.first, self.second))
        if weight.ndim == 4:
            kernel = weight.shape[2:]
            second = second.reshape(second.shape[0], -1, *kernel)
            first = first[:, :, None, None]
        else:
            second = second.flatten(1)
        return self.scale * torch.kron(first, second).reshape(weight.shape)


@dataclass(frozen=True)
class Difference:
    """The difference of two weights or biases as it is."""

    value: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.float().reshape(weight.shape)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: the sum of weight and change, scaled to learned norms (Liu et al. 2024, arXiv 2402.09353, equation 5).

    An adapter weight other than 1 goes that part of the way from the base's weight to the scaled sum, as the web
    interfaces do.
    """

    change: Change
    norms: Tensor  # with the weight's number of axes: (O, 1, …), norms over inputs; or (1, I, …), over outputs

    def delta(self, weight: Tensor) -> Tensor:
        base = weight.float()
        moved = base + self.change.delta(weight)
        kept = 1 if self.norms.shape[0] == 1 and self.norms.shape[1] > 1 else 0
        axes = [axis for axis in range(base.ndim) if axis != kept]
        return moved * (self.norms.float() / moved.norm(dim=axes, keepdim=True)) - base


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The kernel (O, I, kh, kw) of a core (R, S, kh, kw), `outputs` (R, O) and `inputs` (S, I)."""
    return torch.einsum("rskl,ro,si->oikl", core.float(), outputs.float(), inputs.float())


def merged(network: M, changes: Mapping[str, Sequence[tuple[float, Change]]]) -> M:
    """A copy of a network with changed weights; it shares all others, and the network stays as it is.

    `changes` holds, for names of parameters, each adapter's weight and change. Changes of the same weight add; sums are
    in float32, rounded once to the weight's dtype.
    """
    own = dict(network.named_parameters())

    def changed(name: str) -> nn.Parameter:
        weight = own[name]
        total = weight.detach().float()
        for amount, change in changes[name]:
            total = total + amount * change.delta(weight.detach()).to(weight.device)
        return nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)

    return reweighted(network, {name: changed(name) for name in changes})
