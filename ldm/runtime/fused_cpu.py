"""Fused layers for CPUs: they read memory less often, with channels last.

Each layer computes what the plain layer that it replaces computes, up to rounding, and runs the plain layer's own code
where gradients are wanted (`fused.py`). Small layers, and large 3×3 convolutions in fp32, are computed by our own
kernels, others by oneDNN. Weights of convolutions, and of products with few rows, are brought once into the order in
which they are multiplied (`reordered.py`); otherwise oneDNN reorders them at each call, which takes as long as a
product.

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
from ldm.runtime.kernels import filters, products
from ldm.runtime.kernels import layers as kernels
from ldm.runtime.kernels.compiled import fits, learns, multiplies, usable
from ldm.runtime.kernels.memory import give_back_beside, keep_freed
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
    if usable():
        own |= {
            nn.GroupNorm: CPUGroupNorm, nn.LayerNorm: CPULayerNorm, GEGLU: CPUGEGLU, nn.Linear: CPULinear,
            TokenLinear: CPUTokenLinear,
        }  # fmt: skip
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
            layer = cast("FusedConv2d", fused.conv)
            found = _doubled(layer, x.contiguous(memory_format=LAST))
            found = _convolved(layer, found, found)
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
own_taps = Order(lambda weight, layer, shape: products.taps(weight))
own_filters = Order(lambda weight, layer, shape: products.filtered(weight))
large_filters = Order(lambda weight, layer, shape: filters.ordered(weight), filters.unordered)
own_phases = Order(lambda weight, layer, shape: products.phases(weight))


def _fusible(layer: nn.Module, *tensors: Tensor) -> TypeGuard[FusedConv2d]:
    """Whether a layer is a `FusedConv2d`, unchanged, that fits the tensors, its input first: see `_fits`.

    The layer may have been replaced by an adapter since, or been given hooks or another padding.
    """
    if not isinstance(layer, FusedConv2d) or layer.padding_mode != "zeros" or hooked(layer):
        return False
    if isinstance(layer.padding, str):
        return False
    single = any(tensor.shape[2:].numel() == 1 for tensor in tensors)  # one pixel: older oneDNN versions fail
    images = tensors[0].dim() == 4 and tensors[0].shape[1] == layer.in_channels
    return images and not single and _fits(layer, *tensors)


def _own(layer: nn.Conv2d | nn.Linear, x: Tensor, other: Tensor | None = None) -> bool:
    """Whether our own kernels compute a product of `x` with a layer's weights, plus another tensor; all of them fit."""
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if not products.suits(layer, x.numel() // channels) or not multiplies(x.dtype):
        return False
    return other is None or other.shape == products.shape(cast("nn.Conv2d", layer), x)


def _own_convolved(layer: nn.Conv2d, x: Tensor, other: Tensor | None = None) -> Tensor:
    """A layer's convolution of `x` by our own kernels, plus another tensor."""
    if x.dtype == torch.float32 and products.filters(layer):
        return products.filtering(x, own_filters.of(layer, x), layer, other)
    return products.convolution(x, own_taps.of(layer, x), layer, other)


def _convolved(layer: nn.Conv2d, x: Tensor, other: Tensor | None = None) -> Tensor:
    """A layer's convolution of `x` by oneDNN, or if it is large by our own kernels, plus another tensor."""
    alike = other is None or other.shape == (len(x), layer.out_channels, *x.shape[2:])
    if alike and usable() and filters.suits(layer, x):
        return filters.convolution(x, large_filters.of(layer, x), layer, other)
    weight, bias, geometry = convolutions.of(layer, x), layer.bias, _geometry(layer)
    if other is None:
        return onednn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
    return onednn._convolution_pointwise.binary(x, other, weight, bias, *geometry, "add", None, None, [], None)


def _doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A layer's convolution of the doubled pixels of `x` by oneDNN, or if it is large by our own kernels."""
    if usable() and filters.suits(layer, x, doubling=2):
        return filters.convolution(x, large_filters.of(layer, x), layer, doubling=2)
    weight = doublings.of(layer, x)
    return onednn._convolution_transpose_pointwise(x, weight, layer.bias, *DOUBLING, "none", [], "")


class FusedConv2d(nn.Conv2d):
    """A convolution with reordered weights, which can add another tensor to its result in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fusible(self, x):
            return super().forward(x)
        x = x.contiguous(memory_format=LAST)
        return _own_convolved(self, x) if _own(self, x) else _convolved(self, x)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution of `x` plus `other`, both (B, C, H, W), if `_fusible` says so."""
        x, other = x.contiguous(memory_format=LAST), other.contiguous(memory_format=LAST)
        return _own_convolved(self, x, other) if _own(self, x, other) else _convolved(self, x, other)


class FusedUpsample(Upsample):
    """Doubling and convolution as one transposed convolution of 4×4, or as 4 convolutions of 2×2.

    Equal pixels are multiplied once: 16 products in place of 36. Minimal filtering of large ones makes 9 of them.
    """

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        doubled = tuple(size) == tuple(2 * side for side in x.shape[2:])
        if not doubled or not _fusible(self.conv, x):
            return super().forward(x, size)
        x = x.contiguous(memory_format=LAST)
        if _own(self.conv, x):
            return products.doubled(x, own_phases.of(self.conv, x), self.conv)
        return give_back_beside(_doubled(self.conv, x))


class CPUGroupNorm(FusedGroupNorm):
    """A group norm by the C++ kernel."""

    def fits(self, *tensors: Tensor) -> bool:
        x, *offsets = tensors
        shapes = x.dim() == 4 and x.shape[1] == self.num_channels and all(one.shape == x.shape[:2] for one in offsets)
        dense = all(one.is_contiguous() for one in offsets)
        return shapes and dense and self.affine and fits(*tensors, self.weight, self.bias)

    def kernel(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        return kernels.group_norm(self, x, offset, silu)


class CPUResnetBlock(FusedResnetBlock):
    """A residual block that also adds the skip connection within the last convolution."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        found = super().forward(x, time)
        return found if found.shape == x.shape else give_back_beside(found)

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        return self.conv2.plus(h, x) if _fusible(self.conv2, h, x) else super().end(h, x)


class CPULayerNorm(nn.LayerNorm):
    """A layer norm of the last dimension by the C++ kernel."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.shape[-1:] != self.normalized_shape or self.weight is None or self.bias is None
        if plain or not fits(x, self.weight, self.bias) or not x.is_contiguous():
            return super().forward(x)
        return kernels.layer_norm(self, x)


def _reorders(layer: nn.Linear, x: Tensor) -> bool:
    """Whether `x` (…, C) is multiplied by oneDNN with reordered weights.

    In bf16 it is, if it has few rows, or no other weights are in memory.
    """
    few = x.numel() <= FEW * x.shape[-1]
    return x.dtype == torch.bfloat16 and (few or type(stored(layer)) is Reordered)


def _fits(layer: nn.Linear | nn.Conv2d, *tensors: Tensor) -> bool:
    """Whether these and a layer's weights are plain tensors on the CPU, of one type, and no gradients are wanted.

    Kernels get places in memory, and check nothing: what does not fit is left to PyTorch's operators, which say so.
    """
    weight = stored(layer)
    given = tensors if layer.bias is None else (*tensors, layer.bias)
    if type(weight) is not Reordered:
        return fits(*given, weight)
    same = all(tensor.dtype == weight.dtype for tensor in given)
    return same and fits(*given) and not learns(cast("Tensor", weight))


class CPULinear(nn.Linear):
    """A linear layer by our own kernel, or in bf16 with few rows by oneDNN with reordered weights.

    For many rows, reordering costs little.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` (…, C) times the weights, plus a bias if there is one."""
        if not x.numel() or x.shape[-1:] != (self.in_features,) or not _fits(self, x):
            return F.linear(x, self.weight, bias)
        if _own(self, x):
            return products.linear(x.contiguous(), own_taps.of(self, x), bias, self.out_features)
        if not _reorders(self, x):
            return F.linear(x, self.weight, bias)
        return onednn._linear_pointwise(x, matrices.of(self, x), bias, "none", [], "")


class CPUTokenLinear(TokenLinear, CPULinear):
    """A `CPULinear` over the channels of a map."""


class CPUGEGLU(FusedGEGLU):
    """A GEGLU by the C++ kernel."""

    linear = (nn.Linear, CPULinear)

    def product(self, x: Tensor) -> Tensor:
        return CPULinear.product(self.proj, x)  # type: ignore[arg-type]

    def fits(self, *tensors: Tensor) -> bool:
        return self.proj.bias is not None and _fits(self.proj, *tensors)

    def kernel(self, x: Tensor, bias: Tensor) -> Tensor:
        return kernels.geglu(x, bias)
