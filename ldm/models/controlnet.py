"""ControlNet: a copy of a U-Net's way down that reads a condition image and gives residuals for the U-Net's skips.

Zhang et al. 2023 (arXiv 2302.05543), section 3. Attribute names are diffusers' state-dict keys.

B batch, C channels, H×W height and width of the latents, E×E pixels of the condition image for each latent
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.unet import Conditioning, UNetConfig, UNetHalf


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The shape of a ControlNet: that of its U-Net, and of the condition image's embedding."""

    image_channels: tuple[int, ...] = (16, 32, 96, 256)  # of the embedding's convolutions; sides are halved between
    bgr: bool = False  # condition images are read as blue, green, red
    pooled: bool = False  # residuals are averaged over the map (Shuffle), and left out for negative prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.image_channels) <= 8:
            raise LdmError(f"ControlNet: image_channels {self.image_channels}: 1 to 8 numbers are needed")
        for channels in self.image_channels:
            check_whole("ControlNet", "image_channels", channels, 1, 16384)

    @property
    def factor(self) -> int:
        """Pixels of the condition image for each latent, along one side."""
        return 2 ** (len(self.image_channels) - 1)

    @property
    def skips(self) -> tuple[int, ...]:
        """The channels of the U-Net's skips, from the first to the last."""
        levels = len(self.channels)
        found = [self.channels[0]]
        for level, channels in enumerate(self.channels):
            found += [channels] * (self.layers + (level < levels - 1))
        return tuple(found)


class ImageEmbedding(nn.Module):
    """Convolutions from a condition image to the size and channels of the U-Net's first feature map."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        c = config.image_channels
        self.conv_in = nn.Conv2d(3, c[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            conv
            for small, large in pairwise(c)
            for conv in (nn.Conv2d(small, small, 3, padding=1), nn.Conv2d(small, large, 3, padding=1, stride=2))
        )
        self.conv_out = nn.Conv2d(c[-1], config.channels[0], 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.conv_in(image))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(UNetHalf):
    """Residuals for the skips and the middle of a U-Net, from noisy latents, conditioning and a condition image."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = ImageEmbedding(config)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(channels, channels, 1) for channels in config.skips)
        self.controlnet_mid_block = nn.Conv2d(config.channels[-1], config.channels[-1], 1)
        last = [self.controlnet_cond_embedding.conv_out, *self.controlnet_down_blocks, self.controlnet_mid_block]
        for parameter in nn.ModuleList(last).parameters():
            nn.init.zeros_(parameter)  # so that training begins with the U-Net's own result

    def embed_image(self, image: Tensor) -> Tensor:
        """A condition image (B, 3, E·H, E·W) of red, green and blue in [0, 1] to its embedding (B, C, H, W)."""
        return self.controlnet_cond_embedding(image.flip(1) if self.config.bgr else image)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, image: Tensor) -> list[Tensor]:
        """The residuals for the U-Net's skips, from the first to the last, and then for its middle.

        `x` (B, in_channels, H, W), `t` and `cond` are the U-Net's; `image` (B, C, H, W) is `embed_image`'s result.
        """
        time = self.embed_time(x, t, cond)  # (B, E)
        x = self.conv_in(x) + image
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, cond.text)
            skips += outputs
        x = self.mid_block(x, time, cond.text)
        made = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        made.append(self.controlnet_mid_block(x))
        return [residual.mean((2, 3), keepdim=True) for residual in made] if self.config.pooled else made
