"""Norms, GEGLU and sums on the CPU, in fp32 or bf16, in one pass over memory each: see `layers.cpp`.

All tensors are on the CPU and of one type (`compiled.fits`). B batch, C channels, H×W height and width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.runtime.kernels.compiled import call, empty_images, threads


def group_norm(norm: nn.GroupNorm, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
    """`norm` of images (B, C, H, W) that lie channels last, plus an offset (B, C); with `silu`, SiLU of it.

    Wu and He 2018 (arXiv 1803.08494). Means and variances are in fp64.
    """
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    call(
        "group_norm", x.dtype, x, offset, norm.weight, norm.bias, out, batch, height * width, channels,
        norm.num_groups, norm.eps, silu, threads(x.numel()),
    )  # fmt: skip
    return out


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm` of the last dimension of `x` (…, C), contiguous; Ba et al. 2016 (arXiv 1607.06450)."""
    out, channels = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // channels
    call("layer_norm", x.dtype, x, norm.weight, norm.bias, out, rows, channels, norm.eps, threads(x.numel()))
    return out


def geglu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of the channels of `x` (…, 2 C), contiguous, plus a bias (2 C,), times GELU of the second: (…, C).

    Shazeer 2020 (arXiv 2002.05202).
    """
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    call("geglu", x.dtype, x, bias, out, out.numel() // out.shape[-1], out.shape[-1], threads(x.numel()))
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two tensors that lie in memory in the same order, without gaps."""
    out = torch.empty_like(a)
    call("add", a.dtype, a, b, out, a.numel(), threads(a.numel()))
    return out


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that lies in memory without gaps."""
    out = torch.empty_like(x)
    call("silu", x.dtype, x, out, x.numel(), threads(x.numel()))
    return out


def join(a: Tensor, b: Tensor) -> Tensor:
    """The channels of images (B, C, H, W) that lie channels last, then those of others."""
    (batch, first, height, width), second = a.shape, b.shape[1]
    out = empty_images(a, first + second, height, width)
    rows, size = batch * height * width, a.element_size()
    call("join", a.dtype, a, b, out, rows, first * size, second * size)
    return out
