"""Group norm and GEGLU in bf16 on processors with AVX-512 BF16, in one pass over memory each: see `layers.cpp`.

B batch, C channels, H×W height and width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.runtime.kernels.compiled import library, threads


def group_norm(norm: nn.GroupNorm, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
    """`norm` of images (B, C, H, W) that lie channels last, plus an offset (B, C); with `silu`, SiLU of it.

    Wu and He 2018 (arXiv 1803.08494). All in bf16 on the CPU (`compiled.fits`); means and variances are in fp64.
    """
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    library().group_norm(
        x.data_ptr(), None if offset is None else offset.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(),
        out.data_ptr(), batch, height * width, channels, norm.num_groups, norm.eps, silu, threads(x.numel()),
    )  # fmt: skip
    return out


def geglu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of the channels of `x` (…, 2 C), contiguous, plus a bias (2 C,), times GELU of the second: (…, C).

    Shazeer 2020 (arXiv 2002.05202). All in bf16 on the CPU.
    """
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    library().geglu(
        x.data_ptr(), bias.data_ptr(), out.data_ptr(), out.numel() // out.shape[-1], out.shape[-1], threads(x.numel())
    )
    return out
