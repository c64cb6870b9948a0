"""Models that are larger than a GPU's memory: their weights lie in the computer's, and come when they are needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.models.unet import UNet
from ldm.weights.components import Components

log = logging.getLogger(__name__)
OFFLOAD = {  # name -> what it does
    "auto": "what fits into the memory that is free on a GPU",
    "none": "all weights stay on the device",
    "components": "text encoders, U-Net and autoencoder are there one at a time",
    "layers": "the same, and of the U-Net one layer at a time",
}
WORK = 2 * 2**30  # bytes beside the weights: what an image of usual size needs on its way


class Room:
    """Memory of a device, for one of several networks at a time; one batch of images at a time uses it."""

    def __init__(self, device: torch.device, layers: bool) -> None:
        self.device = device
        self.layers = layers
        self.lock = threading.RLock()
        self.guests: set[nn.Module] = set()
        self.present: nn.Module | None = None

    def add(self, model: Components) -> None:
        """Let the networks of a model, which are elsewhere now, take turns here."""
        for network in model.networks.values():
            if self.layers and isinstance(network, UNet):
                by_layers(network, self.device)
            else:
                self.guests.add(network)

    def bring(self, network: nn.Module) -> None:
        """Let a network in, and the one that is there out."""
        if network not in self.guests or network is self.present:
            return
        present, self.present = self.present, None
        with torch.inference_mode(False), torch.no_grad():  # where quantised weights could not move
            if present is not None:
                present.to("cpu")
            try:
                network.to(self.device)
            except BaseException:
                network.to("cpu")  # whole again
                raise
        self.present = network


def by_layers(unet: UNet, device: torch.device) -> None:
    """Let each layer of a U-Net have its weights on a device only while it computes; elsewhere they are on "meta"."""
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(unet, execution_device=device, offload=True, weights_map=dict(unet.state_dict()))


def room_for(models: Iterable[Components], offload: str, device: torch.device, dtype: torch.dtype) -> Room | None:
    """Where the networks of models, a base and perhaps its refiner, take turns; None if all of them stay.

    `offload` is a name of `OFFLOAD`.

    Raises:
        LdmError: it is none.
    """
    if offload not in OFFLOAD:
        raise LdmError(f"offload {offload!r} is not known; choose one of: {', '.join(OFFLOAD)}")
    if offload == "auto":
        if device.type != "cuda":
            return None
        free, sizes = torch.cuda.mem_get_info(device)[0], nbytes(models, dtype)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # which PyTorch keeps
        offload = choice(sizes, free)
        if offload != "none":
            log.warning(
                "the model has %.1f GB, of %s %.1f GB are free: %s (offload=%s)",
                sum(sizes.values()) / 1e9, device, free / 1e9, OFFLOAD[offload], offload,
            )  # fmt: skip
    return None if offload == "none" else Room(device, offload == "layers")


def nbytes(models: Iterable[Components], dtype: torch.dtype) -> dict[str, int]:
    """What the weights of each network will take, of a refiner those of its U-Net: the rest is the base's."""
    sizes: dict[str, int] = {}
    for number, model in enumerate(models):
        for name, network in model.modules().items():
            if not number or name == "unet":
                count = sum(parameter.numel() for parameter in network.parameters())
                sizes[f"{name}{number}"] = count * dtype.itemsize
    return sizes


def choice(sizes: Mapping[str, int], free: int) -> str:
    """How networks of these sizes fit into so many bytes: none, components or layers."""
    if sum(sizes.values()) + WORK <= free:
        return "none"
    return "components" if max(sizes.values()) + WORK <= free else "layers"
