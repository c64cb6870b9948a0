"""Loading a model for speed on its device: fused layers, kernels, compilation, quantisation; device and dtype."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.controlnet import ControlNet
from ldm.patches.controlnet import NamedControlNet
from ldm.patches.patching import patched
from ldm.patches.t2i_adapter import NamedFeatures
from ldm.runtime import fused_cpu, fused_gpu
from ldm.runtime.attention import best_attention, set_attention
from ldm.runtime.bf16 import computes_bf16
from ldm.runtime.compilation import compile_blocks
from ldm.runtime.graphs import admit, record_steps
from ldm.runtime.offload import Room, by_layers, room_for
from ldm.runtime.quantization import check_quantize, quantize
from ldm.weights.components import Opened
from ldm.weights.sources import open_source
from ldm.weights.tensors import FLOATS

log = logging.getLogger(__name__)
N = TypeVar("N", bound=nn.Module)
DTYPES = FLOATS | {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


@dataclass(frozen=True)
class Tuning:
    """The arguments of `Pipeline` about speed and memory."""

    attention: str = "auto"
    fused: bool = True
    compile: bool = False
    quantize: str | None = None
    offload: str = "auto"

    def load(
        self,
        source: Any,
        refiner: Any,
        device: torch.device,
        dtype: torch.dtype | None,
        options: Mapping[str, Any],
    ) -> tuple[LatentDiffusion, LatentDiffusion | None]:
        """Load and tune a model and perhaps its refiner; models that are loaded already stay as they are.

        `options` are arguments of `open_source` for the model; `allow_pickle` is for the refiner, too.

        Raises:
            LdmError: a model cannot be loaded or tuned in this way.
        """
        dtype = dtype or default_dtype(device)
        if isinstance(source, LatentDiffusion) or isinstance(refiner, LatentDiffusion):
            for name in ("quantize", "compile", "offload"):
                value = getattr(self, name)
                if value not in (None, False, "auto", "none"):
                    raise LdmError(f"{name} {value!r}: a model that is loaded already stays as it is; name its source")
        own = [name for name in options if name != "allow_pickle"]  # which is about what is beside it, too
        if own and isinstance(source, LatentDiffusion):
            raise LdmError(f"{own[0]}: a model that is loaded already stays as it is; name its source")
        if self.quantize is not None:
            check_quantize(self.quantize, device, dtype)
        beside = {name: options[name] for name in options if name == "allow_pickle"}
        pairs = [(source, options)] if refiner is None else [(source, options), (refiner, beside)]
        found = [one if isinstance(one, LatentDiffusion) else open_source(one, **more) for one, more in pairs]
        opened = [one.components for one in found if isinstance(one, Opened)]
        room = room_for(opened, self.offload, device, dtype) if opened else None
        models = [self._loaded(one, device, dtype, room) if isinstance(one, Opened) else one for one in found]
        return models[0], None if refiner is None else models[1]

    def _loaded(self, opened: Opened, device: torch.device, dtype: torch.dtype, room: Room | None) -> LatentDiffusion:
        """A model, loaded and tuned."""
        model = LatentDiffusion.of(opened.load(dtype, "cpu" if room else device))
        if model.family.few_step:
            log.warning("%s: %s; these are the defaults", opened.source, model.family.few_step)
        if dtype == torch.float16 and model.family.xl and model.family.autoencoder.force_upcast:
            model.autoencoder.float()  # SDXL's own overflows in fp16
        return self.apply(model, room)

    def apply(self, model: LatentDiffusion, room: Room | None = None) -> LatentDiffusion:
        """Tune a model in place, on its device; a quantised or offloaded one becomes a `TunedModel`.

        Raises:
            LdmError: a kernel does not run here, nothing can be compiled or quantised, or choices exclude each other.
        """
        device, dtype = room.device if room else model.device, model.dtype
        if room and room.layers and (self.compile or self.quantize):
            raise LdmError(
                "offload: with one layer at a time (layers) nothing can be compiled or quantised; leave compile and "
                "quantize out"
            )
        self._quicken(model.unet, device, room)
        self._quicken(model.autoencoder, device, room)
        name = self._kernel(device, dtype)
        if name != "sdpa":
            set_attention(model.unet, name, device)
        if name == "cpu":
            set_attention(model.autoencoder, name, device)
        if self.quantize or room:
            model = TunedModel(model, self.quantize, room)
        if not room and self._records(device):
            record_steps(model.unet)
        return model

    def _quicken(self, network: nn.Module, device: torch.device, room: Room | None) -> None:
        """Compile a network's blocks or fuse its layers, in place."""
        if self.compile:
            compile_blocks(network, device)
        elif self.fused and not (room and room.layers):
            fused_cpu.fuse(network, device)
            fused_gpu.fuse(network, device)

    def _records(self, device: torch.device) -> bool:
        """Whether the U-Net records its steps."""
        if device.type == "cuda":
            return self.compile or self.fused
        return device.type == "cpu" and self.fused and not self.compile and not self.quantize

    def _kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the attention kernel."""
        if self.attention != "auto":
            return self.attention
        return "sdpa" if self.compile else best_attention(device, dtype)

    def beside(self, network: N, model: LatentDiffusion) -> N:
        """Tune a control model in place, to compute beside a model's U-Net, and let that record both together.

        It stays on the device where the model's networks take turns, unless its layers do.

        Raises:
            LdmError: as `apply`.
        """
        device, room = model.device, room_of(model)
        self._quicken(network, device, room)
        name = self._kernel(device, model.dtype)
        if name != "sdpa":
            set_attention(network, name, device)
        if isinstance(network, ControlNet):
            if room and room.layers:
                by_layers(network, device)
            admit(model.unet, patched(model.unet, {"controlnets": (NamedControlNet(network, ""),)}))
        else:
            admit(
                model.unet, patched(model.unet, {"t2i_adapters": (NamedFeatures("", len(model.unet.down_blocks) + 1),)})
            )
        return network


def room_of(model: LatentDiffusion) -> Room | None:
    """The room that an offloaded model's networks share; None for other models."""
    return model.room if isinstance(model, TunedModel) else None


