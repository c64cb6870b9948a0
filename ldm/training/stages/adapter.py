"""The stage `adapter`: LoRA and its kin learn to change a U-Net, and optionally its text encoders, which stay frozen.

Hu et al. 2021 (arXiv 2106.09685); LoCon, LoHa and LoKr: Yeh et al. 2023 (arXiv 2309.14859); DoRA: Liu et al. 2024
(arXiv 2402.09353); LoRA+: Hayou et al. 2024 (arXiv 2402.12354).

B batch, C latent channels, h×w height and width of the latents, R ranks of all layers together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.keyed import generator
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.surgery import exchanged, twin
from ldm.patches.low_rank import Change
from ldm.patches.trained import ChangedLayer, ChangeForm, DoRA, LoRA, TrainedChange, new_change, shrink
from ldm.training.frozen import changed, hold_in_eight_bits, uniform
from ldm.training.images import TrainingImages
from ldm.training.optimizers import Group
from ldm.training.stages import denoiser
from ldm.training.stages.denoiser import DenoiserStage, Joint, read_by_unet
from ldm.training.stages.sections import AdapterSection
from ldm.training.stages.stage import ForwardPasses, Learner, Loss, StageInputs, freeze, seeded
from ldm.weights.adapters.layers import matching
from ldm.weights.adapters.names import Place, parameter_of, towers, written
from ldm.weights.components import Components

ATTENTION = r"attn[12]\.to_(?:[qkv]|out\.0)|self_attn\.(?:[qkv]|out)_proj"
GROUPS = {  # name of a group of layers -> pattern of their names, and their types
    "attention": (ATTENTION, (nn.Linear,)),
    "transformers": (r"attentions\.\d+\..*|encoder\.layers\..*", (nn.Linear, nn.Conv2d)),
    "linear": (".*", (nn.Linear,)),
    "convolutions": (".*", (nn.Conv2d,)),
}


class TrainedAdapter(nn.Module):
    """The trained changes of a model's layers; the forward pass is that of the changed networks.

    The networks are no sub-modules, so that their frozen weights are neither saved nor exchanged between processes.
    """

    def __init__(self, parts: Components, changes: Mapping[Place, TrainedChange], train_text: bool) -> None:
        """Args:
        parts: the model, which stays as it is.
        changes: of its layers.
        train_text: whether the text encoders are run too, with changes.
        """
        super().__init__()
        self.places = dict(changes)
        self.changes = nn.ModuleDict(
            {f"{place.component}.{place.layer}".replace(".", "/"): change for place, change in changes.items()}
        )
        layers: dict[str, dict[str, nn.Module]] = {"unet": {}, "text_encoders": {}}
        for place, change in changes.items():
            network, name = parameter_of(parts, place.component, place.layer)
            layers[network][name] = ChangedLayer(parts.networks[network].get_submodule(name), change)
        # twins, so that what is done to the changed networks (gradient checkpointing) leaves the model's alone
        own = {name: exchanged(twin(parts.networks[name]), ones) for name, ones in layers.items()}
        self.parts = Components(parts.family, {**parts.networks, **own})
        unet, encoders = self.parts.unet.train(), self.parts.text_encoders
        self.around = (Joint(unet, encoders, parts.family) if train_text else unet,)  # a tuple, which hides it

    def forward(self, *inputs: Any) -> Tensor:
        """Those of the U-Net, or of `Joint`, to the prediction (B, C, h, w)."""
        return self.around[0](*inputs)

    def weight(self, place: Place) -> Tensor:
        """The frozen weight of the layer at a place."""
        network, name = parameter_of(self.parts, place.component, f"{place.layer}.layer.weight")
        return self.parts.networks[network].get_parameter(name)

    def copied(self) -> int:
        """The numbers of the weights that are copied when the changes are merged; of LoRA, none in 8 bits."""
        weights = {place: self.weight(place) for place in self.places}
        return sum(
            weight.numel()
            for place, weight in weights.items()
            if weight.dtype != torch.int8 or not isinstance(self.places[place], LoRA)
        )

    def stored(self) -> dict[str, dict[str, Change]]:
        """The changes as an adapter holds them: component -> parameter -> change."""
        found: dict[str, dict[str, Change]] = {}
        for place, change in self.places.items():
            found.setdefault(place.component, {})[f"{place.layer}.weight"] = change.change()
        return found


# --- the layers -------------------------------------------------------------------------------------------------------


def chosen(section: AdapterSection, parts: Components) -> dict[Place, nn.Linear | nn.Conv2d]:
    """The layers that the adapter changes: of the U-Net and, with `train_text`, of the text encoders.

    Raises:
        LdmError: a pattern matches no layer.
    """
    networks: dict[str, nn.Module] = {"unet": parts.unet, **(towers(parts) if section.train_text else {})}
    read = {
        Place(component, name.removesuffix(".weight"))
        for k, component in enumerate(towers(parts))
        for name in read_by_unet(parts.text_encoders, k)
    }
    named = {place for place in written(parts, "diffusers") if place.component == "unet" or place in read}
    layers = {
        place: layer
        for component, network in networks.items()
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and (place := Place(component, name)) in named
    }
    found: set[Place] = set()
    for entry in section.layers:
        pattern, kinds = GROUPS.get(entry, (entry, (nn.Linear, nn.Conv2d)))
        own = {place for place, layer in layers.items() if isinstance(layer, kinds) and _is(place, pattern)}
        if not own:
            raise LdmError(
                f"{section.place}.layers: {entry} matches no layer; write {', '.join(GROUPS)}, or a regular expression "
                "for the end of layers' names, such as attn2.to_k"
            )
        found |= own
    for key in ("ranks", "alphas"):
        for pattern in getattr(section, key):
            if not any(_is(place, pattern) for place in found):
                raise LdmError(
                    f"{section.place}.{key}: {pattern} matches none of the {len(found)} changed layers; correct it"
                )
    return {place: layer for place, layer in layers.items() if place in found}


def _is(place: Place, pattern: str) -> bool:
    """Whether a pattern matches the end of a layer's name."""
    return bool(matching({pattern: True}, place.layer, False))


