"""Fused layers for CPUs: they read memory less often, with channels last.

Each layer computes what the plain layer that it replaces computes, up to rounding, and runs the plain layer's own code
where gradients are wanted (`fused.py`). Weights of convolutions, and of products with few rows, are brought once into
the order in which oneDNN multiplies, and are in memory in that order alone (`reordered.py`); otherwise oneDNN reorders
them at each call, which takes as long as a product.

B batch, C channels, H×W height and width
"""

from __future__ import annotations

import copy
import logging
import math
from functools import cache
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import first_line
from ldm.models.layers import GEGLU, ResnetBlock, TokenLinear, Upsample
from ldm.models.surgery import reclassed
from ldm.runtime.fused import LAST, FusedGEGLU, FusedGroupNorm, FusedResnetBlock, hooked
from ldm.runtime.kernels import layers as kernels
from ldm.runtime.kernels.compiled import fits, learns, usable
from ldm.runtime.kernels.memory import keep_freed
from ldm.runtime.reordered import Order, Reordered, stored

log = logging.getLogger(__name__)
onednn = torch.ops.mkldnn


def fuse(model: nn.Module, device: torch.device | None = None) -> None:
    """Replace layers of a network on a CPU by fused ones with the same weights, in place.

    Memory that tensors free stays with the process from then on.

    `device` is where the network will compute, if not where its weights are.
    """
    weight = next(model.parameters())
    if (device or weight.device).type != "cpu" or not works(weight.dtype):
        return
    own: dict[type[nn.Module], type[nn.Module]] = {
        nn.Conv2d: FusedConv2d, Upsample: FusedUpsample, ResnetBlock: CPUResnetBlock,
    }  # fmt: skip
    if weight.dtype == torch.bfloat16 and usable():
        own |= {nn.GroupNorm: CPUGroupNorm, GEGLU: CPUGEGLU, nn.Linear: OneDNNLinear, TokenLinear: OneDNNTokenLinear}
    reclassed(model, own)
    keep_freed()


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether PyTorch's private oneDNN operators compute correctly in that type here, tried on a few numbers."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        plain = Upsample(4).to(dtype)
        x = torch.randn(1, 4, 3, 3).to(dtype)
        fused = copy.deepcopy(plain)
        reclassed(fused, {Upsample: FusedUpsample, nn.Conv2d: FusedConv2d})
        try:
            if dtype == torch.bfloat16 and not onednn._is_mkldnn_bf16_supported():
                return False
            found = fused(x, torch.Size((6, 6)))
            found = cast("FusedConv2d", fused.conv).plus(found, found)
            if dtype == torch.bfloat16:
                onednn._linear_pointwise(x[0, 0], onednn._reorder_linear_weight(x[0, 1], 3), None, "none", [], "")
        except (AttributeError, RuntimeError, TypeError) as error:
            log.warning("fused layers are not used: %s", first_line(error))
            return False
        wanted = plain(x, torch.Size((6, 6)))
        return torch.allclose(found, plain.conv(wanted) + wanted, atol=2e-2, rtol=2e-2)


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    """Padding, stride, dilation and groups, in the order of oneDNN's operators."""
    return layer.padding, layer.stride, layer.dilation, layer.groups


def _ordered(weight: Tensor, layer: nn.Conv2d, shape: list[int]) -> Tensor:
    return onednn._reorder_convolution_weight(weight.contiguous(memory_format=LAST), *_geometry(layer), shape)


def doubling(weight: Tensor) -> Tensor:
    """Weights (C, C, 4, 4) of the transposed convolution that equals a 3×3 convolution of doubled pixels."""
    flipped = weight.float().flip(2, 3)
    total = flipped.new_zeros(*weight.shape[:2], 4, 4)
    for row in (0, 1):
        for column in (0, 1):
            total[:, :, row : row + 3, column : column + 3] += flipped
    return total.transpose(0, 1).to(weight.dtype, memory_format=LAST)


FEW = 384  # rows of an input, up to which a reordered copy of the weights pays
DOUBLING = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # padding, padding of the output, stride, dilation, groups
convolutions = Order(_ordered, Tensor.to_dense)
matrices = Order(
    lambda weight, layer, shape: onednn._reorder_linear_weight(weight, math.prod(shape[:-1])), Tensor.to_dense
)
doublings = Order(
    lambda weight, layer, shape: onednn._reorder_convolution_transpose_weight(doubling(weight), *DOUBLING, shape)
)


