"""From a model found on disk to a model in memory: built on the meta device, checked by name and shape, then mapped in.

Readers of each format find out the family and where the tensors of each component are (`Opened`); everything after that
is the same for all formats and is here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
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
from ldm.weights.layouts import Layout, Link
from ldm.weights.tensors import Store, TensorInfo

Shape = tuple[int, ...]
NOTHING = re.compile("(?!)")  # matches no name
FOLDERS = {"autoencoder": "vae"}  # network -> its folder in a diffusers model, where that is called otherwise


@dataclass
class Components:
    """A family and its networks by name: "unet", "autoencoder", "text_encoders"."""

    family: Family
    networks: dict[str, nn.Module]

    @property
    def unet(self) -> UNet:
        """The network that predicts."""
        return cast("UNet", self.networks["unet"])

    @property
    def autoencoder(self) -> Autoencoder:
        """The network between images and latents."""
        return cast("Autoencoder", self.networks["autoencoder"])

    @property
    def text_encoders(self) -> TextEncoders:
        """The text towers with their tokenizers."""
        return cast("TextEncoders", self.networks["text_encoders"])

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders in a diffusers model, where each text tower has its own."""
        modules: dict[str, nn.Module] = {}
        for name, network in self.networks.items():
            if isinstance(network, TextEncoders):
                modules |= {c.component: tower for c, tower in zip(network.configs, network.towers, strict=True)}
            else:
                modules[FOLDERS.get(name, name)] = network
        return modules


def build(family: Family, tokenizers: Iterable[Tokenizer] | None = None) -> Components:
    """A model of that family with PyTorch's random initial weights, on the default device.

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
    """Ten hexadecimal digits that tell the weights of these networks from others."""
    digest = hashlib.sha256()
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            sample = parameter.detach().flatten()[:16].to("cpu", torch.bfloat16)
            digest.update(f"{name}.{key}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]


@dataclass
class ComponentSource:
    """The tensors of one component: where they are, what they may be called there, and what may lie beside them."""

    store: Store
    layouts: list[tuple[str, Layout]]  # with the prefix of their names; the one of which most is found is taken
    ignored: re.Pattern[str] = NOTHING  # names that may be there and are not needed

    def links(self, module: nn.Module) -> list[Link]:
        """Links for every parameter of the module, all checked against names, shapes and types in the store.

        Raises:
            LdmError: names are missing or unexpected, or shapes or types are wrong.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        found = self.store.infos
        candidates = [(prefix, layout(shapes)) for prefix, layout in self.layouts]
        prefix, links = max(candidates, key=lambda candidate: sum(link.theirs in found for link in candidate[1]))
        wanted = {link.theirs: link.shape(shapes) for link in links}
        here = [name for name in found if name.startswith(prefix)]
        _refuse(
            self.store,
            missing=[name for name in wanted if name not in found],
            unexpected=[name for name in here if name not in wanted and not self.ignored.fullmatch(name)],
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


def _refuse(store: Store, **problems: list[str]) -> None:
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {kind}: {listing(names, 3)}" for kind, names in problems.items() if names)
        hint = " (this is a LoRA or another adapter, not a model)" if is_adapter(store.infos) else ""
        raise LdmError(f"{_files(store)}: tensors do not fit the model{hint}: {text}")


def _files(store: Store) -> str:
    more = len(store.files) - 1
    return f"{store.files[0]}" + (f" and {more} more files" if more else "")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors are those of a LoRA, LoHa or similar adapter."""
    marks = (".lora_", "lora_unet_", "lora_te", ".lora.", ".hada_", ".lokr_", ".oft_", ".alpha")
    return any(mark in name for name in names for mark in marks)


@dataclass
class Opened:
    """A model found on disk: what it is and where its tensors are. Names and shapes are checked, nothing is loaded."""

    source: str
    layout: str  # "diffusers folder" or "single file"
    family: Family
    tokenizers: list[Tokenizer]
    parts: dict[str, ComponentSource]  # by the name of the component
    ignored: list[str] = field(default_factory=list)  # what is there and not used: components or groups of tensors

    def __post_init__(self) -> None:
        with torch.device("meta"):
            self.components = build(self.family, self.tokenizers)
        self.links = {name: self.parts[name].links(module) for name, module in self.components.modules().items()}

    def infos(self, component: str) -> Mapping[str, TensorInfo]:
        """The tensors of one component as the store has them."""
        infos = self.parts[component].store.infos
        return {link.theirs: infos[link.theirs] for link in self.links[component]}

    def check_dtype(self, dtype: torch.dtype | None) -> None:
        """Raise if weights are stored in a type that networks cannot compute in, and no other is named."""
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
        """Map the weights in: floating-point ones as `dtype`, or as they are stored.

        With `only`, those of the components of these names; the others stay without memory.
        """
        if not all(parameter.is_meta for parameter in self.components.unet.parameters()):
            raise RuntimeError("load() fills this object's own networks, once; open the source again for another copy")
        if dtype is not None and not dtype.is_floating_point:
            raise LdmError(f"weights cannot be loaded as {dtype}; choose a floating-point type such as torch.bfloat16")
        check_device(device)
        try:
            self._fill(dtype, device, progress, self.links.keys() if only is None else only)
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
            module = modules[name]
            links = {link.theirs: link for link in self.links[name]}
            shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
            state: dict[str, Tensor] = {}
            for theirs, tensor in self.parts[name].store.read(links, dtype, device):
                done += self.parts[name].store.infos[theirs].nbytes
                link = links[theirs]
                for ours, value in zip(link.ours, link.to_ours(tensor), strict=True):
                    state[ours] = value.reshape(shapes[ours])
                progress(f"loading {name}", done, total)
            module.load_state_dict(state, assign=True)
            module.eval()


def check_device(device: torch.device | str) -> None:
    """Check that tensors can be moved to a device.

    Raises:
        LdmError: there is no such device, or it does not work.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LdmError(f"device {device!s} cannot be used here: {first_line(error)}") from None