class TunedModel(LatentDiffusion):
    """A model that is quantised or offloaded; its fingerprint is that of the weights as they were loaded."""

    def __init__(self, model: LatentDiffusion, quantized: str | None, room: Room | None) -> None:
        """Take the networks of a model; `quantized` is a name of `ldm.runtime.quantization.QUANTIZED`.

        Raises:
            LdmError: the model cannot be quantised here.
        """
        super().__init__(model.family, dict(model.networks))
        self.known_by = model.fingerprint()
        self.room = room
        if room:
            room.add(self)
        if quantized:
            self.bring(model.unet)
            quantize(model.unet, quantized)

    def with_networks(self, networks: Mapping[str, nn.Module]) -> Self:
        other = super().with_networks(networks)
        if self.room:
            self.room.invite(networks.values())
        return other

    def fingerprint(self) -> str:
        """The fingerprint of the weights as they were loaded."""
        return self.known_by

    @property
    def device(self) -> torch.device:
        return self.room.device if self.room else super().device

    def bring(self, network: nn.Module) -> None:
        if self.room:
            self.room.bring(network)

    def alone(self) -> AbstractContextManager[Any]:
        return self.room.lock if self.room else super().alone()


def device_named(name: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        LdmError: the name is not known.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise LdmError(f"device {name!r} is not known; choose cuda, mps or cpu") from None


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of a short or long name; None for None.

    Raises:
        LdmError: the name is not known.
    """
    if name is not None and name not in DTYPES:
        raise LdmError(f"--dtype {name!r} is not known; choose fp32, fp16 or bf16")
    return DTYPES[name] if name else None


def typed(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of loading with a dtype in place of its name.

    Raises:
        LdmError: as `dtype_named`.
    """
    return {**loading, "dtype": dtype_named(loading.get("dtype"))}


def cpu_by_default() -> AbstractContextManager[Any]:
    """A context in which tensors are made on the CPU unless a device is named, despite `torch.set_default_device`.

    Where the default is the CPU it does nothing, since PyTorch's own context slows every call down.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def default_device() -> str:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: torch.device) -> torch.dtype:
    """The default dtype of a device: bf16 if its hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    if computes_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type in ("cuda", "mps") else torch.float32
