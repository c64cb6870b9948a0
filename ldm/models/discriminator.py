"""The patch discriminator (PatchGAN) of the autoencoder's adversarial loss.

Isola et al. 2017 (arXiv 1611.07004), section 3.2.2, as used by Esser et al. 2021 (arXiv 2012.09841), but with other
norms. Their batch norms have statistics that depend on which images share a rank and a micro-batch, so that 1×8 and 2×4
images would train different networks. Spectral norms change with every forward pass, so they depend on the number of
micro-batches. Group norms see one image at a time.

B batch, H×W height and width of the image, h×w rows and columns of patches: about H/8 × W/8 with 3 layers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole

STD = 0.02  # standard deviation of the initial weights of every convolution


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The shape of a discriminator."""

    channels: int = 64  # channels of the first feature map; each layer doubles them, up to 8 · channels
    layers: int = 3  # convolutions that halve the image; with 3 each patch is 70×70 pixels
    in_channels: int = 3
    groups: int = 32  # groups of every group norm

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("channels", self.channels, 1, 16384), ("layers", self.layers, 1, 8),
            ("in_channels", self.in_channels, 1, 1024), ("groups", self.groups, 1, 1024),
        ):  # fmt: skip
            check_whole("discriminator", name, value, low, high)
        if 2 * self.channels % self.groups:
            raise LdmError(f"discriminator: {2 * self.channels} channels do not divide into {self.groups} groups")

    @property
    def smallest(self) -> int:
        """Height and width in pixels of the smallest image that gives a patch."""
        return 3 * 2**self.layers


class Discriminator(nn.Module):
    """Images (B, in_channels, H, W) to a logit for each patch (B, 1, h, w): positive for patches that look real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**level, 8) for level in range(config.layers + 1)]
        strides = [2] * (config.layers - 1) + [1]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=stride, padding=1, bias=False)  # the norm has a bias
            for i, o, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(config.groups, width) for width in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for conv in (self.conv_in, *self.convs, self.conv_out):
            nn.init.normal_(conv.weight, 0, STD)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raises LdmError if images are smaller than `config.smallest`."""
        if min(x.shape[2:]) < self.config.smallest:
            raise LdmError(
                f"the discriminator needs images of at least {self.config.smallest}×{self.config.smallest} pixels; "
                f"these have {x.shape[2]}×{x.shape[3]}: take larger ones, or fewer layers"
            )
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)
