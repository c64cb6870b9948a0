"""Layers that leave small steps to a kernel, which reads memory once for several of them: the part of `on_cpu.py` and
`on_gpu.py` that both share.

Each stands in for the layer that it is made of, with the same parameters under the same names. Where its kernel does
not fit what it is given, it does what that layer does.

B batch, C channels, H×W height and width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import GEGLU, ResnetBlock

LAST = torch.channels_last


def hooked(layer: nn.Module) -> bool:
    """Whether others want to see or change what it is given or gives."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class FusedNorm(nn.GroupNorm):
    """In one pass for the statistics and one for the result."""

    def fits(self, *tensors: Tensor) -> bool:
        """Whether the kernel can compute with these and the layer's own, and nobody wants gradients."""
        raise NotImplementedError

    def kernel(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        """The norm of images (B, C, H, W) that lie channels last, plus an offset (B, C); with `silu`, SiLU of it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        quick = self.fits(x) and x.is_contiguous(memory_format=LAST)
        return self.kernel(x) if quick else super().forward(x)


class FusedResnetBlock(ResnetBlock):
    """With group norm and SiLU as one, which takes the time embedding along."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(_activated(self.norm1, x))
        offset = None if time is None else self.time_emb_proj(time)
        return self.end(_activated(self.norm2, h, offset), self.conv_shortcut(x))

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        """The last convolution of `h`, and the skip connection `x`."""
        return x + self.conv2(h)


def _activated(norm: nn.Module, x: Tensor, offset: Tensor | None = None) -> Tensor:
    """SiLU of the norm of `x` (B, C, H, W) and an offset (B, C)."""
    given = (x,) if offset is None else (x, offset)
    if isinstance(norm, FusedNorm) and not hooked(norm) and norm.fits(*given) and x.is_contiguous(memory_format=LAST):
        return norm.kernel(x, offset, silu=True)
    return F.silu(norm(x if offset is None else x + offset[:, :, None, None]))


class FusedGEGLU(GEGLU):
    """With the bias, GELU and the product as one."""

    known: tuple[type[nn.Module], ...] = (nn.Linear,)  # whose product without bias is `product`

    def fits(self, *tensors: Tensor) -> bool:
        """Whether the kernel can compute with these and the layer's own, and nobody wants gradients."""
        raise NotImplementedError

    def kernel(self, x: Tensor, bias: Tensor) -> Tensor:
        """GELU of the second half of `x` (…, 2 C) plus a bias (2 C,), times the first: (…, C)."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """`x` (…, C) by the weights alone."""
        return F.linear(x, self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.proj) not in self.known or hooked(self.proj) or not self.fits(x):
            return super().forward(x)
        return self.kernel(self.product(x), self.proj.bias)
