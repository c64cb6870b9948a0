"""A U-Net for one denoiser: what depends on the conditioning alone is computed before the first step.

Keys and values of the text are products of the same numbers at every step, as is what pooled text and size ids become.
The layers that make them are replaced in a copy, which shares all else with the U-Net: no forward pass knows of it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from ldm.models.layers import TransformerBlock
from ldm.models.unet import Conditioning, SizeEmbedding, UNet

M = TypeVar("M", bound=nn.Module)


class Given(nn.Module):
    """In the place of a layer that is always given the same: its result."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Any) -> Tensor:
        return self.result


def known(module: nn.Module) -> list[Tensor]:
    """All that is given in a module."""
    return [layer.result for layer in module.modules() if isinstance(layer, Given)]


def prepared(unet: UNet, cond: Conditioning) -> UNet:
    """The same U-Net for calls with this conditioning alone, which differ in latents and time."""
    size = unet.add_embedding
    given = {"add_embedding": Given(size(cond))} if isinstance(size, SizeEmbedding) else {}
    return replaced(_knowing(unet, cond.text), **given)


def _knowing(module: M, text: Tensor) -> M:
    """A module whose transformer blocks know the text's keys and values; the module itself where it has none."""
    if isinstance(module, TransformerBlock):
        cross = module.attn2
        given = {name: Given(getattr(cross, name)(text)) for name in ("to_k", "to_v")}
        return replaced(module, attn2=replaced(cross, **given))
    parts = {name: _knowing(part, text) for name, part in module.named_children()}
    if all(part is getattr(module, name) for name, part in parts.items()):
        return module
    return replaced(module, **parts)


def replaced(module: M, **parts: nn.Module) -> M:
    """A shallow copy of a module with some of its parts replaced."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other
