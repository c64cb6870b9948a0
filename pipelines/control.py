"""Control models in a pipeline: ControlNets and T2I-Adapters, their condition images, and the steps in which they act.

B images, H×W height and width in pixels, C channels, h×w height and width of a map, R residuals or features
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.conditions.table import check_kind
from ldm.errors import LdmError, listing
from ldm.families import Family
from ldm.images import mask_to_tensor
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.controlnet import ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.patches.controlnet import NamedControlNet
from ldm.patches.t2i_adapter import NamedFeatures
from ldm.weights.control_models import ControlModel, check_fits, open_control_model
from pipelines.control_images import EACH, MASKED, READY, ControlImage
from pipelines.passes import largest_request
from pipelines.request import Request
from pipelines.run import Attached, SamplingRun, check_acting
from pipelines.settings import LOADING, find
from pipelines.tuning import Tuning, room_of

log = logging.getLogger(__name__)


def load_control_models(
    given: Any, model: LatentDiffusion, tuning: Tuning, allow_pickle: bool
) -> dict[str, ControlModel]:
    """Control models by name, on a model's device and tuned like it: sources, or networks that are loaded.

    Those of a list have their numbers as names.

    Raises:
        LdmError: one cannot be loaded, or does not fit the model.
    """
    if given is None or given in ((), [], {}):
        return {}
    given = find("control_models", "python", rows=LOADING).check(given)
    if not isinstance(given, Mapping):
        given = {str(number): one for number, one in enumerate(given if isinstance(given, (tuple, list)) else (given,))}
    found: dict[str, ControlModel] = {}
    for name, source in given.items():
        if isinstance(source, ControlNet | T2IAdapter):
            check_fits(f"control model {name}", source.config, model.family)
            network = source.to(_place(source, model), model.dtype)
        elif not isinstance(source, (str, PathLike)):
            raise LdmError(
                f"control model {name}: a {type(source).__name__} is neither a path nor a ControlNet or T2IAdapter of "
                "ldm; give a folder, file or Hub name"
            )
        else:
            opened = open_control_model(source, model.family, allow_pickle=allow_pickle)
            network = opened.load(model.dtype, _place(opened.network, model))
        found[name] = tuning.beside(network, model)
    return found


def _place(network: ControlModel, model: LatentDiffusion) -> torch.device:
    """The device that keeps a control model's weights: the CPU if the model's layers take turns on its device."""
    room = room_of(model)
    by_layers = room is not None and room.layers and isinstance(network, ControlNet)
    return torch.device("cpu") if by_layers else model.device


def models_for(images: Sequence[ControlImage], models: Mapping[str, ControlModel]) -> list[ControlModel]:
    """The control model of each condition image.

    Of models with numbers as names, an image has the only one, or that with its number. Of others, it has the one with
    its kind as name; an image that is taken as it is may have the only one whose name is no image's kind.

    Raises:
        LdmError: an image has no model.
    """
    names, kinds = list(models), [image.kind for image in images]
    if all(name.isdecimal() for name in names):
        if len(names) != 1 and len(names) < len(images):
            raise LdmError(
                f"{len(names) or 'no'} control models for {len(images)} condition images; name one for each "
                "(control_models=, --control-model)"
            )
        return [models[names[0 if len(names) == 1 else number]] for number in range(len(images))]
    left = [name for name in names if name not in kinds]
    found = []
    for kind in kinds:
        name = left[0] if kind == READY and kind not in models and len(left) == 1 else kind
        if name not in models:
            raise LdmError(
                f"control {kind}: no control model is named {kind}; there are {listing(names)}: choose the kind of "
                "one, or name one so (control_models=)"
            )
        found.append(models[name])
    return found


def check_control(request: Request, family: Family, models: Mapping[str, ControlModel]) -> None:
    """Raise unless each condition image has a model, and the settings fit them; say which images are resized.

    Raises:
        LdmError: something does not fit.
    """
    controls = controls_of(request, models)
    if controls and request.task == "edit":
        raise LdmError(f"a {family.name} model edits in its own way; leave control out")
    if controls and len(models) > len(controls) and all(name.isdecimal() for name in models):
        log.warning("%d control models for %d condition images: the last ones are not used", len(models), len(controls))
    sides, second = (request.width, request.height), largest_request(request, family)
    for one in controls:
        image = one.image
        if image.kind == MASKED and request.mask is None:
            raise LdmError(f"control {MASKED}: it hides the masked part of an image: give a mask (mask=, --mask)")
        if image.kind == MASKED and request.margins and image.given.size != sides:
            raise LdmError(
                f"control {MASKED}: with margins its image needs them too, {sides[0]}×{sides[1]} pixels in all, of any "
                "colours there"
            )
        check_acting(one, "control", request)
        check_kind(image.kind)
        for width, height in (sides, (second.width, second.height)):
            factor = one.network.config.factor
            if isinstance(one.network, T2IAdapter) and (width % factor or height % factor):
                raise LdmError(
                    f"control {image.kind}: this T2I-Adapter needs sides that are multiples of {factor}, not "
                    f"{width}×{height} (size, hires)"
                )
        if image.given.size != sides:
            width, height = image.given.size
            log.warning("control %s: its image of %d×%d is resized to %d×%d", image.kind, width, height, *sides)


def controls_of(request: Request, models: Mapping[str, ControlModel]) -> list[Control]:
    """The control models of a request, each with its condition image and settings.

    Raises:
        LdmError: a setting has another number of values than there are condition images, or a model is missing.
    """
    images = request.control
    networks = models_for(images, models)
    parts = {name: _for_each(name, getattr(request, name), len(images)) for name in EACH}
    return [
        Control(
            name=f"control.{number}", network=networks[number], image=image, guess=request.guess,
            mask=request.mask if image.kind == MASKED else None,
            scale=parts["control_scale"][number], fall=parts["control_fall"][number],
            begin=parts["control_begin"][number], end=parts["control_end"][number],
        )
        for number, image in enumerate(images)
    ]  # fmt: skip


def _for_each(name: str, value: Any, count: int) -> Sequence[float]:
    """A setting's value for each condition image."""
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count and count:
        raise LdmError(f"{name} {value!r}: one number, or one for each of the {count} condition images, is needed")
    return values


