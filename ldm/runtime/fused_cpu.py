"""What makes images quicker on a CPU: layers that read memory less often, for images that lie channels last.

Each gives the numbers of the layer that it stands in for, but for rounding (`quick.py`). Where gradients are wanted it
does what that layer does. Of weights there is a copy in the order that oneDNN multiplies in, which it would otherwise
make at each call, for convolutions and for products of few rows: there, that takes as long as the product.

B batch, C channels, H×W height and width
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.errors import first_line
from ldm.models.layers import GEGLU, ResnetBlock, TokenLinear, Upsample
from ldm.models.surgery import reclassed
from ldm.runtime.fused import LAST, FusedGEGLU, FusedNorm, FusedResnetBlock, hooked
from ldm.runtime.kernels import layers as kernels
from ldm.runtime.kernels.compiled import fits, learns, usable
from ldm.runtime.kernels.memory import keep_freed

log = logging.getLogger(__name__)
onednn = torch.ops.mkldnn


def quicken(model: nn.Module, device: torch.device | None = None) -> None:
    """Put quicker layers in the place of a network's own, if that is a CPU; they stay its weights. And let this process
    keep memory that tensors give back.

    `device` is where the network will compute, if not where its weights are.
    """
    weight = next(model.parameters())
    if (device or weight.device).type != "cpu" or not works(weight.dtype):
        return
    own: dict[type[nn.Module], type[nn.Module]] = {
        nn.Conv2d: QuickConv2d, Upsample: QuickUpsample, ResnetBlock: QuickResnetBlock,
    }  # fmt: skip
    if weight.dtype == torch.bfloat16 and usable():
        own |= {nn.GroupNorm: QuickNorm, GEGLU: QuickGEGLU, nn.Linear: QuickLinear, TokenLinear: QuickTokenLinear}
    reclassed(model, own)
    keep_freed()


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in that type here, by operators that PyTorch keeps to itself: tried on a few numbers."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        plain = Upsample(4).to(dtype)
        x = torch.randn(1, 4, 3, 3).to(dtype)
        quick = copy.deepcopy(plain)
        quick.__class__, quick.conv.__class__ = QuickUpsample, QuickConv2d
        try:
            if dtype == torch.bfloat16 and not onednn._is_mkldnn_bf16_supported():
                return False
            found = quick(x, torch.Size((6, 6)))
            found = cast("QuickConv2d", quick.conv).plus(found, found)
            if dtype == torch.bfloat16:
                onednn._linear_pointwise(x[0, 0], onednn._reorder_linear_weight(x[0, 1], 3), None, "none", [], "")
        except (AttributeError, RuntimeError, TypeError) as error:
            log.warning("without quick layers: %s", first_line(error))
            return False
        wanted = plain(x, torch.Size((6, 6)))
        return torch.allclose(found, plain.conv(wanted) + wanted, atol=2e-2, rtol=2e-2)


class Copies:
    """Copies of weights in oneDNN's order, which are made again when the weights have changed, and go with them."""

    def __init__(self, make: Callable[[Tensor, Any, list[int]], Tensor]) -> None:
        self.make = make  # from weights, their layer, and the shape of its input
        self.made: Any = WeakTensorKeyDictionary()

    def of(self, layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
        """That of a layer which is given `x`; with another shape it does as well."""
        weight = layer.weight
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype)
        found = self.made.get(weight)
        if found is None or found[0] != state:
            self.made[weight] = found = (state, self.make(weight.detach(), layer, list(x.shape)))
        return found[1]


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    """Padding, stride, dilation and groups, in the order of oneDNN's operators."""
    return layer.padding, layer.stride, layer.dilation, layer.groups


def _ordered(weight: Tensor, layer: nn.Conv2d, shape: list[int]) -> Tensor:
    return onednn._reorder_convolution_weight(weight.contiguous(memory_format=LAST), *_geometry(layer), shape)


