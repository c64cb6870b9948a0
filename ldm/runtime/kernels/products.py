"""Convolutions and linear layers with few weights on the CPU, in fp32 or bf16: see `products.cpp`.

All tensors are on the CPU and of one type (`compiled.fits`); images lie channels last.
B batch, C channels, N outputs, H×W height and width, T taps of a convolution
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.runtime.kernels.compiled import call, empty_images, library, threads

MOST, ROWS = 2**20, 1152  # weights of a layer, and pixels or tokens of its input, up to which these kernels pay
PER = {torch.float32: 1, torch.bfloat16: 2}  # channels that are one operand
FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))  # G of F(2×2, 3×3)


def suits(layer: nn.Conv2d | nn.Linear, rows: int) -> bool:
    """Whether the kernels can compute a layer, and are fast at it, for an input of so many pixels or tokens."""
    if isinstance(layer, nn.Linear):
        inputs, taps = layer.in_features, 1
        outputs = layer.out_features
    else:
        inputs, outputs, taps = layer.in_channels, layer.out_channels, layer.kernel_size[0] * layer.kernel_size[1]
        even = layer.stride[0] == layer.stride[1] and not isinstance(layer.padding, str)
        if layer.groups > 1 or layer.dilation != (1, 1) or not even:
            return False
    return inputs % 2 == 0 and inputs * outputs * taps <= MOST and 0 < rows <= ROWS


def filters(layer: nn.Conv2d) -> bool:
    """Whether a layer, which `suits`, can be computed by minimal filtering."""
    shape = (layer.kernel_size, layer.stride, layer.padding)
    return shape == ((3, 3), (1, 1), (1, 1)) and min(layer.in_channels, layer.out_channels) >= 16


def ordered(matrices: Tensor) -> Tensor:
    """Weights (T, C, N) in the kernels' order."""
    lanes, wide = library().lanes(), library().wide()
    whole = F.pad(matrices, (0, -matrices.shape[-1] % lanes))
    panels = whole.split(lanes * wide, dim=-1)
    per = PER[matrices.dtype]
    return torch.cat([panel.unflatten(1, (-1, per)).transpose(2, 3).flatten() for panel in panels])


def taps(weight: Tensor) -> Tensor:
    """Weights (N, C, height, width) of a convolution, or (N, C) of a linear layer, in the kernels' order."""
    return ordered(weight.reshape(*weight.shape[:2], -1).permute(2, 1, 0))


def filtered(weight: Tensor) -> Tensor:
    """Weights (N, C, 3, 3) as the 16 matrices of minimal filtering, each in the kernels' order."""
    left = torch.tensor(FILTER, dtype=torch.float64)
    matrices = torch.einsum("ia,jb,ncab->ijcn", left, left, weight.double()).flatten(0, 1).to(weight.dtype)
    return torch.cat([ordered(matrix[None]) for matrix in matrices])


def phases(weight: Tensor) -> Tensor:
    """Weights (N, C, 3, 3) of a convolution of doubled pixels, as 4 convolutions (N, C, 2, 2) of the pixels themselves.

    They give the even and odd columns of the even rows, then those of the odd rows.
    """
    first, middle, last = weight.double().unbind(2)
    rows = [torch.stack(pair, dim=2) for pair in ((first, middle + last), (first + middle, last))]
    found = []
    for row in rows:
        first, middle, last = row.unbind(3)
        found += [torch.stack(pair, dim=3) for pair in ((first, middle + last), (first + middle, last))]
    return torch.stack([taps(one.to(weight.dtype)) for one in found])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """`x` (…, C), contiguous, times weights that are `taps`, plus a bias: (…, N)."""
    out = x.new_empty(*x.shape[:-1], outputs)
    channels = x.shape[-1]
    rows = x.numel() // channels
    call(
        "product", x.dtype, x, weight, bias, None, out, 1, 1, rows, channels, 1, rows, 1, 1, 1, 0, 0, 1, 0, 0, outputs,
        threads(rows * channels * outputs // 10),
    )  # fmt: skip
    return out


def shape(layer: nn.Conv2d, x: Tensor) -> torch.Size:
    """The shape of a layer's result for `x` (B, C, H, W); the layer `suits`."""
    sides = zip(x.shape[2:], layer.kernel_size, map(int, layer.padding), layer.stride, strict=True)
    return torch.Size(
        (len(x), layer.out_channels, *((side + 2 * pad - size) // stride + 1 for side, size, pad, stride in sides))
    )


def convolution(x: Tensor, weight: Tensor, layer: nn.Conv2d, other: Tensor | None = None) -> Tensor:
    """A layer's convolution of `x` (B, C, H, W) by weights that are `taps`, plus another tensor."""
    batch, channels, height, width = x.shape
    (down, across), (top, left) = layer.kernel_size, map(int, layer.padding)
    _, outputs, high, wide = shape(layer, x)
    out = empty_images(x, outputs, high, wide)
    call(
        "product", x.dtype, x, weight, layer.bias, other, out, batch, height, width, channels, high, wide, down, across,
        layer.stride[0], top, left, 1, 0, 0, outputs, threads(out.numel() * channels * down * across // 10),
    )  # fmt: skip
    return out


def filtering(x: Tensor, weight: Tensor, layer: nn.Conv2d, other: Tensor | None = None) -> Tensor:
    """A layer's convolution of `x` (B, C, H, W) in fp32 by weights that are `filtered`, plus another tensor."""
    batch, channels, height, width = x.shape
    outputs = layer.out_channels
    out = empty_images(x, outputs, height, width)
    tiles, lanes = batch * ((height + 1) // 2) * ((width + 1) // 2), library().lanes()
    turned, sums = x.new_empty(16, tiles, channels), x.new_empty(16, tiles, outputs + -outputs % lanes)
    call(
        "filter", x.dtype, x, weight, layer.bias, other, out, turned, sums, batch, height, width, channels, outputs,
        threads(out.numel() * channels * 4 // 10),
    )  # fmt: skip
    return out


def doubled(x: Tensor, weights: Tensor, layer: nn.Conv2d) -> Tensor:
    """A layer's convolution of doubled pixels of `x` (B, C, H, W) by weights that are `phases`: (B, N, 2 H, 2 W)."""
    batch, channels, height, width = x.shape
    outputs = layer.out_channels
    out = empty_images(x, outputs, 2 * height, 2 * width)
    for phase, weight in enumerate(weights):
        row, column = divmod(phase, 2)
        call(
            "product", x.dtype, x, weight, layer.bias, None, out, batch, height, width, channels, height, width, 2, 2,
            1, 1 - row, 1 - column, 2, row, column, outputs, threads(out.numel() * channels // 10),
        )  # fmt: skip
    return out
