"""A U-Net for one denoiser: what depends on the conditioning alone is computed at the first step, and kept.

Keys and values of the text are products of the same numbers at every step, as is what pooled text and size ids become.
The layers that make them are replaced in a copy, which shares all else with the U-Net: no forward pass knows of it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from ldm.models.layers import TransformerBlock
from ldm.models.unet import UNet

M = TypeVar("M", bound=nn.Module)


class Kept(nn.Module):
    """A layer that is always given the same: its first result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.result: Any = None

    def forward(self, x: Any) -> Any:
        if self.result is None:
            self.result = self.layer(x)
        return self.result


def prepared(unet: UNet) -> UNet:
    """The same U-Net for calls that differ in latents and time alone, not in batch or conditioning."""
    return replaced(_keeping(unet), add_embedding=Kept(unet.add_embedding))


def _keeping(module: M) -> M:
    """A module whose transformer blocks keep the text's keys and values; the module itself where it has none."""
    if isinstance(module, TransformerBlock):
        cross = module.attn2
        return replaced(module, attn2=replaced(cross, to_k=Kept(cross.to_k), to_v=Kept(cross.to_v)))
    parts = {name: _keeping(part) for name, part in module.named_children()}
    if all(part is getattr(module, name) for name, part in parts.items()):
        return module
    return replaced(module, **parts)


def replaced(module: M, **parts: nn.Module) -> M:
    """A shallow copy of a module with some of its parts replaced."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other
