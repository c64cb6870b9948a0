"""The parameters, memory and arithmetic that a run will need, counted before it begins.

Networks are built on the meta device, where tensors take no memory, and run once, so that operations and the tensors
kept for the backward pass are counted. Memory is still a prediction: allocators and libraries take more.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldm.models.unfilled import unfilled
from ldm.training.config import Config
from ldm.training.ema import profiles
from ldm.training.frozen import matrices, whole
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.optimizers import STATE_BYTES
from ldm.training.phases import Phase, phases
from ldm.training.sections import StageSection
from ldm.training.stages.stage import ForwardPasses, Learner, Pass, StageKind, trained
from ldm.training.stages.table import kind_named
from ldm.training.start import starting_family
from ldm.weights.components import Components, build

PEAK = {  # dense bf16 TFLOP/s of devices, as their makers state them
    "H200": 989, "H100": 989, "A100": 312, "L40": 181, "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """The needs of one stage at one resolution. Memory is that of one device, in bytes."""

    stage: str
    size: int  # pixels
    steps: int
    batch: int
    micro_batch: int
    trained: int  # parameters
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    previews: int  # copies of weights, and a decoded image; while they are made, there are no gradients and activations
    flops_per_image: int  # forward and backward, frozen networks included
    flops_per_step: int

    @property
    def memory(self) -> int:
        """The most at one time."""
        steps = self.gradients + self.activations
        return self.weights + self.optimizer + self.averages + max(steps, self.previews)


def forecast(config: Config, processes: int = 1) -> list[Forecast]:
    """The needs of each stage of a configuration, at each of its resolutions.

    Raises:
        LdmError: the configuration does not describe a model, or a batch does not divide evenly.
    """
    found = []
    for name in config.stages:
        kind, section = kind_named(name), getattr(config, name)
        model, place = (kind.own_model(section), f"{name}.model") if kind.own_model else (config.model, "model")
        with unfilled():
            parts = build(starting_family(model, place))
            learners = kind.learners(section, parts)
            parameters = count(parts, learners, kind.helpers(section), kind.frozen and config.precision != "no")
        if section.checkpointing:
            for learner in learners.values():
                checkpointed(learner.network)
        for phase in phases(section):
            own = phase.halved if kind.prior(section) else phase  # class images have micro-batches of their own
            micro = own.batch // (own.parts(processes) * processes)
            passes = kind.passes(section, parts, learners, phase.size, config.data.cache)
            previews = _previews(kind, parts, learners, phase.size, config.precision)
            found.append(_forecast(config, kind, section, parameters, passes, previews, phase, micro))
    return found


@dataclass(frozen=True)
class Counted:
    """Numbers of parameters."""

    trained: int
    averaged: int  # trained parameters with averages
    frozen: int
    nbytes: int  # of all weights


def count(
    parts: Components, learners: Mapping[str, Learner], helpers: Sequence[nn.Module], rounded: bool = False
) -> Counted:
    """The parameters of a stage's networks, each counted once; with `rounded`, frozen matrices are held in 16 bits."""
    modules = [*(learner.module for learner in learners.values()), *parts.modules().values(), *helpers]
    everything = {id(p): p for module in modules for p in module.parameters()}.values()
    learned = sum(p.numel() for p in everything if p.requires_grad)
    averaged = sum(p.numel() for one in learners.values() if one.averaged for p in trained(one.module))
    frozen = (parts.unet, parts.text_encoders, *helpers) if rounded else ()
    halves = {id(p) for one in frozen for p in matrices(one)}
    nbytes = sum(p.nbytes // 2 if id(p) in halves else p.nbytes for p in everything)
    return Counted(learned, averaged, sum(p.numel() for p in everything) - learned, nbytes)


def _forecast(
    config: Config,
    kind: StageKind[Any],
    section: StageSection,
    parameters: Counted,
    passes: ForwardPasses,
    previews: int,
    phase: Phase,
    micro: int,
) -> Forecast:
    kept, forward = _count(passes.learned)
    backward = 1 if kind.frozen else 2  # passes that cost as much as a forward one: gradients of inputs, of weights
    backward += 1 if section.checkpointing else 0
    flops = (1 + backward) * forward + sum(_count(run)[1] for run in passes.frozen)
    learned, still = parameters.trained, parameters.frozen
    averages = len(profiles(section.ema))
    kept *= micro
    if config.precision != "no":  # half of it, and a copy of the weights in 16 bits
        kept = kept // 2 + 2 * learned
    return Forecast(
        stage=kind.name, size=phase.size, steps=phase.end - phase.first, batch=phase.batch, micro_batch=micro,
        trained=learned, frozen=still, weights=parameters.nbytes, gradients=4 * learned,
        optimizer=STATE_BYTES[section.optimizer.name] * learned, averages=4 * parameters.averaged * averages,
        activations=kept, previews=previews, flops_per_image=flops, flops_per_step=flops * phase.batch,
    )  # fmt: skip


def _previews(
    kind: StageKind[Any], parts: Components, learners: Mapping[str, Learner], size: int, precision: str
) -> int:
    """Bytes that previews need: copies of weights, and what decoding one image needs at a time, in fp32."""
    if kind.copied is None:
        return 0
    copies, nbytes = kind.copied(learners), 4
    if kind.frozen and precision != "no":  # previews are made in 16 bits
        copies += sum(p.numel() for network in (parts.unet, parts.text_encoders) for p in whole(network))
        nbytes = 2
    side, channels = size // parts.family.autoencoder.factor, parts.family.autoencoder.channels_out
    latents = torch.empty(1, channels, side, side, device="meta")
    return nbytes * copies + _most(lambda: parts.autoencoder.decode(latents))


def _group_norm(image: Tensor, weight: Tensor, bias: Tensor, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    """Empty results of a group norm: the image, means, deviations."""
    return torch.empty_like(image), image.new_empty(n, groups), image.new_empty(n, groups)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Any:
    """Empty results of a layer norm: the tensor, means, deviations."""
    each = (*x.shape[: -len(shape)], *(1 for _ in shape))
    return torch.empty_like(x), x.new_empty(each), x.new_empty(each)


NORMS = {  # on the meta device, PyTorch takes dozens of operations to find the shapes of their results
    torch.ops.aten.native_group_norm.default: _group_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
}


class _Flops(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = NORMS.get(func, func)(*args, **kwargs)
        if (flops := flop_registry.get(func.overloadpacket)) is not None:
            self.total += flops(*args, **kwargs, out_val=result)
        return result


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.there: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = NORMS.get(func, func)(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages(args)}  # a view's is that of a tensor that was there
        for storage in _storages(result):
            if storage._cdata not in self.there | given:
                self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, nbytes = storage._cdata, storage.nbytes()

        def freed() -> None:
            self.now -= nbytes
            self.there.discard(key)

        self.there.add(key)
        self.now += nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, freed)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """The memory of all tensors among values."""
    return [one.untyped_storage() for one in tree_leaves(values) if isinstance(one, Tensor)]


@torch.no_grad()
def _most(run: Pass) -> int:
    """The most bytes, in fp32, that a pass without gradients needs at a time besides weights."""
    with _Live() as live, _Fused():
        run()
    return live.most


class _Fused(TorchFunctionMode):
    """Attention by a kernel that keeps no scores, as on GPUs: on the meta device, PyTorch would keep them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = _attention if func is F.scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` by the kernel that every GPU has."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=options.get("scale"))[0]


def _count(run: Pass) -> tuple[int, int]:
    """Bytes, in fp32, that the backward pass of a forward pass needs besides weights; and its FLOPs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        weight = tensor if tensor._base is None else tensor._base  # a product keeps a view of a weight
        if not isinstance(weight, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _Flops() as flops, hooks, _Fused():
        run()
    return sum(kept.values()), flops.total


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The peak speed of a GPU in 16 bits, in TFLOP/s; None if it is not known."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(value) for label, value in PEAK.items() if label in name), None)
