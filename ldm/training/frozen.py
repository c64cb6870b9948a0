"""Weights that no gradient changes, in 16 or 8 bits.

Autocast rounds the weights of linear layers and convolutions to 16 bits in each pass. Where they stay as they are, they
are rounded once: the results are the same, with half the memory. Those of transformer blocks can be held in 8-bit
integers, which changes results a little.

O output channels, I input channels
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import TransformerBlock
from ldm.models.surgery import exchanged, rebuilt
from ldm.patches.low_rank import Change
from ldm.runtime.merging import Branched, branch, merged
from ldm.training.config import NUMBERS
from ldm.weights.tensors import FLOATS

M = TypeVar("M", bound=nn.Module)
ROUNDED = (nn.Linear, nn.Conv2d)


def numbers(precision: str) -> torch.dtype:
    """The dtype that autocast rounds to, by the name of a precision."""
    return FLOATS[NUMBERS[precision]]


def matrices(network: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of linear layers and convolutions; of those in 8 bits, the biases."""
    for layer in network.modules():
        if isinstance(layer, ROUNDED):
            yield from layer.parameters(recurse=False)
        elif isinstance(layer, EightBitLinear) and layer.bias is not None:
            yield layer.bias


def whole(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that stay in fp32 where matrices are held in 16 bits: norms and embeddings."""
    matrix = {id(parameter) for parameter in matrices(network)}
    for layer in network.modules():
        if not isinstance(layer, EightBitLinear):
            yield from (one for one in layer.parameters(recurse=False) if id(one) not in matrix)


def uniform(network: M, dtype: torch.dtype | None = None) -> M:
    """A copy of a network in one dtype, by default that of its matrices, so that it runs without autocast; what has the
    dtype already is shared, and so are layers in 8 bits, which compute in the dtype that they had."""
    dtype = dtype or next(matrices(network)).dtype

    def cast(module: nn.Module) -> dict[str, nn.Module]:
        return {
            name: copy.deepcopy(part).to(dtype)
            for name, part in module.named_children()
            if not isinstance(part, EightBitLinear)
            and any(parameter.dtype != dtype for parameter in part.parameters(recurse=False))
        }

    return rebuilt(network, cast)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


class EightBitLinear(nn.Module):
    """A frozen linear layer with 8-bit integers and a scale for each row (Dettmers et al. 2022, arXiv 2208.07339,
    section 3.1). Gradients pass through it to its input; its numbers are computed anew for them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        self.scale = _frozen((largest / 127).clamp_min(torch.finfo(torch.float32).tiny))  # (O, 1)
        self.weight = _frozen((weight / self.scale).round().to(torch.int8))  # (O, I)
        self.dtype = weight.dtype
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) to (…, O), in the dtype that the layer had."""
        product: Tensor = _EightBitProduct.apply(x.to(self.dtype), self.weight, self.scale)
        return product if self.bias is None else product + self.bias

    def plain(self) -> nn.Linear:
        """A linear layer with the same numbers."""
        rows, columns = self.weight.shape
        layer = nn.Linear(columns, rows, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = _frozen(_dense(self.weight, self.scale, self.dtype)), self.bias
        return layer


class _EightBitProduct(torch.autograd.Function):
    """A product with a weight (O, I) in 8 bits, which keeps nothing else for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dense(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ _dense(weight, scale, gradient.dtype), None, None


def _dense(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, rounded once."""
    return (weight * scale).to(dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def hold_in_eight_bits(network: nn.Module) -> None:
    """Replace the linear layers of a network's transformer blocks by ones in 8 bits, in place."""
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            for part in list(block.modules()):
                for name, layer in list(part.named_children()):
                    if type(layer) is nn.Linear:
                        setattr(part, name, EightBitLinear(layer))


def changed(network: M, parameter: str, change: Change) -> M:
    """A copy of a network with a changed weight; all else is shared. A layer in 8 bits gets a product beside it."""
    name = parameter.rpartition(".")[0]
    layer = network.get_submodule(name)
    if not isinstance(layer, EightBitLinear):
        return merged(network, {parameter: [(1.0, change)]})
    factors = branch(layer.plain().weight, [(1.0, change)])
    return exchanged(network, {name: Branched(layer, [factor.to(layer.dtype) for factor in factors])})
