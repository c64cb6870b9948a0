"""What the U-Net of a task reads beside noisy latents: nothing; a mask and the masked image; the image before an edit.

Inpainting: Rombach et al. 2022 (arXiv 2112.10752), section 4.5, as in Stable Diffusion's inpainting models. Editing by
instruction: InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800).

B batch, C latent channels, h×w height and width of the latents, H×W those of the images
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.loader import Batch
from ldm.data.masks import RULES
from ldm.errors import LdmError
from ldm.families import Family
from ldm.images import to_images
from ldm.training.conditioning import ConditioningDropout
from ldm.training.sections import DataSection
from ldm.training.stages.sections import BaseSection, DenoiserSection, RefinerSection

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels (B, 3, H, W) -> mean, deviation of unscaled latents
BESIDE = {"text": (), "inpaint": ("mask",), "edit": ("before",)}  # images beside each image that a task needs


class UNetTask(Protocol):
    """The inputs of a U-Net beside the text, and where its errors count."""

    masked: bool  # whether errors count by the masks of the data

    def complete(self, x: Tensor, batch: Batch, dropout: ConditioningDropout) -> Tensor:
        """Noisy latents (B, C, h, w) with the channels that are read beside them: (B, …, h, w)."""

    def example(self, batch: Batch, row: int) -> dict[str, Any]:
        """The settings of a call that makes an image as this row of a batch asks for."""


class FromText:
    """Text to image: noisy latents alone."""

    masked = True

    def complete(self, x: Tensor, batch: Batch, dropout: ConditioningDropout) -> Tensor:
        """The same latents."""
        return x

    def example(self, batch: Batch, row: int) -> dict[str, Any]:
        """Nothing beside the prompt."""
        return {}


class Inpainting:
    """The mask, a channel that is 1 where any pixel of a latent is white, and the scaled latents of the masked image.

    Args:
        latents: gives scaled latents of a batch's pixels, drawn from the posterior for a purpose.
    """

    masked = False

    def __init__(self, latents: Callable[[Batch, str], Tensor]) -> None:
        self.latents = latents

    @torch.no_grad()
    def complete(self, x: Tensor, batch: Batch, dropout: ConditioningDropout) -> Tensor:
        """Latents, mask, latents of the masked image: (B, 2C + 1, h, w)."""
        assert batch.pixels is not None
        white = batch.beside["mask"] >= 0.5
        known = self.latents(replace(batch, pixels=batch.pixels * ~white, moments=None), "masked posterior")
        height, width = x.shape[2:]
        return torch.cat([x, F.adaptive_max_pool2d(white.to(x), (height, width)), known.to(x)], dim=1)

    def example(self, batch: Batch, row: int) -> dict[str, Any]:
        """The image and its mask, or a white one where the crop shows no part of it."""
        assert batch.pixels is not None
        mask = batch.beside["mask"][row]
        if not bool((mask >= 0.5).any()):
            mask = torch.ones_like(mask)
        (image,) = to_images(batch.pixels[row : row + 1])
        return {"image": image, "mask": Image.fromarray((255 * mask[0]).round().byte().cpu().numpy())}


class Editing:
    """The mode of the unscaled latents of the image before the edit, zeros where it is dropped.

    Args:
        encode: encodes images.
        seed: of the run.
    """

    masked = True

    def __init__(self, encode: Encode, seed: int) -> None:
        self.encode = encode
        self.seed = seed

    @torch.no_grad()
    def complete(self, x: Tensor, batch: Batch, dropout: ConditioningDropout) -> Tensor:
        """Latents, latents of the image before: (B, 2C, h, w)."""
        before, _ = self.encode(batch.beside["before"])
        kept = ~dropout.images(self.seed, batch.keys, batch.epochs)
        return torch.cat([x, (before * kept.to(before)[:, None, None, None]).to(x)], dim=1)

    def example(self, batch: Batch, row: int) -> dict[str, Any]:
        """The image before the edit."""
        (image,) = to_images(batch.beside["before"][row : row + 1])
        return {"image": image}


def task_of(family: Family, latents: Callable[[Batch, str], Tensor], encode: Encode, seed: int) -> UNetTask:
    """The task of a family's U-Net; the arguments are those of the tasks."""
    tasks: dict[str, UNetTask] = {"inpaint": Inpainting(latents), "edit": Editing(encode, seed)}
    return tasks.get(family.task, FromText())


def check_task(name: str, section: DenoiserSection, family: Family, data: DataSection) -> None:
    """Raise unless a stage can train the U-Net of a family on these data.

    Raises:
        LdmError: the kind of stage cannot, or something is missing, or has no meaning for the task.
    """
    if isinstance(section, RefinerSection) and family.task == "text":
        return  # the images beside may be for the base
    if isinstance(section, BaseSection) and family.task != "edit":
        for key in ("drop_before", "drop_both"):
            if getattr(section, key) != type(section).model_fields[key].default:
                raise LdmError(f"{name}.{key}: the U-Net of {family.name} reads no image before an edit; leave it out")
    if family.task == "text":
        _check_plain(family, data)
        return
    if not isinstance(section, BaseSection):
        raise LdmError(
            f"{name}: the U-Net of {family.name} edits images, for which the stages base, adapter and "
            "textual-inversion train; start from a text-to-image model"
        )
    for kind in set(BESIDE[family.task]) - data.beside.named().keys():
        drawn = " (random draws masks)" if kind == "mask" else ""
        raise LdmError(
            f"data.beside.{kind}: the U-Net of {family.name} reads it; name a folder with the same names, or a column "
            f"of the data{drawn}"
        )
    if section.evaluation.every:
        raise LdmError(f"{name}.evaluation.every: a U-Net that edits makes no images of captions alone; leave it out")
    if section.outside_mask and family.task == "inpaint":
        raise LdmError(f"{name}.outside_mask: the loss of a U-Net that inpaints is of the whole image; leave it out")
    if section.prior.prompt:
        raise LdmError(f"{name}.prior.prompt: class images have no {BESIDE[family.task][0]} beside them; leave it out")


def _check_plain(family: Family, data: DataSection) -> None:
    """Raise if there are images beside others that only a U-Net of another task reads."""
    channels = family.unet.out_channels + family.autoencoder.channels_out
    if data.beside.before:
        raise LdmError(
            f"data.beside.before: the U-Net of {family.name} does not edit images; start from one that does, set "
            f"model.unet={{in_channels: {channels}}} to make it one, or leave it out"
        )
    if data.beside.mask in RULES:
        raise LdmError(
            f"data.beside.mask: the U-Net of {family.name} does not inpaint, and {data.beside.mask} masks do not say "
            f"where errors count; start from one that does, set model.unet={{in_channels: {channels + 1}}} to make it "
            "one, or leave it out"
        )
