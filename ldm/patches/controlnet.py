"""ControlNets beside a U-Net: their residuals are added to its skips before the way up, and to its middle.

Zhang et al. 2023 (arXiv 2302.05543), section 3.2. The middle and the levels on the way up are wrapped by ones that add
the residuals, so that the U-Net's forward pass does not change. Residuals of several ControlNets add.

B batch, C channels, H×W height and width of the latents, R residuals: one for each skip, then the middle's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.models.controlnet import ControlNet
from ldm.models.surgery import replaced
from ldm.models.unet import Conditioning, UNet
from ldm.runtime.precomputing import RunInput


@dataclass(frozen=True)
class NamedControlNet:
    """A ControlNet of one run, and the name of its inputs: NAME.image (B, C, H, W), embedded; NAME.scales (B, R)."""

    network: ControlNet
    name: str


def add_controlnets(unet: UNet, controls: Sequence[NamedControlNet]) -> UNet:
    """A U-Net with ControlNets, whose inputs are in `Conditioning.more`."""
    residuals = Residuals()
    count = unet.config.layers + 1
    other = replaced(
        unet,
        controls=nn.ModuleList(ScaledControlNet(one.network, one.name) for one in controls),
        mid_block=ControlledMiddle(unet.mid_block, residuals),
        up_blocks=nn.ModuleList(ControlledUpLevel(block, residuals, count) for block in unet.up_blocks),
    )
    other.residuals = residuals  # type: ignore[assignment]
    other.__class__ = _controlled(type(unet))  # type: ignore[arg-type]
    return other


class Residuals:
    """The sums of the ControlNets' residuals in the present call: for each skip of the U-Net, then for its middle."""

    of_one_call: ClassVar = True  # each call fills it anew: calls of several runs can be made together

    def __init__(self) -> None:
        self.sums: list[Tensor] = []


class ScaledControlNet(nn.Module):
    """A ControlNet whose residuals are multiplied by scales of each row."""

    def __init__(self, network: ControlNet, name: str) -> None:
        super().__init__()
        self.network = network
        self.image = RunInput(f"{name}.image")
        self.scales = RunInput(f"{name}.scales")

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> list[Tensor]:
        latents = x[:, : self.network.config.in_channels]  # without the mask and image that some U-Nets read
        residuals = self.network(latents, t, cond, self.image())
        scales = self.scales().T[..., None, None, None]  # (R, B, 1, 1, 1)
        return [residual * scale for residual, scale in zip(residuals, scales, strict=True)]


class ControlledUNet(UNet):
    """A U-Net whose ControlNets compute their residuals first."""

    controls: nn.ModuleList
    residuals: Residuals

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        made = [control(x, t, cond) for control in self.controls]
        self.residuals.sums = [reduce(torch.add, same) for same in zip(*made, strict=True)]
        result = super().forward(x, t, cond)
        self.residuals.sums = []
        return result


@cache
def _controlled(kind: type[UNet]) -> type[ControlledUNet]:
    """The class of a U-Net of some kind with ControlNets; one that records its steps records them together."""
    return ControlledUNet if kind is UNet else type(f"Controlled{kind.__name__}", (kind, ControlledUNet), {})


class ControlledMiddle(nn.Module):
    """The middle of a U-Net, to whose result the last residual is added."""

    def __init__(self, block: nn.Module, residuals: Residuals) -> None:
        super().__init__()
        self.block = block
        self.residuals = residuals

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.block(x, time, text) + self.residuals.sums[-1]


class ControlledUpLevel(nn.Module):
    """A level on the way up, which adds residuals to the skips that it removes."""

    def __init__(self, block: nn.Module, residuals: Residuals, count: int) -> None:
        """`count` is the number of skips that the level removes."""
        super().__init__()
        self.block = block
        self.residuals = residuals
        self.count = count

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for place in range(len(skips) - self.count, len(skips)):
            skips[place] = skips[place] + self.residuals.sums[place]
        return self.block(x, time, text, skips)
