"""Loading a model: networks are built on the meta device, checked by names and shapes, then filled from mapped files.

The reader of each format finds the family and the places of each component's tensors (`Opened`). The later steps are
the same for all formats and are in this file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ldm.errors import LdmError, first_line, listing
from ldm.families import Family
from ldm.files import Progress, silent
from ldm.models.autoencoder import Autoencoder, build_autoencoder
from ldm.models.text import TextEncoders
from ldm.models.tokenizer import Tokenizer, clip_tokenizer
from ldm.models.unet import UNet
from ldm.models.unfilled import unfilled
from ldm.weights.layouts import Layout, Link
from ldm.weights.numbers import check_sample
from ldm.weights.tensors import Store, TensorInfo

Shape = tuple[int, ...]
NOTHING = re.compile("(?!)")  # matches no name
FOLDERS = {"autoencoder": "vae"}  # network -> its folder in a diffusers model, if the names differ


@dataclass
class Components:
    """A family and its networks by name: "unet", "autoencoder", "text_encoders"."""

    family: Family
    networks: dict[str, nn.Module]

    @property
    def unet(self) -> UNet:
        """The denoiser."""
        return cast("UNet", self.networks["unet"])

    @property
    def autoencoder(self) -> Autoencoder:
        """The network that encodes images to latents and decodes latents to images."""
        return cast("Autoencoder", self.networks["autoencoder"])

    @property
    def text_encoders(self) -> TextEncoders:
        """The text towers with their tokenizers."""
        return cast("TextEncoders", self.networks["text_encoders"])

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders in a diffusers model; each text tower has a folder."""
        modules: dict[str, nn.Module] = {}
        for name, network in self.networks.items():
            if isinstance(network, TextEncoders):
                modules |= {c.component: tower for c, tower in zip(network.configs, network.towers, strict=True)}
            else:
                modules[FOLDERS.get(name, name)] = network
        return modules


def build(family: Family, tokenizers: Iterable[Tokenizer] | None = None) -> Components:
    """A model of a family with PyTorch's random initial weights, on the default device.

    `tokenizers`, one for each text tower, default to CLIP's own.
    """
    if tokenizers is None:
        tokenizers = [clip_tokenizer(c.pad_token, c.context, c.vocab_size) for c in family.text]
    return Components(
        family,
        {
            "unet": UNet(family.unet),
            "autoencoder": build_autoencoder(family.autoencoder),
            "text_encoders": TextEncoders(family.text, tuple(tokenizers), pooled=family.xl),
        },
    )


