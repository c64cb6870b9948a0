"""Inputs of a U-Net's patches that are set before each call, as in training.

In a run, `ldm.runtime.precomputing` replaces the layers that read a patch's inputs by their outputs, for all steps. In
training, the inputs change with each batch, and gradients reach the layers that read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.models.surgery import rebuilt
from ldm.models.unet import UNet
from ldm.runtime.precomputing import RunInput, precomputable_parts

OWN = ("text", "conditioning", "time")  # sources that each call of a U-Net has


class CallInputs:
    """The inputs of the present call by name, (B, …) each.

    They stay until the next call: with gradient checkpointing, the backward pass reads them again.
    """

    def __init__(self) -> None:
        self.values: Mapping[str, Tensor] = {}


class CallInput(nn.Module):
    """The place of a patch's input in the present call."""

    def __init__(self, inputs: CallInputs, name: str) -> None:
        super().__init__()
        self.inputs = inputs
        self.name = name

    def forward(self) -> Tensor:
        return self.inputs.values[self.name]


class LayerOfInput(nn.Module):
    """A layer that reads a patch's input, whatever it is called with."""

    def __init__(self, layer: nn.Module, inputs: CallInputs, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.input = CallInput(inputs, name)

    def forward(self, *_: Any) -> Tensor:
        return self.layer(self.input())


def read_in_calls(unet: UNet, inputs: CallInputs) -> UNet:
    """A copy of a patched U-Net that reads its patches' inputs from `inputs` in each call; all else is shared."""

    def replacements(module: nn.Module) -> dict[str, nn.Module]:
        places = {name: part for name, part in module.named_children() if isinstance(part, RunInput)}
        layers = {name: found for name, found in precomputable_parts(module).items() if found[1] not in OWN}
        return {
            **{name: CallInput(inputs, place.name) for name, place in places.items()},
            **{name: LayerOfInput(layer, inputs, source) for name, (layer, source) in layers.items()},
        }

    return rebuilt(unet, replacements)
