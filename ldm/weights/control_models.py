"""Control models as files: ControlNets and T2I-Adapters, told apart by their tensors.

Read are diffusers' folders, and single files with diffusers' names or those of the authors (a ControlNet's may begin
with `control_model.`, and lie in a file with a whole model). Files without a configuration get that of the known family
whose shapes they have.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from os import PathLike
from pathlib import Path

import torch

from ldm.errors import LdmError
from ldm.families import FAMILIES, Family
from ldm.files import Progress, check_digest, read_json, silent
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.unet import UNetConfig
from ldm.models.unfilled import unfilled
from ldm.weights import configs, layouts
from ldm.weights.builtin import builtin_adapter
from ldm.weights.components import ComponentSource, fill_alone, is_adapter
from ldm.weights.folder import store_of, weight_files
from ldm.weights.hub import fetch
from ldm.weights.layouts import Link
from ldm.weights.manifest import check_manifest
from ldm.weights.names import HUB_ID
from ldm.weights.tensors import TensorInfo, open_store

log = logging.getLogger(__name__)
ControlModel = ControlNet | T2IAdapter
Infos = Mapping[str, TensorInfo]
PREFIX = "control_model."  # of a ControlNet in its authors' files

# names of tensors -> control models that exist and are not read here
OTHERS = {
    "lora_controlnet": "a Control-LoRA",
    "task_embedding": "a ControlNet Union, with several kinds of images in one",
    "control_add_embedding": "a ControlNet Union, with several kinds of images in one",
    "lllite_": "a ControlNet-LLLite",
    "difference": "a ControlNet kept as a difference to a model",
    "ip_adapter.": "an IP-Adapter, which goes to ip_adapter= (--ip-adapter)",
    "image_proj.": "an IP-Adapter, which goes to ip_adapter= (--ip-adapter)",
}


@dataclass(frozen=True)
class OpenedControlModel:
    """A control model on disk that fits a model. Names and shapes are checked, no tensor is loaded."""

    source: str
    network: ControlModel  # on the meta device
    part: ComponentSource
    links: list[Link]

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> ControlModel:
        """Load the weights into the network by memory-mapping, as `dtype` or in the stored type.

        Raises:
            LdmError: a weight is not a finite number, or the device cannot be used.
        """
        fill_alone(self.source, self.network, self.links, self.part.store, dtype, device)
        return self.network


def open_control_model(
    source: str | PathLike[str],
    family: Family,
    *,
    allow_pickle: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> OpenedControlModel:
    """Open a ControlNet or a T2I-Adapter for models of a family, without loading weights.

    `source` is a diffusers folder, a file, or a Hub name; the other arguments are those of
    `ldm.weights.sources.open_source`.

    Raises:
        LdmError: the source is no control model that is read here, is damaged, or was made for another family.
    """
    path = builtin_adapter(source) or Path(source)
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = fetch(str(source), allow_pickle=allow_pickle, progress=progress, component="controlnet")
    if not path.exists():
        raise LdmError(f"{path} does not exist; give a control model's folder, file or Hub name (owner/name)")
    try:
        return _opened(path, family, allow_pickle, verify, progress)
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror or error}") from None


def _opened(path: Path, family: Family, allow_pickle: bool, verify: bool, progress: Progress) -> OpenedControlModel:
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise LdmError(f"{path} is no control model's folder: config.json is missing")
        json = read_json(file)
        store = store_of(weight_files(path, "controlnet", None, allow_pickle), allow_pickle)
        t2i = json.get("_class_name") in configs.T2I_CLASSES
        config = configs.read_t2i_adapter(str(file), json) if t2i else configs.read_controlnet(str(file), json)
    else:
        store = open_store(path, allow_pickle)
        _check_kind(path, store.infos)
        config = config_of(path, store.infos, family)
    if verify and not (path.is_dir() and check_manifest(path, store.files, progress)):
        for one in store.files:
            check_digest(one, progress=progress)
    with unfilled():
        network = T2IAdapter(config) if isinstance(config, T2IAdapterConfig) else ControlNet(config)
    part = ComponentSource(store, names_of(config))
    links = part.links(network)
    check_fits(path, config, family)
    return OpenedControlModel(str(path), network, part, links)


def names_of(config: ControlNetConfig | T2IAdapterConfig) -> list[tuple[str, layouts.Layout]]:
    """The layouts in which a control model's tensors may be named, each with the prefix of its names."""
    if isinstance(config, T2IAdapterConfig):
        return [("", layouts.diffusers), ("", layouts.original_t2i_adapter(config))]
    original = [(prefix, layouts.original_controlnet(config, prefix)) for prefix in ("", PREFIX)]
    return [("", layouts.diffusers), *original]