def fingerprint(modules: Mapping[str, torch.nn.Module]) -> str:
    """A digest of the networks' weights, ten hexadecimal digits."""
    digest = hashlib.sha256()
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            sample = parameter.detach().flatten()[:16].to("cpu", torch.bfloat16)
            digest.update(f"{name}.{key}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]


@dataclass
class ComponentSource:
    """The tensors of one component: the files, the layouts that are tried, and the other tensors that are ignored."""

    store: Store
    layouts: list[tuple[str, Layout]]  # (prefix of names, layout); the layout with the most matching names is used
    ignored: re.Pattern[str] = NOTHING  # names of tensors that may be present and are not needed
    unused: list[str] = field(default_factory=list)  # those that are present, once `links` has looked

    def links(self, module: nn.Module, remedy: str = "") -> list[Link]:
        """Links for every parameter of the module, all checked against names, shapes and types in the store.

        `remedy` ends the message of an error.

        Raises:
            LdmError: names are missing or unexpected, or shapes or types are wrong.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        found = self.store.infos
        candidates = [(prefix, layout(shapes)) for prefix, layout in self.layouts]
        prefix, links = max(candidates, key=lambda candidate: sum(link.theirs in found for link in candidate[1]))
        wanted = {link.theirs: link.shape(shapes) for link in links}
        more = [name for name in found if name.startswith(prefix) and name not in wanted]
        self.unused = [name for name in more if self.ignored.fullmatch(name)]
        _refuse(
            self.store,
            remedy,
            missing=[name for name in wanted if name not in found],
            unexpected=[name for name in more if not self.ignored.fullmatch(name)],
            misshapen=[
                f"{name} {list(found[name].shape)} (not {list(shape)})"
                for name, shape in wanted.items()
                if name in found and not _fits(found[name].shape, shape)
            ],
            mistyped=[
                f"{name} ({found[name].dtype})"
                for name in wanted
                if name in found and not found[name].dtype.is_floating_point
            ],
        )
        return links


def _fits(found: Shape, wanted: Shape) -> bool:
    return found == wanted or (*found, 1, 1) == wanted  # some files hold 1×1 convolutions as matrices


def _refuse(store: Store, remedy: str, **problems: list[str]) -> None:
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {kind}: {listing(names, 3)}" for kind, names in problems.items() if names)
        hint = " (this is a LoRA or another adapter, not a model)" if is_adapter(store.infos) else ""
        raise LdmError(f"{_files(store)}: tensors do not fit the model{hint}: {text}{remedy}")


def _files(store: Store) -> str:
    more = len(store.files) - 1
    return f"{store.files[0]}" + (f" and {more} more files" if more else "")


def _elsewhere(component: str) -> str:
    """The end of a message about the tensors of a component."""
    return f"; take this component from another file (--component {component}=PATH, components=)"


def is_adapter(names: Iterable[str]) -> bool:
    """Whether the tensors belong to a LoRA, LoHa or similar adapter."""
    marks = (".lora_", "lora_unet_", "lora_te", ".lora.", ".hada_", ".lokr_", ".oft_", ".alpha")
    return any(mark in name for name in names for mark in marks)


@dataclass
class Opened:
    """An opened model on disk: family and places of tensors. Names and shapes are checked, no tensor is loaded."""

    source: str
    layout: str  # "diffusers folder" or "single file"
    family: Family
    tokenizers: list[Tokenizer]
    parts: dict[str, ComponentSource]  # component name -> its tensors; may lack components that come from elsewhere
    beside: list[str] = field(default_factory=list)  # components or groups of tensors that are present and unused

    def __post_init__(self) -> None:
        with unfilled():
            self.components = build(self.family, self.tokenizers)
        modules = self.components.modules()
        self.links = {name: part.links(modules[name], _elsewhere(name)) for name, part in self.parts.items()}

    @property
    def ignored(self) -> list[str]:
        """What the files hold and the model does not use: components, groups of tensors, tensors of a component."""
        return [*self.beside, *(listing(part.unused) for part in self.parts.values() if part.unused)]

    def infos(self, component: str) -> Mapping[str, TensorInfo]:
        """Names, types and shapes of one component's tensors in the store."""
        infos = self.parts[component].store.infos
        return {link.theirs: infos[link.theirs] for link in self.links[component]}

    def check_dtype(self, dtype: torch.dtype | None) -> None:
        """Raise if `dtype` is None and the stored type is one that networks cannot compute in (such as float8)."""
        for name in self.links:
            stored = {info.dtype for info in self.infos(name).values() if info.dtype.itemsize < 2}
            if dtype is None and stored:
                raise LdmError(f"{name} is stored as {stored.pop()}; name a dtype to compute in (dtype=, --dtype)")

    def load(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Progress = silent,
        only: Collection[str] | None = None,
    ) -> Components:
        """Load the weights by memory-mapping: floating-point weights as `dtype`, or in the stored type.

        With `only`, load the components of these names; the others stay on the meta device.

        Raises:
            LdmError: the files cannot be read, or a sample of the numbers is wrong (`check_sample`).
        """
        if not all(parameter.is_meta for parameter in self.components.unet.parameters()):
            raise RuntimeError("load() fills this object's own networks, once; open the source again for another copy")
        if dtype is not None and not dtype.is_floating_point:
            raise LdmError(f"weights cannot be loaded as {dtype}; choose a floating-point type such as torch.bfloat16")
        check_device(device)
        names = self.links.keys() if only is None else only
        try:
            for name in names:
                check_sample(self.parts[name].store, self.infos(name))
            self._fill(dtype, device, progress, names)
        except (OSError, SafetensorError) as error:
            raise LdmError(f"{self.source} could be opened, but not read: {first_line(error)}") from None
        return self.components

    def _fill(
        self, dtype: torch.dtype | None, device: torch.device | str, progress: Progress, names: Collection[str]
    ) -> None:
        total = sum(info.nbytes for name in names for info in self.infos(name).values())
        done = 0
        modules = self.components.modules()
        for name in names:
            for theirs in filled(modules[name], self.links[name], self.parts[name].store, dtype, device):
                done += self.parts[name].store.infos[theirs].nbytes
                progress(f"loading {name}", done, total)


def filled(
    module: nn.Module, links: Iterable[Link], store: Store, dtype: torch.dtype | None, device: torch.device | str
) -> Iterator[str]:
    """Fill a module with the tensors of a store as they are read, and put it in evaluation mode; yields their names."""
    places = {link.theirs: link for link in links}
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
    state: dict[str, Tensor] = {}
    for theirs, tensor in store.read(places, dtype, device):
        link = places[theirs]
        for ours, value in zip(link.ours, link.to_ours(tensor), strict=True):
            state[ours] = value.reshape(shapes[ours])
        yield theirs
    module.load_state_dict(state, assign=True)
    module.eval()


def fill_alone(
    where: Path | str,
    module: nn.Module,
    links: Iterable[Link],
    store: Store,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Fill a network that comes without a model, such as a ControlNet, and check all of its numbers.

    Raises:
        LdmError: a weight is not a finite number, or the device cannot be used.
    """
    check_device(device)
    for _ in filled(module, links, store, dtype, device):
        pass
    bad = [name for name, weight in module.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        raise LdmError(f"{where}: {bad[0]} holds numbers that are not finite; fetch or write the file again")


def check_device(device: torch.device | str) -> None:
    """Check that tensors can be moved to a device.

    Raises:
        LdmError: the device does not exist, or does not work.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LdmError(f"device {device!s} cannot be used here: {first_line(error)}") from None
