"""IP-Adapters as files: the authors' (`image_proj.…`, `ip_adapter.…`), as safetensors or as pickles with two groups.

Resamplers may also have diffusers' names. Which projection a file has, and its shape, are told by its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch

from ldm.errors import LdmError, listing
from ldm.families import Family
from ldm.files import check_digest, file_digest
from ldm.models.image_prompt import HEAD, ImagePromptAdapter, ImagePromptConfig, attentions
from ldm.models.unet import UNet
from ldm.models.unfilled import unfilled
from ldm.weights.adapters.origin import WIDTHS
from ldm.weights.builtin import builtin_adapter
from ldm.weights.components import ComponentSource, fill_alone, is_adapter
from ldm.weights.folder import write_weights
from ldm.weights.hub import fetch_file
from ldm.weights.layouts import UNET_PREFIX, Link
from ldm.weights.names import HUB_FILE
from ldm.weights.tensors import TensorInfo, open_store

Infos = Mapping[str, TensorInfo]
PROJECTION, LAYERS = "image_proj.", "ip_adapter."
_OTHERS = {  # names of tensors within a file -> what it is
    "perceiver_resampler.": "a FaceID IP-Adapter (plus)",
    "to_q_lora.": "a FaceID IP-Adapter",
    "aggregate_": "an InstantID adapter",
}


@dataclass(frozen=True)
class OpenedImagePrompt:
    """An IP-Adapter that fits a model; names and shapes are checked, no tensor is loaded."""

    file: Path
    name: str  # on the Hub, if it was fetched from there
    adapter: ImagePromptAdapter  # on the meta device
    part: ComponentSource
    links: list[Link]

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> ImagePromptAdapter:
        """Load the weights as `dtype`, or in the stored type.

        Raises:
            LdmError: a weight is not a finite number, or the device cannot be used.
        """
        fill_alone(self.file, self.adapter, self.links, self.part.store, dtype, device)
        return self.adapter

    @cached_property
    def digest(self) -> str:
        """The file's SHA-256."""
        return file_digest(self.file, plain=True)


def open_image_prompt(source: str | PathLike[str], family: Family, *, allow_pickle: bool = False) -> OpenedImagePrompt:
    """Open an IP-Adapter for models of a family, without loading weights.

    `source` is a file, or the name of one on the Hub (owner/name/folder/file).

    Raises:
        LdmError: the file is no IP-Adapter that is read here, is damaged, or was made for another family.
    """
    path = builtin_adapter(source) or Path(source)
    fetched = not path.exists() and HUB_FILE.fullmatch(str(source)) is not None
    if fetched:
        path = fetch_file(str(source))
    if not path.is_file():
        raise LdmError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give an IP-Adapter's file")
    try:
        store = open_store(path, allow_pickle)
        check_digest(path)
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror or error}") from None
    config = _config(path, store.infos)
    _check_fits(path, config, family)
    with unfilled():
        widths = [layer.to_q.in_features for layer, _ in attentions(UNet(family.unet))]
        adapter = ImagePromptAdapter(config, widths)
    part = ComponentSource(store, [("", original), ("", diffusers)])
    return OpenedImagePrompt(path, str(source) if fetched else "", adapter, part, part.links(adapter))


def write_image_prompt(
    adapter: ImagePromptAdapter,
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    lineage: str = "",
) -> None:
    """Write an IP-Adapter as a file with its authors' names, which diffusers reads too.

    Raises:
        LdmError: as `write_weights`.
    """
    links = original(dict(adapter.named_parameters()))
    write_weights(path, links, adapter, dtype, overwrite=overwrite, lineage=lineage)


# --- what a file is ---------------------------------------------------------------------------------------------------


