"""IP-Adapter: image features as tokens, and the keys and values by which cross-attention reads them.

Ye et al. 2023 (arXiv 2308.06721). Attribute names are diffusers' state-dict keys.

B images, P patches of an image, F channels of the image encoder's features, Q tokens, D channels of the resampler,
T channels of the tokens, which are those of text tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.attention import AttentionLayer
from ldm.models.layers import CrossAttention
from ldm.models.unet import UNet


@dataclass(frozen=True)
class ImagePromptConfig:
    """The shape of an IP-Adapter."""

    kind: str  # of projection: "base", "plus" (resampler) or "full" (every patch)
    features: int  # F
    text_dim: int  # T
    tokens: int = 4  # Q; those of "full" are as many as the encoder's patches
    width: int = 0  # D of "plus"
    heads: int = 1  # of "plus"
    depth: int = 0  # blocks of "plus"
    inner: int = 0  # channels within the feed-forward layers of "plus"

    def __post_init__(self) -> None:
        if self.kind not in ("base", "plus", "full"):
            raise LdmError(f"IP-Adapter: kind {self.kind!r}; base, plus or full is needed")
        for name, low, high in (("features", 1, 16384), ("text_dim", 1, 65536), ("tokens", 1, 4096)):
            check_whole("IP-Adapter", name, getattr(self, name), low, high)
        if self.kind == "plus":
            for name, low, high in (("width", 1, 16384), ("heads", 1, 256), ("depth", 1, 64), ("inner", 1, 65536)):
                check_whole("IP-Adapter", name, getattr(self, name), low, high)

    @property
    def reads_patches(self) -> bool:
        """Whether it reads the patches in the encoder's last layer but one, and not the embedding of the image."""
        return self.kind != "base"


class ImageProjection(nn.Module):
    """The embedding of an image to tokens."""

    def __init__(self, config: ImagePromptConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.image_embeds = nn.Linear(config.features, config.tokens * config.text_dim)
        self.norm = nn.LayerNorm(config.text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) to (B, Q, T)."""
        return self.norm(self.image_embeds(x).unflatten(-1, (self.tokens, -1)))


class GELULinear(nn.Module):
    """A linear layer and GELU."""

    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class GELUFeedForward(nn.Module):
    """Two linear layers with GELU between them. `net[1]` stands for an unused dropout."""

    def __init__(self, dim: int, inner: int, out: int, bias: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(GELULinear(dim, inner, bias), nn.Identity(), nn.Linear(inner, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PatchProjection(nn.Module):
    """Every patch to a token (the full-face IP-Adapter)."""

    def __init__(self, config: ImagePromptConfig) -> None:
        super().__init__()
        self.ff = GELUFeedForward(config.features, config.features, config.text_dim, bias=True)
        self.norm = nn.LayerNorm(config.text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, F) to (B, P, T)."""
        return self.norm(self.ff(x))


class ResamplerAttention(AttentionLayer):
    """Attention of the tokens on the patches and themselves."""

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__(inner, heads)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context)))


class ResamplerBlock(nn.Module):
    """Attention and feed-forward layer, each with a skip connection."""

    def __init__(self, config: ImagePromptConfig) -> None:
        super().__init__()
        width = config.width
        self.ln0, self.ln1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = ResamplerAttention(width, HEAD * config.heads, config.heads)
        self.ff = nn.Sequential(nn.LayerNorm(width), GELUFeedForward(width, config.inner, width, bias=False))

    def forward(self, patches: Tensor, tokens: Tensor) -> Tensor:
        read = self.ln1(tokens)
        tokens = self.attn(read, torch.cat([self.ln0(patches), read], dim=1)) + tokens
        return self.ff(tokens) + tokens


HEAD = 64  # channels of each head in the released resamplers


class Resampler(nn.Module):
    """Patches to a few tokens, which attend to them (the IP-Adapter "plus"; Alayrac et al. 2022, arXiv 2204.14198)."""

    def __init__(self, config: ImagePromptConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, config.tokens, config.width) / config.width**0.5)
        self.proj_in = nn.Linear(config.features, config.width)
        self.layers = nn.ModuleList(ResamplerBlock(config) for _ in range(config.depth))
        self.proj_out = nn.Linear(config.width, config.text_dim)
        self.norm_out = nn.LayerNorm(config.text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, F) to (B, Q, T)."""
        patches, tokens = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for block in self.layers:
            tokens = block(patches, tokens)
        return self.norm_out(self.proj_out(tokens))


class ImageKeysValues(nn.Module):
    """Keys and values of image tokens for one cross-attention with `dim` channels."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(text_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(text_dim, dim, bias=False)


class ImagePromptAdapter(nn.Module):
    """A projection of image features, and keys and values for each of a U-Net's `attentions`, in their order."""

    def __init__(self, config: ImagePromptConfig, widths: Sequence[int]) -> None:
        """`widths` are the channels of the U-Net's cross-attentions."""
        super().__init__()
        kinds = {"base": ImageProjection, "plus": Resampler, "full": PatchProjection}
        self.config = config
        self.projection = kinds[config.kind](config)
        self.layers = nn.ModuleList(ImageKeysValues(config.text_dim, width) for width in widths)


def attentions(unet: UNet) -> list[tuple[CrossAttention, int]]:
    """The cross-attentions of a U-Net and their levels, in the order of IP-Adapters: down, up, middle."""
    last = len(unet.config.channels) - 1
    places = [*enumerate(unet.down_blocks), *((last - up, block) for up, block in enumerate(unet.up_blocks))]
    return [
        (layer, level)
        for level, block in (*places, (last, unet.mid_block))
        for layer in block.modules()
        if isinstance(layer, CrossAttention)
    ]