@dataclass(frozen=True)
class Control:
    """A control model with its condition image, as an attachment of a run."""

    name: str
    network: ControlModel
    image: ControlImage
    scale: float = 1.0
    fall: float = 1.0  # factor from each residual's or feature's scale to that of the one before, less deep
    begin: float = 0.0  # part of the steps
    end: float = 1.0
    guess: bool = False
    mask: Image.Image | None = None  # white: hidden in the condition image

    def prepare(self, run: SamplingRun) -> Attached:
        """The patch and its inputs for a run: images embedded, features computed, scales for each row."""
        pixels = self.pixels(run.request.width, run.request.height).to(run.device, run.dtype)
        rows = run.shape[0]
        if isinstance(self.network, T2IAdapter):
            features = self.network(pixels)
            scales = self.scales(len(features)).to(run.device, run.dtype)
            # here and below, of their own memory, into which recorded steps copy
            scaled = [
                (scales[number] * one).expand(rows, -1, -1, -1).contiguous() for number, one in enumerate(features)
            ]
            inputs = {
                f"{self.name}.{number}": (one, torch.zeros_like(one) if self.guess else one)
                for number, one in enumerate(scaled)
            }
            return Attached("t2i_adapters", NamedFeatures(self.name, len(features)), inputs)
        image = self.network.embed_image(pixels).expand(rows, -1, -1, -1).contiguous()
        scales = self.scales(len(self.network.config.skips) + 1).to(run.device, run.dtype)
        scales = scales.expand(rows, -1).contiguous()
        # in guess mode, only the prompt's half is controlled
        alone = self.guess or self.network.config.pooled
        inputs = {
            f"{self.name}.image": (image, image),
            f"{self.name}.scales": (scales, torch.zeros_like(scales) if alone else scales),
        }
        return Attached("controlnets", NamedControlNet(self.network, self.name), inputs)

    def scales(self, count: int) -> Tensor:
        """The scale of each of `count` residuals or features, the deepest last: (count,)."""
        scales = self.scale * self.fall ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        if self.guess and isinstance(self.network, ControlNet) and not self.network.config.pooled:
            scales = scales * torch.logspace(-1, 0, count)
        return scales.float()

    def pixels(self, width: int, height: int) -> Tensor:
        """The condition image at a run's size: (1, 3 or 1, H, W) in [0, 1]; hidden pixels are -1."""
        image = self.image.at(width, height)
        if isinstance(self.network, T2IAdapter) and self.network.config.in_channels == 1:
            image = image.convert("L")
        pixels = torch.from_numpy(np.asarray(image).copy()).float().view(height, width, -1).permute(2, 0, 1)[None] / 255
        if self.mask is not None:
            pixels[mask_to_tensor(self.mask, width, height).expand_as(pixels) >= 0.5] = -1
        return pixels
