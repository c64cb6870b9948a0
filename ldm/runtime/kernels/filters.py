"""3×3 convolutions of many channels on the CPU, in fp32, by minimal filtering: see `filters.cpp`.

All tensors are on the CPU and in fp32 (`compiled.fits`); images lie channels last.
B batch, C channels, N outputs, H×W height and width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.runtime.kernels.compiled import call, empty_images, library, threads

# Pixels of a result from which these kernels pay: twice as fast as oneDNN at 12×12, 0.7 to 1.2 times at 8×8, as the
# weights are turned at every call. It is the same for all batches, so that an image does not depend on others.
LEAST = 144
# Channels, and outputs, from which they pay: with fewer, the time goes into turning pixels.
FEWEST = 64


def suits(layer: nn.Conv2d, x: Tensor, doubling: int = 1) -> bool:
    """Whether the kernels can compute a layer, and are fast at it, for `x` (B, C, H, W), whose sides are multiplied."""
    simple = layer.groups == 1 and layer.dilation == (1, 1)
    shape = (layer.kernel_size, layer.stride, layer.padding)
    if x.dtype != torch.float32 or not simple or shape != ((3, 3), (1, 1), (1, 1)) or not len(x):
        return False
    whole = layer.in_channels % library().lanes() == 0 and layer.out_channels % library().panel() == 0
    many = min(layer.in_channels, layer.out_channels) >= FEWEST
    return whole and many and x.shape[2:].numel() * doubling**2 >= LEAST


def ordered(weight: Tensor) -> Tensor:
    """Weights (N, C, 3, 3) in the kernels' order."""
    panels = weight.unflatten(0, (-1, library().panel()))
    return panels.permute(0, 2, 3, 4, 1).contiguous()


def unordered(weight: Tensor) -> Tensor:
    """Weights that are `ordered`, as they were (N, C, 3, 3)."""
    return weight.permute(0, 4, 1, 2, 3).flatten(0, 1).contiguous()


def convolution(x: Tensor, weight: Tensor, layer: nn.Conv2d, other: Tensor | None = None, doubling: int = 1) -> Tensor:
    """A layer's convolution of `x` (B, C, H, W) by weights that are `ordered`, plus another tensor.

    `doubling` is 1, or 2 for the convolution of doubled pixels: (B, N, 2 H, 2 W).
    """
    (batch, channels), (height, width) = x.shape[:2], (doubling * side for side in x.shape[2:])
    out = empty_images(x, layer.out_channels, height, width)
    call(
        "filter_many", x.dtype, x, weight, layer.bias, other, out, batch, height, width, channels, layer.out_channels,
        doubling - 1, threads(out.numel() * channels * 9 // 10),
    )  # fmt: skip
    return out