def _fusible(layer: nn.Module, *tensors: Tensor) -> TypeGuard[FusedConv2d]:
    """Whether a layer is a `FusedConv2d`, unchanged, of the tensors' type, and no gradients are wanted.

    The layer may have been replaced by an adapter since, or been given hooks or another padding.
    """
    if not isinstance(layer, FusedConv2d) or layer.padding_mode != "zeros":
        return False
    weight = stored(layer)
    if hooked(layer) or learns(weight, *tensors):
        return False
    single = any(tensor.shape[2:].numel() == 1 for tensor in tensors)  # one pixel: older oneDNN versions fail
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return known and not single and all(tensor.dtype == weight.dtype for tensor in tensors)


class FusedConv2d(nn.Conv2d):
    """A convolution with reordered weights, which can add another tensor to its result in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fusible(self, x):
            return super().forward(x)
        x = x.contiguous(memory_format=LAST)
        weight = convolutions.of(self, x)
        return onednn._convolution_pointwise(x, weight, self.bias, *_geometry(self), "none", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution of `x` plus `other`, both (B, C, H, W), if `_fusible` says so."""
        x, other = x.contiguous(memory_format=LAST), other.contiguous(memory_format=LAST)
        weight = convolutions.of(self, x)
        return onednn._convolution_pointwise.binary(
            x, other, weight, self.bias, *_geometry(self), "add", None, None, [], None
        )


class FusedUpsample(Upsample):
    """Doubling and convolution as one transposed convolution of 4×4.

    Equal pixels are multiplied once: 16 products in place of 36.
    """

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        doubled = tuple(size) == tuple(2 * side for side in x.shape[2:])
        if not doubled or not _fusible(self.conv, x):
            return super().forward(x, size)
        x = x.contiguous(memory_format=LAST)
        weight = doublings.of(self.conv, x)
        return onednn._convolution_transpose_pointwise(x, weight, self.conv.bias, *DOUBLING, "none", [], "")


class CPUGroupNorm(FusedGroupNorm):
    """A group norm by the C++ kernel, in bf16."""

    def fits(self, *tensors: Tensor) -> bool:
        return fits(*tensors, self.weight)

    def kernel(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        return kernels.group_norm(self, x, offset, silu)


class CPUResnetBlock(FusedResnetBlock):
    """A residual block that also adds the skip connection within the last convolution."""

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        return self.conv2.plus(h, x) if _fusible(self.conv2, h, x) else super().end(h, x)


def _reorders(layer: nn.Linear, x: Tensor) -> bool:
    """Whether `x` (…, C) is multiplied by reordered weights: it has few rows, or no other weights are in memory."""
    few = x.numel() <= FEW * x.shape[-1]
    return (few or type(stored(layer)) is Reordered) and _fits(layer, x)


def _fits(layer: nn.Linear, *tensors: Tensor) -> bool:
    """Whether these and a layer's weight are plain bf16 tensors on the CPU, and no gradients are wanted."""
    weight = stored(layer)
    if type(weight) is not Reordered:
        return fits(*tensors, weight)
    same = all(tensor.dtype == weight.dtype for tensor in tensors)
    return same and fits(*tensors) and not learns(weight)


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies few rows by reordered weights; for many rows, reordering costs little."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` (…, C) times the weights, plus a bias if there is one."""
        if not _reorders(self, x):
            return F.linear(x, self.weight, bias)
        return onednn._linear_pointwise(x, matrices.of(self, x), bias, "none", [], "")


class OneDNNTokenLinear(TokenLinear, OneDNNLinear):
    """A `OneDNNLinear` over the channels of a map."""


class CPUGEGLU(FusedGEGLU):
    """A GEGLU by the C++ kernel, in bf16."""

    linear = (nn.Linear, OneDNNLinear)

    def product(self, x: Tensor) -> Tensor:
        return OneDNNLinear.product(self.proj, x)  # type: ignore[arg-type]

    def fits(self, *tensors: Tensor) -> bool:
        return _fits(self.proj, *tensors)

    def kernel(self, x: Tensor, bias: Tensor) -> Tensor:
        return kernels.geglu(x, bias)
