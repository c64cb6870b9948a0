"""Joint calls of networks: the rows of several runs in one call.

A run is the ordinary code of a pipeline, as a coroutine (a greenlet): where it calls a network of `waiting`, it is
suspended, and its call is handed to whoever runs the runs. Calls with the same key can be made together. A U-Net's call
then has a timestep, a text and a guidance scale of its own for each row, because the layers that read these are
replaced by their outputs, (B, …) each, before the steps (`ldm.runtime.precomputing`), and outputs can be joined.

B rows of a call, C latent channels, h×w height and width of the latents, H×W height and width in pixels
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_not
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ldm.models.autoencoder import Autoencoder, AutoencoderKL, VQModel
from ldm.models.surgery import rebuilt
from ldm.models.text import TextEncoders
from ldm.models.unet import Conditioning, UNet
from ldm.runtime.graphs import admit, unrecorded
from ldm.runtime.precomputing import PrecomputedOutput, TimestepOutput, precomputed_outputs, reads_conditioning
from pipelines.batching import decodable

N = TypeVar("N", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # values that are compared by their value


class Run(greenlet):
    """A coroutine whose calls of networks are made by its parent."""


class NetworkCall(ABC):
    """A call of a network by a run."""

    key: Hashable  # equal for calls that can be made together
    size: Hashable  # equal for calls that need equally much memory
    most: int = 2**31  # calls that are made together

    @abstractmethod
    def alone(self) -> Any:
        """The result of this call."""

    @classmethod
    @abstractmethod
    def together(cls, calls: Sequence[Any], joints: Joints) -> list[Any]:
        """The results of several calls of this class with the same key."""


def result_of(call: NetworkCall) -> Any:
    """The result of a call: within a run from its parent, otherwise at once."""
    here = getcurrent()
    return cast("greenlet", here.parent).switch(call) if isinstance(here, Run) else call.alone()


# --- networks that wait -----------------------------------------------------------------------------------------------


def waiting(network: N) -> N:
    """A copy of a network, on the same weights, whose calls wait within a run; of one that is called directly, itself.

    Of a U-Net all calls wait, of an autoencoder `decode`, of text encoders `encode`.
    """
    for kind in (WaitingUNet, WaitingAutoencoder, WaitingTextEncoders):
        if isinstance(network, kind.waits):
            other = copy.copy(network)
            other.__class__ = _waiting(kind, cast("Any", type(network)))
            if isinstance(network, UNet):
                admit(network, cast("UNet", other))  # those that record their steps know layers by their classes
            return other
    return network


@cache
def _waiting(kind: type, network: type) -> type:
    return type(f"Waiting{network.__name__}", (kind, network), {})


class WaitingUNet(nn.Module):
    """The part of a U-Net's class that lets its calls wait."""

    waits = UNet

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return result_of(UNetCall(cast("UNet", self), x, t, cond))


class WaitingAutoencoder(nn.Module):
    """The part of an autoencoder's class that lets decoding wait."""

    waits = (AutoencoderKL, VQModel)

    def decode(self, z: Tensor) -> Tensor:
        return result_of(DecoderCall(cast("Autoencoder", self), z))


class WaitingTextEncoders(nn.Module):
    """The part of the text encoders' class that lets encoding wait."""

    waits = TextEncoders

    def encode(self, tokens: Sequence[Tensor], clip_skip: int = 0) -> Conditioning:
        return result_of(TextCall(self, tokens, clip_skip))


# --- calls ------------------------------------------------------------------------------------------------------------


class UNetCall(NetworkCall):
    """A call of a U-Net that is `precomputed` for its run."""

    def __init__(self, unet: UNet, x: Tensor, t: Tensor, cond: Conditioning) -> None:
        self.unet, self.x, self.t, self.cond = unet, x, t, cond
        self.size = (UNetCall, x.shape[1:])
        self.key = (*self.size, structure(unet), x.dtype)

    def alone(self) -> Tensor:
        return called(self.unet, self.x, self.t, self.cond)

    @classmethod
    def together(cls, calls: Sequence[UNetCall], joints: Joints) -> list[Tensor]:
        first, unet = calls[0], joints.of([call.unet for call in calls])
        result = called(unet, torch.cat([call.x for call in calls]), first.t, first.cond)  # it reads no t and cond
        return list(result.split([len(call.x) for call in calls]))