def doubling(weight: Tensor) -> Tensor:
    """Of a 3×3 convolution, the transposed one of stride 2 that equals it on doubled pixels: (C, C, 4, 4)."""
    flipped = weight.float().flip(2, 3)
    total = flipped.new_zeros(*weight.shape[:2], 4, 4)
    for row in (0, 1):
        for column in (0, 1):
            total[:, :, row : row + 3, column : column + 3] += flipped
    return total.transpose(0, 1).to(weight.dtype, memory_format=LAST)


FEW = 384  # rows of a product whose weights are worth a copy
DOUBLING = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # its padding, that of the output, stride, dilation, groups
convolutions = Copies(_ordered)
matrices = Copies(lambda weight, layer, shape: onednn._reorder_linear_weight(weight, math.prod(shape[:-1])))
doublings = Copies(
    lambda weight, layer, shape: onednn._reorder_convolution_transpose_weight(doubling(weight), *DOUBLING, shape)
)


def _quick(layer: nn.Module, *tensors: Tensor) -> TypeGuard[QuickConv2d]:
    """Whether a convolution is ours and as it was, gradients are not wanted, and it is given what it computes in.

    Others may have put an adapter in its place, hooks on it, or another padding.
    """
    if not isinstance(layer, QuickConv2d) or layer.padding_mode != "zeros":
        return False
    if hooked(layer) or learns(layer.weight, *tensors):
        return False
    single = any(tensor.shape[2:].numel() == 1 for tensor in tensors)  # pixels, which older versions have no order for
    return not single and all(tensor.dtype == layer.weight.dtype for tensor in tensors)


class QuickConv2d(nn.Conv2d):
    """A convolution that can add something to its result."""

    def forward(self, x: Tensor) -> Tensor:
        if not _quick(self, x):
            return super().forward(x)
        x = x.contiguous(memory_format=LAST)
        weight = convolutions.of(self, x)
        return onednn._convolution_pointwise(x, weight, self.bias, *_geometry(self), "none", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution of `x`, and `other`, both (B, C, H, W), where it is `_quick`."""
        x, other = x.contiguous(memory_format=LAST), other.contiguous(memory_format=LAST)
        weight = convolutions.of(self, x)
        return onednn._convolution_pointwise.binary(
            x, other, weight, self.bias, *_geometry(self), "add", None, None, [], None
        )


class QuickUpsample(Upsample):
    """Doubling and convolution as one transposed convolution of 4×4, in which equal pixels are multiplied once: 16
    products in place of 36."""

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        doubled = tuple(size) == tuple(2 * side for side in x.shape[2:])
        if not doubled or not _quick(self.conv, x):
            return super().forward(x, size)
        x = x.contiguous(memory_format=LAST)
        weight = doublings.of(self.conv, x)
        return onednn._convolution_transpose_pointwise(x, weight, self.conv.bias, *DOUBLING, "none", [], "")


class QuickNorm(FusedNorm):
    """By our own kernel, in bf16."""

    def fits(self, *tensors: Tensor) -> bool:
        return fits(*tensors, self.weight)

    def kernel(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        return kernels.group_norm(self, x, offset, silu)


class QuickResnetBlock(FusedResnetBlock):
    """With the last convolution and the sum as one, too."""

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        return self.conv2.plus(h, x) if _quick(self.conv2, h, x) else super().end(h, x)


class QuickLinear(nn.Linear):
    """With few rows, by weights in oneDNN's order; with many, it takes no longer to make that at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` (…, C) by the weights, and a bias."""
        rows = x.numel() // x.shape[-1]
        if rows > FEW or not fits(x, self.weight):
            return F.linear(x, self.weight, bias)
        return onednn._linear_pointwise(x, matrices.of(self, x), bias, "none", [], "")


class QuickTokenLinear(TokenLinear, QuickLinear):
    """Likewise, over the channels of a map."""


class QuickGEGLU(FusedGEGLU):
    """By our own kernel, in bf16."""

    known = (nn.Linear, QuickLinear)

    def product(self, x: Tensor) -> Tensor:
        return QuickLinear.product(self.proj, x)  # type: ignore[arg-type]

    def fits(self, *tensors: Tensor) -> bool:
        return fits(*tensors, self.proj.weight)

    def kernel(self, x: Tensor, bias: Tensor) -> Tensor:
        return kernels.geglu(x, bias)