# --- what a file is ---------------------------------------------------------------------------------------------------


def _check_kind(path: Path, infos: Infos) -> None:
    """Raise unless the tensors are those of a ControlNet or a T2I-Adapter."""
    for mark, kind in OTHERS.items():
        if any(name.startswith(mark) or f".{mark}" in name for name in infos):
            raise LdmError(f"{path} is {kind}; ControlNets and T2I-Adapters are read here")
    if _is_controlnet(infos) or _is_t2i_adapter(infos):
        return
    what = "it holds neither's tensors"
    if is_adapter(infos):
        what = "it is a LoRA or the like, which goes to adapters= (--lora)"
    elif any(name.startswith(layouts.UNET_PREFIX) for name in infos) or "conv_out.weight" in infos:
        what = "it is a model, which goes to source (--model)"
    raise LdmError(f"{path} is no ControlNet and no T2I-Adapter: {what}")


def _is_controlnet(infos: Infos) -> bool:
    return any(name in infos for name in ("controlnet_mid_block.weight", f"{PREFIX}middle_block_out.0.weight")) or (
        "middle_block_out.0.weight" in infos
    )


def _is_t2i_adapter(infos: Infos) -> bool:
    return any(re.fullmatch(r"(adapter\.)?body\.0\.((body|resnets)\.0\.)?block1\.weight", name) for name in infos)


def config_of(path: Path, infos: Infos, family: Family) -> ControlNetConfig | T2IAdapterConfig:
    """The configuration of a file without one, from its tensors' shapes and those of a model's or a known family.

    Raises:
        LdmError: no family's shapes are those of the tensors; the message has the differences to the model's.
    """
    if _is_t2i_adapter(infos):
        return _own_t2i_config(infos, family) or _t2i_config(path, infos)
    pooled = "shuffle" in path.stem.lower()  # its configuration says so, of which the file has none
    if pooled:
        log.warning("%s: its residuals are averaged over the image, as its name says (shuffle)", path)
    channels = _image_channels(infos)
    candidates = [controlnet_config(one.unet, channels, pooled) for one in (family, *FAMILIES.values())]
    for config in candidates:
        if _holds(infos, config):
            return config
    return candidates[0]  # whose differences are named when the tensors are looked up


def _holds(infos: Infos, config: ControlNetConfig | T2IAdapterConfig) -> bool:
    """Whether the tensors are those of a control model with this configuration, in one of its layouts."""
    with torch.device("meta"):
        network = T2IAdapter(config) if isinstance(config, T2IAdapterConfig) else ControlNet(config)
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    return any(
        all(link.theirs in infos and infos[link.theirs].shape == link.shape(shapes) for link in layout(shapes))
        for _, layout in names_of(config)
    )


def _own_t2i_config(infos: Infos, family: Family) -> T2IAdapterConfig | None:
    """The configuration of a T2I-Adapter that was trained here for models of a family, if the tensors are its."""
    blocks = sum(name.endswith("block1.weight") for name in infos)
    try:
        layers = blocks // len(t2i_config(family).channels)
        candidates = [t2i_config(family, channels, layers) for channels in (3, 1)]
    except LdmError:  # the family has none, or none with so few blocks
        return None
    return next((config for config in candidates if _holds(infos, config)), None)


def controlnet_config(unet: UNetConfig, image_channels: tuple[int, ...], pooled: bool = False) -> ControlNetConfig:
    """The configuration of a ControlNet for a U-Net."""
    own = {field.name: getattr(unet, field.name) for field in fields(UNetConfig)}
    # without the mask and image that some U-Nets read, and the guidance scale that LCMs read
    own |= {"in_channels": unet.out_channels, "guidance_dim": 0}
    return ControlNetConfig(**own, image_channels=image_channels, pooled=pooled)


def _image_channels(infos: Infos) -> tuple[int, ...]:
    """The channels of a ControlNet's image embedding."""
    place = re.compile(
        rf"(?:{re.escape(PREFIX)})?(?:input_hint_block|controlnet_cond_embedding)\.(conv_in|blocks\.\d+|\d+)\.weight"
    )
    found = {match[1]: infos[name].shape[0] for name in infos if (match := place.fullmatch(name))}
    numbers = sorted(int(name.removeprefix("blocks.")) for name in found if name != "conv_in")
    if "conv_in" in found:
        return (found["conv_in"], *(found[f"blocks.{number}"] for number in numbers[1::2]))
    return tuple(found[str(number)] for number in numbers[:-1:2]) or (16, 32, 96, 256)


