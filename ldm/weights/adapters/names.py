"""The names of a model's layers in each format of adapters.

A naming gives, for a model, the name of every layer in one format: the beginning of the names of its tensors, whose
endings are in `layers.py`. It serves reading, and the other way round writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ldm.models.text import TextEncoders
from ldm.weights import layouts
from ldm.weights.components import Components
from ldm.weights.layouts import Layout


@dataclass(frozen=True)
class Place:
    """A layer of a model."""

    component: str  # "unet", "text_encoder" or "text_encoder_2"
    layer: str  # its name in the network


Named = Iterator[tuple[str, Place]]  # the names of layers in a file


def _layers(component: str, network: nn.Module, layout: Layout, prefix: str, dot: str = ".") -> Named:
    """Names of a network's layers: those of a layout, with a prefix, and `dot` in place of the dots."""
    weights = [name for name, _ in network.named_parameters() if name.endswith(".weight")]
    for link in layout(weights):
        name = link.theirs.removesuffix(".weight").replace(".", dot)
        yield prefix + name, Place(component, link.ours[0].removesuffix(".weight"))


def towers(model: Components) -> dict[str, nn.Module]:
    """The text towers of a model by component."""
    encoders = model.networks.get("text_encoders")
    if not isinstance(encoders, TextEncoders):
        return {}
    return {config.component: tower for config, tower in zip(encoders.configs, encoders.towers, strict=True)}


def parameter_of(model: Components, component: str, name: str) -> tuple[str, str]:
    """The network in `model.networks` that holds a component's parameter, and the parameter's name there."""
    if component not in (own := list(towers(model))):
        return component, name
    return "text_encoders", f"towers.{own.index(component)}.{name}"


def _diffusers(model: Components) -> Named:
    """diffusers' names with the component first: `unet.mid_block.attentions.0.proj_in`."""
    yield from _layers("unet", model.unet, layouts.diffusers, "unet.")
    for component, tower in towers(model).items():
        yield from _layers(component, tower, layouts.transformers, f"{component}.")
        yield from _layers(component, tower, layouts.transformers_flat, f"{component}.")


def _kohya(model: Components) -> Named:
    """sd-scripts' names for SD 1.x and 2.x: diffusers' with underscores, `lora_unet_mid_block_attentions_0_proj_in`."""
    yield from _layers("unet", model.unet, layouts.diffusers, "lora_unet_", "_")
    yield from _kohya_towers(model)


def _kohya_sgm(model: Components) -> Named:
    """sd-scripts' names for SDXL: the original U-Net's with underscores, `lora_unet_middle_block_1_proj_in`."""
    yield from _layers("unet", model.unet, layouts.original_unet(model.family.unet, ""), "lora_unet_", "_")
    yield from _kohya_towers(model)


def _kohya_towers(model: Components) -> Named:
    prefixes = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"} if model.family.xl else {}
    for component, tower in towers(model).items():
        yield from _layers(component, tower, layouts.transformers, prefixes.get(component, "lora_te_"), "_")


def _lycoris(model: Components) -> Named:
    """LyCORIS' names for a network alone: `lycoris_mid_block_attentions_0_proj_in`."""
    yield from _layers("unet", model.unet, layouts.diffusers, "lycoris_", "_")
    for component, tower in towers(model).items():
        yield from _layers(component, tower, layouts.transformers, "lycoris_", "_")


def _peft(model: Components) -> Named:
    """peft's names, which do not say which network is meant: `base_model.model.mid_block.attentions.0.proj_in`."""
    for name, place in _bare(model):
        yield f"base_model.model.{name}", place


def _bare(model: Components) -> Named:
    """diffusers' and transformers' names alone."""
    yield from _layers("unet", model.unet, layouts.diffusers, "")
    for component, tower in towers(model).items():
        yield from _layers(component, tower, layouts.transformers, "")
        yield from _layers(component, tower, layouts.transformers_flat, "")


def _comfy(model: Components) -> Named:
    """ComfyUI's names: `diffusion_model.middle_block.1.proj_in`, `text_encoders.clip_l.transformer.text_model.…`."""
    yield from _layers("unet", model.unet, layouts.original_unet(model.family.unet, ""), "diffusion_model.")
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    for component, tower in towers(model).items():
        name = encoders[component] if model.family.xl or not model.family.text[0].open_clip else "clip_h"
        yield from _layers(component, tower, layouts.transformers, f"text_encoders.{name}.transformer.")


NAMINGS: dict[str, Callable[[Components], Named]] = {
    "diffusers": _diffusers,
    "kohya": _kohya,
    "kohya-sgm": _kohya_sgm,
    "LyCORIS": _lycoris,
    "peft": _peft,
    "diffusers without prefix": _bare,
    "ComfyUI": _comfy,
}


def written(model: Components, naming: str) -> dict[Place, str]:
    """The name of every layer in one format, a key of `NAMINGS`."""
    names: dict[Place, str] = {}
    for name, place in NAMINGS[naming](model):
        names.setdefault(place, name)  # the usual name is the first
    return names


def read(model: Components) -> dict[str, list[tuple[str, Place]]]:
    """For every name in any format: the format, and the layers that it can mean.

    Names without the component may mean a layer of either text tower.
    """
    found: dict[str, list[tuple[str, Place]]] = {}
    for naming, named in NAMINGS.items():
        for name, place in named(model):
            found.setdefault(name, []).append((naming, place))
    return found


# --- names of earlier versions ----------------------------------------------------------------------------------------

_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_ADAPTER = re.compile(r"(.+\.lora_(?:A|B|magnitude_vector|embedding_A|embedding_B))\.default(?:_\d+)?(\..+)?")
_TOWER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def modern(name: str) -> str:
    """A tensor's name, of diffusers before 0.22 (attention processors) or with peft's `default`, as it is today."""
    if old := _PROCESSOR.fullmatch(name):
        start, layer, part = old.groups()
        layer = _TOWER[layer] if start.endswith(".self_attn") else layer.replace("to_out", "to_out.0")
        return f"{start}.{layer}.lora.{part}.weight"
    if named := _ADAPTER.fullmatch(name):
        return named[1] + (named[2] or "")
    return name
