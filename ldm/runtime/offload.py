"""Offloading: models larger than a GPU's memory keep their weights in main memory, and move them when needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.surgery import reweighted
from ldm.models.unet import UNet, UNetHalf
from ldm.weights.components import Components

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
OFFLOAD = {  # name -> what it does
    "auto": "the first of the others that fits into a GPU's free memory",
    "none": "all weights stay on the device",
    "components": "text encoders, U-Net and autoencoder are on the device one at a time",
    "layers": "like components, and the U-Net's layers are on the device one at a time",
}
WORK = 2 * 2**30  # bytes that an image of usual size needs beside the weights


class Room:
    """A device's memory, which holds one of several networks at a time, for one batch of images at a time."""

    def __init__(self, device: torch.device, layers: bool) -> None:
        self.device = device
        self.layers = layers
        self.lock = threading.RLock()
        self.guests: WeakSet[nn.Module] = WeakSet()
        self.present: nn.Module | None = None

    def add(self, model: Components) -> None:
        """Let the networks of a model, which are in main memory now, take turns in this room."""
        for network in model.networks.values():
            if self.layers and isinstance(network, UNet):
                by_layers(network, self.device)
            else:
                self.guests.add(network)

    def invite(self, networks: Iterable[nn.Module]) -> None:
        """Let copies of the room's networks, with some weights of their own, take turns as well."""
        for network in networks:
            if not (self.layers and isinstance(network, UNet)):
                self.guests.add(network)

    def bring(self, network: nn.Module) -> None:
        """Move a network onto the device, after the one that is there has been moved out."""
        if network not in self.guests or network is self.present:
            return
        if self.device.type == "cpu":  # all are there, some weights in a kernel's order alone: moving makes them anew
            self.present = network
            return
        present, self.present = self.present, None
        with torch.inference_mode(False), torch.no_grad():  # in inference mode quantised weights cannot move
            if present is not None:
                present.to("cpu")
            try:
                network.to(self.device)
            except BaseException:
                network.to("cpu")  # not half on the device
                raise
        self.present = network


def by_layers(unet: UNetHalf, device: torch.device) -> None:
    """Keep each layer's weights on the device only while it computes; between calls its parameters are on "meta"."""
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(unet, execution_device=device, offload=True, weights_map=dict(unet.state_dict()))


def stored(layer: nn.Module) -> Mapping[str, Tensor] | None:
    """The weights of a layer that is offloaded `by_layers`, in main memory; None if the layer is not."""
    return getattr(getattr(layer, "_hf_hook", None), "weights_map", None)


def with_stored(layer: M, values: Mapping[str, Tensor]) -> M:
    """A copy of a layer that is offloaded `by_layers` with other values of the named parameters; the rest is shared."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    other = reweighted(layer, {})
    hook = other.__dict__.pop("_hf_hook")
    del other.forward, other._old_forward  # they belong to the layer that was copied
    names = [name for name, parameter in layer.named_parameters(recurse=False)]
    weights = {name: values[name] if name in values else hook.weights_map[name] for name in names}
    return add_hook_to_module(other, AlignDevicesHook(hook.execution_device, offload=True, weights_map=weights))


def room_for(models: Iterable[Components], offload: str, device: torch.device, dtype: torch.dtype) -> Room | None:
    """The room where the networks of a base and perhaps its refiner take turns; None if all stay on the device.

    `offload` is a name of `OFFLOAD`.

    Raises:
        LdmError: the name is unknown.
    """
    if offload not in OFFLOAD:
        raise LdmError(f"offload {offload!r} is not known; choose one of: {', '.join(OFFLOAD)}")
    if offload == "auto":
        if device.type != "cuda":
            return None
        free, sizes = torch.cuda.mem_get_info(device)[0], nbytes(models, dtype)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, and kept by PyTorch
        offload = choice(sizes, free)
        if offload != "none":
            log.warning(
                "the model has %.1f GB, of %s %.1f GB are free: %s (offload=%s)",
                sum(sizes.values()) / 1e9, device, free / 1e9, OFFLOAD[offload], offload,
            )  # fmt: skip
    return None if offload == "none" else Room(device, offload == "layers")


def nbytes(models: Iterable[Components], dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each network's weights will take; a refiner shares all but its U-Net with the base."""
    sizes: dict[str, int] = {}
    for number, model in enumerate(models):
        for name, network in model.modules().items():
            if number == 0 or name == "unet":
                count = sum(parameter.numel() for parameter in network.parameters())
                sizes[f"{name}{number}"] = count * dtype.itemsize
    return sizes


def choice(sizes: Mapping[str, int], free: int) -> str:
    """The offloading that networks of these sizes need to fit into `free` bytes: none, components or layers."""
    if sum(sizes.values()) + WORK <= free:
        return "none"
    return "components" if max(sizes.values()) + WORK <= free else "layers"