def _config(path: Path, infos: Infos) -> ImagePromptConfig:
    """The shape of the IP-Adapter in a file.

    Raises:
        LdmError: the file holds none, or one of a kind that is not read here.
    """
    shapes = {name.removeprefix(PROJECTION): i.shape for name, i in infos.items() if name.startswith(PROJECTION)}
    layers = [name for name in infos if name.startswith(LAYERS)]
    other = next((kind for mark, kind in _OTHERS.items() if any(mark in name for name in infos)), "")
    if shapes.keys() >= {"proj.0.weight", "norm.weight"}:
        other = other or "a FaceID IP-Adapter"
    if other:
        raise LdmError(f"{path} is {other}: it reads faces by a network of its own, which is not supported here")
    if not shapes or not layers:
        raise LdmError(f"{path} is no IP-Adapter ({PROJECTION}…, {LAYERS}…): {_what(infos)}")
    text_dim = next((infos[name].shape[-1] for name in layers if infos[name].shape), 0)
    try:
        if "proj.weight" in shapes:
            out, features = shapes["proj.weight"]
            return ImagePromptConfig("base", features, text_dim, max(1, out // max(1, text_dim)))
        if "proj.0.weight" in shapes:
            return ImagePromptConfig("full", shapes["proj.0.weight"][1], text_dim)
        _, tokens, width = shapes["latents"]
        blocks = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
        query = shapes.get("layers.0.0.to_q.weight") or shapes["layers.0.attn.to_q.weight"]
        inner = shapes.get("layers.0.1.1.weight") or shapes["layers.0.ff.1.net.0.proj.weight"]
        features = shapes["proj_in.weight"][1]
        return ImagePromptConfig("plus", features, text_dim, tokens, width, query[0] // HEAD, len(blocks), inner[0])
    except (KeyError, ValueError, IndexError):
        raise LdmError(f"{path}: no IP-Adapter known here has such tensors: {listing(sorted(shapes))}") from None
    except LdmError as error:
        raise LdmError(f"{path}: {error}") from None


def _what(infos: Infos) -> str:
    """The kind of a file that holds no IP-Adapter, in words."""
    if is_adapter(infos):
        return "it is a LoRA or the like, which goes to adapters= (--lora)"
    if any(name.startswith(UNET_PREFIX) for name in infos):
        return "it is a model, which goes to source (--model)"
    if any(name.startswith("vision_model.") for name in infos):
        return "it is an image encoder, whose folder goes to image_encoder= (--image-encoder)"
    return f"its tensors are called {listing(sorted(infos))}"


def _check_fits(path: Path, config: ImagePromptConfig, family: Family) -> None:
    """Raise unless the adapter's tokens have the channels of the family's text."""
    if config.text_dim != family.unet.text_dim:
        made = WIDTHS.get(config.text_dim, "another model")
        raise LdmError(
            f"{path} was made for {made} (text of {config.text_dim} channels), and the model is {family.name} "
            f"({family.unet.text_dim}); take an IP-Adapter for it"
        )


# --- names ------------------------------------------------------------------------------------------------------------

_ORIGINAL = (  # our names, and the authors'
    (r"image_embeds\.", "proj."),
    (r"ff\.net\.0\.proj\.", "proj.0."),
    (r"ff\.net\.2\.", "proj.2."),
    (r"layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)


def original(names: Iterable[str]) -> list[Link]:
    """The authors' names; the resampler's keys and values are one matrix."""
    names = list(names)
    full = "projection.ff.net.0.proj.weight" in names
    links = []
    for name in names:
        if name.startswith("layers.") or ".attn.to_v." in name:
            continue
        own = name.removeprefix("projection.")
        theirs = own.replace("norm.", "proj.3.") if full and own.startswith("norm.") else own
        for ours, original_name in _ORIGINAL:
            if re.match(ours, theirs):
                theirs = re.sub(ours, original_name, theirs)
                break
        if ".attn.to_k." in name:
            both = (name, name.replace(".to_k.", ".to_v."))
            links.append(Link(PROJECTION + theirs.replace("to_k", "to_kv"), both, "stack"))
        else:
            links.append(Link(PROJECTION + theirs, (name,)))
    return links + _layers(names)


def diffusers(names: Iterable[str]) -> list[Link]:
    """diffusers' names of the projection."""
    names = list(names)
    own = [name for name in names if name.startswith("projection.")]
    return [Link(PROJECTION + name.removeprefix("projection."), (name,)) for name in own] + _layers(names)


def _layers(names: Iterable[str]) -> list[Link]:
    """Keys and values, numbered as attention processors: the odd ones read the text."""
    own = [(name, re.fullmatch(r"layers\.(\d+)\.(to_[kv]_ip\.weight)", name)) for name in names]
    return [Link(f"{LAYERS}{2 * int(match[1]) + 1}.{match[2]}", (name,)) for name, match in own if match]
