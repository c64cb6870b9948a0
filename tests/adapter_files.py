"""Adapter files for tiny models, with random numbers, in the names of any format."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.weights.adapters import Adapter
from ldm.weights.adapters.names import NAMINGS, Place, written
from ldm.weights.components import Components

Chosen = Callable[[Place], bool]
RANK = 4


def attention(place: Place) -> bool:
    """The layers that LoRAs usually change: attention in the U-Net and in text towers."""
    return ".attn" in place.layer or "self_attn" in place.layer


def everything(place: Place) -> bool:
    return True


def weight(model: Components, place: Place) -> Tensor:
    """The weight of a layer."""
    return model.modules()[place.component].get_parameter(f"{place.layer}.weight").detach()


def matrices(model: Components, naming: str, chosen: Chosen = attention) -> dict[str, Tensor]:
    """The weights of linear layers and convolutions, by their layers' names in a format."""
    assert naming in NAMINGS
    found = {name: weight(model, place) for place, name in written(model, naming).items() if chosen(place)}
    return {name: value for name, value in found.items() if value.ndim > 1 and "embedding" not in name.split("_")[-2:]}


def lora(value: Tensor, endings: tuple[str, str] = ("lora_down.weight", "lora_up.weight")) -> dict[str, Tensor]:
    """Tensors of a LoRA of a weight, by ending."""
    down, up = endings
    ones = [1] * (value.ndim - 2)
    return {down: torch.randn(RANK, *value.shape[1:]) / 8, up: torch.randn(len(value), RANK, *ones) / 8}


def adapter(
    model: Components, naming: str, make: Callable[[Tensor], dict[str, Tensor]] = lora, chosen: Chosen = attention
) -> dict[str, Tensor]:
    """The tensors of an adapter by name; `make` gives those of one weight by ending."""
    return {
        f"{name}.{ending}": tensor
        for name, value in matrices(model, naming, chosen).items()
        for ending, tensor in make(value).items()
    }


def saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def deltas(found: Adapter, model: Components) -> dict[str, Tensor]:
    """The change of every parameter that an adapter makes in a model, by component and name."""
    modules = model.modules()
    return {
        f"{component}.{name}": change.delta(modules[component].get_parameter(name).detach())
        for component, changes in found.changes.items()
        for name, change in changes.items()
    }


def alpha(number: float) -> Tensor:
    return torch.tensor(float(number))


def columns(value: Tensor) -> int:
    """Columns of a weight as a matrix."""
    return math.prod(value.shape[1:])
