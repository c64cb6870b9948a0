"""T2I-Adapters' features, added on a U-Net's way down: after the last transformer of each level, before it shrinks.

Mou et al. 2023 (arXiv 2302.08453), section 3.2. A level without transformers gets them at its end, and one more map, if
there is one, goes to the middle, as in SDXL.

B batch, C channels, H×W height and width of a level's maps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ldm.models.surgery import replaced
from ldm.models.unet import DownBlock, UNet
from ldm.runtime.precomputing import RunInput


@dataclass(frozen=True)
class NamedFeatures:
    """Features of one T2I-Adapter in a run, and the name of their inputs: NAME.0, NAME.1, … (B, C, H, W) each."""

    name: str
    count: int


def add_features(unet: UNet, adapters: Sequence[NamedFeatures]) -> UNet:
    """A U-Net that adds features, which are in `Conditioning.more`."""
    down = list(unet.down_blocks)
    middle: nn.Module = unet.mid_block
    for adapter in adapters:
        for level in range(min(len(down), adapter.count)):
            feature = RunInput(f"{adapter.name}.{level}")
            down[level] = _with_feature(down[level], feature, transformers=unet.config.depth[level] > 0)
        if adapter.count > len(down):
            middle = WithFeature(middle, RunInput(f"{adapter.name}.{len(down)}"))
    return replaced(unet, down_blocks=nn.ModuleList(down), mid_block=middle)


def _with_feature(block: nn.Module, feature: RunInput, transformers: bool) -> nn.Module:
    """A level on the way down that adds a feature."""
    if not transformers:
        return LevelWithFeature(block, feature)
    *others, last = cast("DownBlock", block).attentions
    return replaced(block, attentions=nn.ModuleList([*others, WithFeature(last, feature)]))


class WithFeature(nn.Module):
    """A layer to whose result a feature is added."""

    def __init__(self, layer: nn.Module, feature: RunInput) -> None:
        super().__init__()
        self.layer = layer
        self.feature = feature

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.layer(x, *inputs) + self.feature()


class LevelWithFeature(nn.Module):
    """A level on the way down to whose result, which is its last skip too, a feature is added."""

    def __init__(self, block: nn.Module, feature: RunInput) -> None:
        super().__init__()
        self.block = block
        self.feature = feature

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, skips = self.block(x, time, text)
        x = x + self.feature()
        return x, [*skips[:-1], x]
