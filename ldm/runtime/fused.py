"""Fused layers: several small steps in one kernel, which reads memory once. CPUs and GPUs share the classes here.

Each layer has the parameters of the plain layer that it replaces, under the same names, and falls back to the plain
layer's computation where its kernel does not fit the input.

B batch, C channels, H×W height and width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import GEGLU, ResnetBlock

LAST = torch.channels_last


def hooked(layer: nn.Module) -> bool:
    """Whether the layer has forward hooks."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class FusedGroupNorm(nn.GroupNorm):
    """A group norm in two passes over memory: one for the statistics, one for the result."""

    def fits(self, *tensors: Tensor) -> bool:
        """Whether the kernel can compute with these tensors and the weights, and no gradients are wanted."""
        raise NotImplementedError

    def kernel(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        """The norm of `x` (B, C, H, W), channels last, plus an offset (B, C); with `silu`, SiLU of the norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        fits = self.fits(x) and x.is_contiguous(memory_format=LAST)
        return self.kernel(x) if fits else super().forward(x)


class FusedResnetBlock(ResnetBlock):
    """A residual block that computes the sum with the time embedding, group norm and SiLU in one kernel."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(_activated(self.norm1, x))
        offset = None if time is None else self.time_emb_proj(time)
        return self.end(_activated(self.norm2, h, offset), self.conv_shortcut(x))

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        """The last convolution of `h`, added to the skip connection `x`."""
        return x + self.conv2(h)


def _activated(norm: nn.Module, x: Tensor, offset: Tensor | None = None) -> Tensor:
    """SiLU of the norm of `x` (B, C, H, W) plus an offset (B, C)."""
    tensors = (x,) if offset is None else (x, offset)
    last = x.is_contiguous(memory_format=LAST)
    if last and isinstance(norm, FusedGroupNorm) and not hooked(norm) and norm.fits(*tensors):
        return norm.kernel(x, offset, silu=True)
    return F.silu(norm(x if offset is None else x + offset[:, :, None, None]))


class FusedGEGLU(GEGLU):
    """A GEGLU that computes the sum with the bias, GELU and the gating product in one kernel."""

    linear: tuple[type[nn.Module], ...] = (nn.Linear,)  # classes of `proj` whose product without bias is `product`

    def fits(self, *tensors: Tensor) -> bool:
        """Whether the kernel can compute with these tensors and the weights, and no gradients are wanted."""
        raise NotImplementedError

    def kernel(self, x: Tensor, bias: Tensor) -> Tensor:
        """GEGLU of `x` (…, 2 C) plus a bias (2 C,), the first half of the channels times GELU of the second: (…, C)."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """`x` (…, C) times the weights, without bias."""
        return F.linear(x, self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.proj) not in self.linear or hooked(self.proj) or not self.fits(x):
            return super().forward(x)
        return self.kernel(self.product(x), self.proj.bias)