def form_of(section: AdapterSection, layer: str) -> ChangeForm:
    """The form of a layer's change."""
    rank = matching(section.ranks, layer, section.rank)
    alpha = matching(section.alphas, layer, section.alpha)
    return ChangeForm(section.kind, rank, rank if alpha is None else alpha, section.dora, section.lokr_factor)


def learners(section: AdapterSection, parts: Components) -> dict[str, Learner]:
    """The changes of the chosen layers, with initial values from PyTorch's generator."""
    freeze(parts)
    weights = {place: layer.weight for place, layer in chosen(section, parts).items()}
    changes = {place: new_change(weight, form_of(section, place.layer)) for place, weight in weights.items()}
    del weights  # which may be replaced now
    if section.quantize:
        hold_in_eight_bits(parts.unet)
    adapter = TrainedAdapter(parts, changes, section.train_text)
    rates = {"unet": section.optimizer.learning_rate}
    for k, component in enumerate(towers(parts)):
        rates[component] = section.text_learning_rate[min(k, len(section.text_learning_rate) - 1)]
    groups: list[Group] = []
    norms: list[Group] = []
    for component, rate in rates.items():
        own = [change for place, change in changes.items() if place.component == component]
        ups = [change.up for change in own if isinstance(change, LoRA)]
        fast = {id(up) for up in ups}
        groups.append(([p for change in own for p in change.factors() if id(p) not in fast], rate))
        groups.append((ups, rate * section.up_rate))
        norms.append(([change.norms for change in own if isinstance(change, DoRA)], rate))
    return {"unet": Learner(adapter, groups, norms, around=adapter.around[0])}