class DecoderCall(NetworkCall):
    """A call of an autoencoder's decoder."""

    def __init__(self, autoencoder: Autoencoder, z: Tensor) -> None:
        self.autoencoder, self.z = autoencoder, z
        self.size = (DecoderCall, z.shape[1:])
        self.key = (*self.size, id(autoencoder), z.dtype)
        factor = autoencoder.config.factor
        self.most = max(1, decodable(factor * z.shape[2], factor * z.shape[3]) // len(z))

    def alone(self) -> Tensor:
        return super(WaitingAutoencoder, self.autoencoder).decode(self.z)  # type: ignore[misc]

    @classmethod
    def together(cls, calls: Sequence[DecoderCall], joints: Joints) -> list[Tensor]:
        images = cls(calls[0].autoencoder, torch.cat([call.z for call in calls])).alone()
        return list(images.split([len(call.z) for call in calls]))


class TextCall(NetworkCall):
    """A call of text encoders."""

    def __init__(self, encoders: nn.Module, tokens: Sequence[Tensor], clip_skip: int) -> None:
        self.encoders, self.tokens, self.clip_skip = encoders, tokens, clip_skip
        self.size = TextCall
        self.key = (TextCall, id(encoders), clip_skip)

    def alone(self) -> Conditioning:
        return super(WaitingTextEncoders, self.encoders).encode(self.tokens, self.clip_skip)  # type: ignore[misc]

    @classmethod
    def together(cls, calls: Sequence[TextCall], joints: Joints) -> list[Conditioning]:
        tokens = [torch.cat(rows) for rows in zip(*(call.tokens for call in calls), strict=True)]
        cond = cls(calls[0].encoders, tokens, calls[0].clip_skip).alone()
        results, end = [], 0
        for call in calls:
            begin, end = end, end + len(call.tokens[0])
            results.append(cond.rows(slice(begin, end)))
        return results


def called(unet: UNet, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The result of a U-Net of `waiting`, at once."""
    return super(WaitingUNet, unet).__call__(x, t, cond)  # type: ignore[misc]


# --- joint U-Nets -----------------------------------------------------------------------------------------------------


class JointUNet:
    """A U-Net for the rows of several, which have the same `structure`."""

    def __init__(self, unet: UNet) -> None:
        """Make it like one of them, without rows."""
        joint = {id(layer): type(layer)(layer.output) for layer in layers_of(unet).outputs}
        joined = rebuilt(
            unet, lambda module: {name: joint[id(part)] for name, part in module.named_children() if id(part) in joint}
        )
        self.unet = unrecorded(joined)  # the number of rows changes often, and each needs a recording
        self.layers = list(joint.values())
        self.unets: list[UNet] = []

    def take(self, unets: Sequence[UNet]) -> UNet:
        """The joint U-Net with the outputs of several at their present timesteps."""
        others = len(self.unets) != len(unets) or any(map(is_not, self.unets, unets))
        self.unets = list(unets)
        for layer, *column in zip(self.layers, *(layers_of(unet).outputs for unet in unets), strict=True):
            if others or isinstance(layer, TimestepOutput):
                layer.output = torch.cat([one.output for one in column])
        return self.unet


class Joints:
    """The joint U-Nets of the present step and of the last one, by what is the same in their parts."""

    def __init__(self) -> None:
        self.last: dict[Hashable, JointUNet] = {}
        self.present: dict[Hashable, JointUNet] = {}

    def of(self, unets: Sequence[UNet]) -> UNet:
        """The joint U-Net of several at their present timesteps."""
        key = structure(unets[0])
        joint = self.present.get(key) or self.last.get(key) or JointUNet(unets[0])
        self.present[key] = joint
        return joint.take(unets)

    def next_step(self) -> None:
        """Forget those that the present step has not used."""
        self.last, self.present = self.present, {}


class Structure:
    """What is the same in U-Nets whose calls can be made together: one object for all of them."""


@dataclass(frozen=True)
class UNetLayers:
    """What joint calls need of a U-Net's layers."""

    outputs: list[PrecomputedOutput]
    structure: Structure | None  # None: its calls are made alone


_LAYERS: WeakKeyDictionary[UNet, UNetLayers] = WeakKeyDictionary()
_STRUCTURES: WeakValueDictionary[Hashable, Structure] = WeakValueDictionary()  # by all that is the same


def layers_of(unet: UNet) -> UNetLayers:
    """The layers of a U-Net, looked at once."""
    if unet not in _LAYERS:
        joins = not reads_conditioning(unet)
        same = _STRUCTURES.setdefault(tuple(_parts(unet)), Structure()) if joins else None
        _LAYERS[unet] = UNetLayers(precomputed_outputs(unet), same)
    return _LAYERS[unet]


def structure(unet: UNet) -> Hashable:
    """The same object for U-Nets with the same layers, and precomputed outputs of the same shapes.

    Modules that hold layers may be copies, if all their values are equal plain ones or the same objects. So a patch
    with a state of its own (DeepCache), or one that depends on a row's place in the batch (perturbed attention), leaves
    a run's calls alone.
    """
    return layers_of(unet).structure or id(unet)


def _parts(network: nn.Module) -> Iterator[Hashable]:
    for name, module in network.named_modules():
        if isinstance(module, PrecomputedOutput):
            yield name, type(module), module.output.shape[1:], module.output.dtype
        elif not module._modules:
            yield name, id(module)
        else:
            own = {key: value for key, value in vars(module).items() if key in HOOKS or not key.startswith("_")}
            yield name, type(module), _comparable(own)


def _comparable(value: Any) -> Hashable:
    """Plain values, and what consists of them, as they are; other objects by their identity.

    Objects that hold nothing from one call to the next say so (`of_one_call`): they are all alike.
    """
    if isinstance(value, PLAIN):
        return value
    if getattr(value, "of_one_call", False):
        return type(value).__qualname__
    if isinstance(value, (tuple, list)):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((key, _comparable(part)) for key, part in value.items())
    return id(value)