def _t2i_config(path: Path, infos: Infos) -> T2IAdapterConfig:
    """The configuration of a T2I-Adapter, from its tensors alone."""
    shapes = {name.removeprefix("adapter."): info.shape for name, info in infos.items()}
    light = "conv_in.weight" not in shapes
    blocks = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("body.")})
    inner = {
        int(m[1]) for name in shapes if (m := re.fullmatch(r"body\.0\.(?:body|resnets)\.(\d+)\.block1\.weight", name))
    }
    layers = len(inner) or len(blocks) // 4  # the authors' full ones have four levels, all blocks in one row
    try:
        pixels = shapes["body.0.in_conv.weight" if light else "conv_in.weight"][1]
        in_channels, factor = {192: (3, 8), 64: (1, 8), 768: (3, 16), 256: (1, 16)}[pixels]
        if light:
            channels = [shapes[f"body.{block}.out_conv.weight"][0] for block in blocks]
        elif inner:
            channels = [shapes[f"body.{block}.resnets.0.block1.weight"][0] for block in blocks]
        else:
            channels = [shapes[f"body.{block}.block1.weight"][0] for block in blocks[::layers]]
    except (KeyError, IndexError, ValueError):
        raise LdmError(f"{path}: its tensors are those of no known T2I-Adapter (full, light, SDXL)") from None
    halves = configs.t2i_halves(len(channels), factor == 16)
    return T2IAdapterConfig(tuple(channels), halves, layers, in_channels, factor, light)


def t2i_config(family: Family, in_channels: int = 3, layers: int = 2) -> T2IAdapterConfig:
    """The configuration of a full T2I-Adapter for models of a family; for SDXL's with a map for the middle.

    Raises:
        LdmError: diffusers has no T2I-Adapter for such models.
    """
    unet, scales = family.unet, _scales(family)
    for count in (len(scales), len(scales) - 1):
        own = scales[:count]
        halves = (False, *(after > before for before, after in pairwise(own)))
        if halves in (configs.t2i_halves(count, False), configs.t2i_halves(count, True)):
            channels = (*unet.channels, unet.channels[-1])[:count]
            return T2IAdapterConfig(channels, halves, layers, in_channels, own[0])
    raise LdmError(f"no T2I-Adapter has maps for the levels of {_named(family)}; take a ControlNet")


# --- which models it fits ---------------------------------------------------------------------------------------------


def check_fits(path: Path | str, config: ControlNetConfig | T2IAdapterConfig, family: Family) -> None:
    """Raise unless a control model fits models of a family.

    Raises:
        LdmError: it does not; the message says which families it was made for.
    """
    if fits(config, family):
        return
    known = [name for name, one in FAMILIES.items() if fits(config, one)]
    kind = "T2I-Adapter" if isinstance(config, T2IAdapterConfig) else "ControlNet"
    made = f"for {', '.join(known)}" if known else "for no family known here"
    raise LdmError(f"{path} is a {kind} {made}; the model is {_named(family)}: take one that was made for it")


def _named(family: Family) -> str:
    """A family's name, or that of a known one with the same widths."""
    if family.name in FAMILIES:
        return family.name
    return f"of a family of its own, with {family.unet.channels} channels and {family.unet.text_dim} of text"


def fits(config: ControlNetConfig | T2IAdapterConfig, family: Family) -> bool:
    """True if a control model's shapes are those that models of a family need."""
    unet, factor = family.unet, family.autoencoder.factor
    if isinstance(config, ControlNetConfig):
        same = ("channels", "layers", "text_dim", "pooled_dim", "size_ids", "size_dim")
        alike = all(getattr(config, name) == getattr(unet, name) for name in same)
        return alike and config.in_channels == unet.out_channels and config.factor == factor
    last, scales = len(unet.channels) - 1, _scales(family)
    own = [config.factor * 2**count for count in accumulate(int(half) for half in config.halves)]
    channels = (*unet.channels, unet.channels[-1])
    count = len(own)
    return last < count <= last + 2 and own == scales[:count] and config.channels == channels[:count]


def _scales(family: Family) -> list[int]:
    """Pixels for each place of a U-Net's maps that get features, along one side: those of its levels and its middle."""
    depths, factor = family.unet.depth, family.autoencoder.factor
    last = len(depths) - 1
    # a level without transformers gets its map after it has halved the sides
    levels = [factor * 2 ** (level + (depth == 0 and level < last)) for level, depth in enumerate(depths)]
    return [*levels, factor * 2**last]