def passes(
    section: AdapterSection, parts: Components, found: Mapping[str, Learner], size: int, cached: bool
) -> ForwardPasses:
    """Those of the denoiser, with the changed layers."""
    adapter = found["unet"].module
    assert isinstance(adapter, TrainedAdapter)
    return denoiser.passes(section, adapter.parts, found, size, cached)


def copied(found: Mapping[str, Learner]) -> int:
    """The numbers that the copy of the model for previews has of its own: the changed weights.

    Of those in 8 bits, LoRA needs no copies.
    """
    adapter = found["unet"].module
    assert isinstance(adapter, TrainedAdapter)
    return adapter.copied()


# --- the stage --------------------------------------------------------------------------------------------------------


class AdapterStage(DenoiserStage):
    """Training of an adapter on noisy latents."""

    section: AdapterSection

    def __init__(
        self,
        given: StageInputs[Any],
        choose: Callable[[Any, Components], dict[str, Learner]] = learners,
    ) -> None:
        """Args:
            given: by the run.
            choose: gives what is trained, with initial values from PyTorch's generator.

        Raises:
            LdmError: see `DenoiserStage` and `chosen`.
        """
        super().__init__(
            given.name, given.section, given.model, given.accelerator, given.seed, given.make_images, given.texts,
            seeded(choose, given.seed, "adapter"),
        )  # fmt: skip
        self.data: TrainingImages = given.data
        self.output = given.folder.resolve().parent.name

    @property
    def adapter(self) -> TrainedAdapter:
        """The trained changes."""
        module = self.accelerator.unwrap_model(self.players["unet"].module)
        assert isinstance(module, TrainedAdapter)
        return module

    @property
    def unet_rate(self) -> float:
        """The learning rate of the U-Net's adapter."""
        return self.section.optimizer.learning_rate

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """As in `DenoiserStage`, with ranks dropped until the backward pass is done."""
        with self.dropping(batch):
            yield from super().losses(batch, step)

    @contextmanager
    def dropping(self, batch: Batch) -> Iterator[None]:
        """A context in which each layer leaves out some of its ranks, chosen by the sample and its epoch."""
        loras = [change for change in self.adapter.places.values() if isinstance(change, LoRA)]
        rate, sizes = self.section.rank_dropout, [len(lora.down) for lora in loras]
        if not rate:
            yield
            return
        draws = [
            torch.rand(sum(sizes), generator=generator(self.seed, "rank dropout", key, epoch))
            for key, epoch in zip(batch.keys, batch.epochs, strict=True)
        ]
        kept = ((torch.stack(draws) >= rate) / (1 - rate)).to(self.accelerator.device)  # (B, R)
        for lora, own in zip(loras, kept.split(sizes, dim=1), strict=True):
            lora.kept = own
        try:
            yield
        finally:
            for lora in loras:
                lora.kept = None

    def updated(self, step: int) -> dict[str, float]:
        """Scale changes down that have grown beyond `max_norm`."""
        most, adapter = self.section.max_norm, self.adapter
        if not most:
            return {}
        norms = torch.stack([shrink(change, adapter.weight(place), most) for place, change in adapter.places.items()])
        return {"norms/mean": float(norms.mean()), "norms/scaled": float((norms > most).sum())}

    def shown(self) -> LatentDiffusion:
        """A copy of the model with the changes merged in, or beside layers in 8 bits."""
        shown = dict(self.model.networks)
        for component, own in self.adapter.stored().items():
            for name, change in own.items():
                network, parameter = parameter_of(self.model, component, name)
                shown[network] = changed(shown[network], parameter, change)
        own_dtype = {name: uniform(shown[name]) for name in ("unet", "text_encoders")}
        return self.model.with_networks(own_dtype)


def build(given: StageInputs[AdapterSection]) -> AdapterStage:
    """The stage of a run."""
    return AdapterStage(given)
