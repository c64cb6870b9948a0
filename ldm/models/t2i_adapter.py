"""T2I-Adapter: a small network from a condition image to features that are added on a U-Net's way down.

Mou et al. 2023 (arXiv 2302.08453), section 3. Its three kinds: full, light, and full for SDXL. Attribute names are
diffusers' state-dict keys.

B batch, C channels, H×W height and width of the condition image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole


@dataclass(frozen=True)
class T2IAdapterConfig:
    """The shape of a T2I-Adapter. `channels` and `halves` have an entry for each feature map."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    halves: tuple[bool, ...] = (False, True, True, True)  # which maps have half the sides of the one before
    layers: int = 2  # residual blocks for each feature map
    in_channels: int = 3  # 3: the image's colours; 1: shades of grey
    factor: int = 8  # pixels of the image that go into one place of the first map, along one side
    light: bool = False  # residual blocks have a quarter of the channels

    def __post_init__(self) -> None:
        if not self.channels or len(self.halves) != len(self.channels):
            raise LdmError(
                f"T2I-Adapter: channels {self.channels} and halves {self.halves} need one entry for each map"
            )
        if self.in_channels not in (1, 3):
            raise LdmError(f"T2I-Adapter: in_channels {self.in_channels}: 1 or 3 is needed")
        check_whole("T2I-Adapter", "layers", self.layers, 1, 16)
        check_whole("T2I-Adapter", "factor", self.factor, 1, 64)
        for channels in self.channels:
            check_whole("T2I-Adapter", "channels", channels, 4, 16384)


class ReLUBlock(nn.Module):
    """Two convolutions with ReLU between them and a skip connection."""

    def __init__(self, channels: int, last: int) -> None:
        """`last` is the second convolution's kernel size."""
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, last, padding=last // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(F.relu(self.block1(x))) + x


class FeatureMap(nn.Module):
    """One feature map from the one before: mean of 2×2 places if it halves, then residual blocks."""

    def __init__(self, config: T2IAdapterConfig, channels_in: int, channels: int, halves: bool) -> None:
        super().__init__()
        inner = channels // 4 if config.light else channels
        self.downsample = nn.AvgPool2d(2, 2, ceil_mode=True) if halves else nn.Identity()
        changes = config.light or channels_in != channels
        self.in_conv = nn.Conv2d(channels_in, inner, 1) if changes else nn.Identity()
        self.resnets = nn.Sequential(*(ReLUBlock(inner, 3 if config.light else 1) for _ in range(config.layers)))
        self.out_conv = nn.Conv2d(inner, channels, 1) if config.light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.resnets(self.in_conv(self.downsample(x))))


class Body(nn.Module):
    """The network within diffusers' `T2IAdapter`, whose names begin with `adapter.`."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        pixels = config.in_channels * config.factor**2
        first = pixels if config.light else config.channels[0]
        self.unshuffle = nn.PixelUnshuffle(config.factor)
        self.conv_in = nn.Identity() if config.light else nn.Conv2d(pixels, first, 3, padding=1)
        sizes = zip((first, *config.channels), config.channels, config.halves, strict=False)
        self.body = nn.ModuleList(FeatureMap(config, before, after, halves) for before, after, halves in sizes)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, features = self.conv_in(self.unshuffle(image)), []
        for block in self.body:
            x = block(x)
            features.append(x)
        return features


class T2IAdapter(nn.Module):
    """Features for the levels of a U-Net from a condition image."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = Body(config)

    def forward(self, image: Tensor) -> list[Tensor]:
        """A condition image (B, in_channels, H, W) in [0, 1], sides multiples of the factor: a map for each level."""
        return self.adapter(image)
