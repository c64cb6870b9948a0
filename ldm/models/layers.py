"""The layers of the U-Net and the autoencoder. Attribute names are diffusers' state-dict keys.

B batch, C channels, H×W height and width, N = H·W image tokens, M text tokens, T text channels, E time channels
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import AttentionLayer

M = TypeVar("M", bound=nn.Module)


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """`x` (B, C, H, W) in the memory format of `other`: contiguous or channels last."""
    last = other.is_contiguous(memory_format=torch.channels_last) and not other.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions with a skip connection; between them the time embedding (B, E), if given, is added."""

    precomputable: ClassVar = {"time_emb_proj": "time"}  # parts whose only input is the time embedding

    def __init__(self, channels_in: int, channels_out: int, groups: int, eps: float, time_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(AttentionLayer):
    """Multi-head attention of image tokens on a context: the image tokens or, with `text_dim`, text tokens."""

    def __init__(self, dim: int, heads: int, text_dim: int | None = None) -> None:
        super().__init__(dim, heads)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(text_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(text_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context)))


class CrossAttention(Attention):
    """Multi-head attention of image tokens on text tokens."""

    precomputable: ClassVar = {"to_k": "text", "to_v": "text"}  # parts whose only input is the text


class GEGLU(nn.Module):
    """A linear layer whose first half is multiplied by GELU of its second half (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward layer: GEGLU with four times the width, linear. `net[1]` stands for an unused dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention on the text, feed-forward; each after a layer norm, with a skip connection."""

    def __init__(self, dim: int, heads: int, text_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, heads, text_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x
        x = self.attn2(self.norm2(x), text) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map, with a skip connection around all blocks.

    With `linear`, tokens are projected by a linear layer (SD 2, SDXL), otherwise by a 1×1 convolution (SD 1): the same
    product with another weight shape and another rounding.
    """

    def __init__(self, channels: int, heads: int, depth: int, text_dim: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = TokenLinear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, text_dim) for _ in range(depth))
        self.proj_out = TokenLinear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        h = laid_out_like(tokens.transpose(1, 2).unflatten(2, x.shape[2:]), x)  # (B, C, H, W)
        return self.proj_out(h) + x


class TokenLinear(nn.Linear):
    """A linear layer over the channels of a feature map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return laid_out_like(super().forward(x.movedim(1, -1)).movedim(-1, 1), x)


class NoAttention(nn.Module):
    """The identity in place of a transformer, for levels of the U-Net without attention."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x


class SpatialAttention(AttentionLayer):
    """The autoencoder's attention: self-attention with one head over the pixels of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = self.to_out(self.attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:]) + x  # (B, C, H, W)


class Downsample(nn.Module):
    """Downsampling by 2 with a 3×3 convolution of stride 2.

    The U-Net pads all sides, so that odd sizes are rounded up; the autoencoder (`asymmetric`) pads the right and the
    bottom only, so that odd sizes are rounded down.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if asymmetric else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size` (height, width), then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
