"""The U-Net that predicts noise, velocity or clean latents from noisy latents: SD 1.x, SD 2.x, SDXL and its refiner.

Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Podell et al. 2023 (arXiv 2307.01952), section 2.

B batch, C channels, H×W height and width of the latents, M text tokens, T text channels, E time embedding channels
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.layers import Downsample, NoAttention, ResnetBlock, Transformer, Upsample


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. `channels`, `depth` and `heads` have an entry for each level, highest resolution first."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # channels of the feature maps
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks in each transformer; 0: the level has no transformers
    mid_depth: int = 1  # transformer blocks in the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads
    layers: int = 2  # residual blocks of a level on the way down; one more on the way up
    text_dim: int = 768  # channels of the text that cross-attention reads
    in_channels: int = 4  # 9: with mask and masked image (inpainting); 8: with the input image (InstructPix2Pix)
    out_channels: int = 4
    linear_projection: bool = False  # transformers project tokens (SD 2, SDXL), not feature maps (SD 1)
    pooled_dim: int = 0  # channels of the pooled text; 0: the model takes no pooled text and no time ids
    size_ids: int = 0  # number of time ids: 6, or 5 for the refiner
    size_dim: int = 256  # sinusoid channels of each time id
    guidance_dim: int = 0  # sinusoid channels of the guidance scale that the U-Net reads (LCM); 0: it reads none
    groups: int = 32  # groups of every group norm
    sample_size: int = 64  # height and width of the latents in training; only a default for pipelines

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not 1 <= levels <= 8 or len(self.depth) != levels or len(self.heads) != levels:
            raise LdmError(
                f"U-Net: channels {self.channels}, depth {self.depth} and heads {self.heads} need one entry for each "
                "level, 1 to 8 levels"
            )
        for name, low, high in (
            ("layers", 1, 16), ("mid_depth", 1, 64), ("text_dim", 1, 65536), ("in_channels", 1, 1024),
            ("out_channels", 1, 1024), ("pooled_dim", 0, 65536), ("size_ids", 0, 64), ("size_dim", 2, 4096),
            ("groups", 1, 1024), ("sample_size", 1, 65536), ("guidance_dim", 0, 4096),
        ):  # fmt: skip
            check_whole("U-Net", name, getattr(self, name), low, high)
        for channels, depth, heads in zip(self.channels, self.depth, self.heads, strict=True):
            check_whole("U-Net", "channels", channels, 2, 16384)
            check_whole("U-Net", "depth", depth, 0, 64)
            check_whole("U-Net", "heads", heads, 1, channels)
            if channels % self.groups or channels % heads:
                raise LdmError(f"U-Net: {channels} channels do not divide into {self.groups} groups and {heads} heads")
        if bool(self.pooled_dim) != bool(self.size_ids):
            raise LdmError(
                f"U-Net: pooled_dim {self.pooled_dim} and size_ids {self.size_ids} go together or not at all"
            )
        if self.channels[0] % 2 or self.size_dim % 2:
            raise LdmError(f"U-Net: sinusoids need even widths, not {self.channels[0]} and {self.size_dim}")
        if self.guidance_dim == 2 or self.guidance_dim % 2:
            raise LdmError(f"U-Net: guidance_dim {self.guidance_dim}: 0, or an even number from 4, is needed")


@dataclass(frozen=True)
class Conditioning:
    """The U-Net's inputs besides noisy latents and timestep."""

    text: Tensor  # (B, M, T): a vector for each token
    pooled: Tensor | None = None  # (B, pooled_dim): a vector for the whole prompt (SDXL)
    size: Tensor | None = (
        None  # (B, size_ids) original height, width, crop top, left, then target height, width or score
    )
    more: Mapping[str, Tensor] = field(default_factory=dict)  # (B, …) each: inputs of a run's patches, by name

    def rows(self, part: slice) -> Conditioning:
        """The conditioning of some rows of the batch."""
        pooled, size = (None if column is None else column[part] for column in (self.pooled, self.size))
        return Conditioning(self.text[part], pooled, size, {name: value[part] for name, value in self.more.items()})


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of `values` (B,) at dim/2 frequencies from 1 down to almost 1/10000: (B, dim), float32.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, with the halves in the order that Stable Diffusion uses.
    """
    exponent = -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=values.device)
    angles = values[:, None].float() * torch.exp(exponent / (dim // 2))[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class Embedding(nn.Module):
    """Two linear layers with SiLU between them, from sinusoids to the time embedding's width E."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeEmbedding(Embedding):
    """Timesteps to the time embedding."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__(dim, time_dim)
        self.dim = dim

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return super().forward(self.inputs(t, dtype))

    def inputs(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """What the first linear layer reads: (B, dim)."""
        return sinusoids(t, self.dim).to(dtype)


class GuidedTimeEmbedding(TimeEmbedding):
    """Timesteps and a guidance scale, the same for all images, to the time embedding.

    Luo et al. 2023 (arXiv 2310.04378), section 4.3; the sinusoids are those of Kingma et al. 2021 (arXiv 2107.00630).
    `scale` is set for one run by the patch `ldm.patches.guidance_embedding`.
    """

    def __init__(self, dim: int, time_dim: int, guidance_dim: int) -> None:
        super().__init__(dim, time_dim)
        self.cond_proj = nn.Linear(guidance_dim, dim, bias=False)
        self.scale = 1.0

    def inputs(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.cond_proj.in_features // 2
        rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = 1000 * (self.scale - 1) * rates
        guidance = torch.cat([torch.sin(angles), torch.cos(angles)]).to(dtype)  # (guidance_dim,)
        return super().inputs(t, dtype) + self.cond_proj(guidance)


class NoEmbedding(nn.Module):
    """Adds nothing to the time embedding, for U-Nets without pooled text and time ids."""

    def forward(self, cond: Conditioning) -> float:
        return 0.0


class SizeEmbedding(Embedding):
    """Pooled text and time ids to an addition to the time embedding (Podell et al. 2023, sections 2.1 and 2.2)."""

    def __init__(self, config: UNetConfig, time_dim: int) -> None:
        super().__init__(config.pooled_dim + config.size_ids * config.size_dim, time_dim)
        self.config = config

    def forward(self, cond: Conditioning) -> Tensor:  # type: ignore[override]
        c = self.config
        shapes = [None if x is None else tuple(x.shape[1:]) for x in (cond.pooled, cond.size)]
        if shapes != [(c.pooled_dim,), (c.size_ids,)] or cond.pooled is None or cond.size is None:
            raise LdmError(
                f"this U-Net needs pooled text (B, {c.pooled_dim}) and {c.size_ids} time ids (B, {c.size_ids}) in its "
                f"conditioning; got {shapes[0]} and {shapes[1]} for each image"
            )
        size = sinusoids(cond.size.flatten(), c.size_dim).view(len(cond.size), -1)  # (B, size_ids · size_dim)
        return super().forward(torch.cat([cond.pooled, size.to(cond.pooled.dtype)], dim=-1))


class DownBlock(nn.Module):
    """One level on the way down; returns its output and the skip tensors for the way up."""

    def __init__(self, config: UNetConfig, level: int, time_dim: int) -> None:
        super().__init__()
        c, out = config, config.channels[level]
        ins = [config.channels[max(level - 1, 0)]] + [out] * (c.layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(i, out, c.groups, 1e-5, time_dim) for i in ins)
        self.attentions = nn.ModuleList(_transformer(c, level) for _ in ins)
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, time), text)
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """The middle: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig, time_dim: int) -> None:
        super().__init__()
        c, width = config, config.channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, c.groups, 1e-5, time_dim) for _ in range(2))
        self.attentions = nn.ModuleList(
            [Transformer(width, c.heads[-1], c.mid_depth, c.text_dim, c.groups, c.linear_projection)]
        )

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), text)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up; removes its skip tensors from the end of the list."""

    def __init__(self, config: UNetConfig, level: int, time_dim: int) -> None:
        super().__init__()
        c, out = config, config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        skips = [out] * c.layers + [config.channels[max(level - 1, 0)]]
        ins = [below] + [out] * c.layers
        self.resnets = nn.ModuleList(
            ResnetBlock(i + skip, out, c.groups, 1e-5, time_dim) for i, skip in zip(ins, skips, strict=True)
        )
        self.attentions = nn.ModuleList(_transformer(c, level) for _ in ins)
        self.upsamplers = nn.ModuleList([Upsample(out)] if level else [])

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1), time), text)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[2:])
        return x


def _transformer(config: UNetConfig, level: int) -> nn.Module:
    c = config
    if not c.depth[level]:
        return NoAttention()
    return Transformer(
        c.channels[level], c.heads[level], c.depth[level], c.text_dim, c.groups, c.linear_projection
    )  # fmt: skip


class UNetHalf(nn.Module):
    """The way down and the middle of a U-Net, with its embedding of the time: what a U-Net and a ControlNet share."""

    precomputable: ClassVar = {"add_embedding": "conditioning"}  # see `ldm.runtime.precomputing`

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, time_dim = config.channels[0], 4 * config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = (
            GuidedTimeEmbedding(first, time_dim, config.guidance_dim)
            if config.guidance_dim
            else TimeEmbedding(first, time_dim)
        )
        self.add_embedding = SizeEmbedding(config, time_dim) if config.pooled_dim else NoEmbedding()
        self.down_blocks = nn.ModuleList(DownBlock(config, level, time_dim) for level in range(len(config.channels)))
        self.mid_block = MidBlock(config, time_dim)

    def embed_time(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Timestep, pooled text and time ids to the time embedding (B, E) that the residual blocks read."""
        return F.silu(self.time_embedding(t.expand(len(x)), x.dtype) + self.add_embedding(cond))


class UNet(UNetHalf):
    """Predicts noise, velocity or clean latents (the prediction type) from noisy latents, timestep and conditioning."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, time_dim = config.channels[0], 4 * config.channels[0]
        levels = reversed(range(len(config.channels)))
        self.up_blocks = nn.ModuleList(UpBlock(config, level, time_dim) for level in levels)
        self.conv_norm_out = nn.GroupNorm(config.groups, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Noisy latents `x` (B, in_channels, H, W) at timestep `t`, () or (B,), in 0 … 999: (B, out_channels, H, W).

        H and W can be any numbers. `x`, `cond.text` and `cond.pooled` have the dtype of the weights.
        """
        time = self.embed_time(x, t, cond)  # (B, E)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, cond.text)
            skips += outputs
        x = self.mid_block(x, time, cond.text)
        for block in self.up_blocks:
            x = block(x, time, cond.text, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
