"""The image encoder of an IP-Adapter: CLIP's vision tower by transformers, from a folder or the Hub.

B images, P patches with the class token, F channels of the patches, E channels of the embedding
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError, first_line, listing
from ldm.models.image_prompt import ImagePromptConfig
from ldm.weights.names import HUB_ID

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of colours 0 to 1


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP's vision tower, in evaluation mode."""

    tower: Any  # transformers' CLIPVisionModelWithProjection

    @torch.inference_mode()
    def embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """The embeddings of images: (B, E)."""
        return self._read(self._pixels(images), patches=False)

    @torch.inference_mode()
    def patches(self, images: Sequence[Image.Image]) -> Tensor:
        """The patches of images in the last layer but one: (B, P, F)."""
        return self._read(self._pixels(images), patches=True)

    @torch.inference_mode()
    def blank_patches(self) -> Tensor:
        """The patches of an image whose normalised colours are zero: (1, P, F)."""
        size, weight = self.tower.config.image_size, next(self.tower.parameters())
        pixels = torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device)
        return self._read(pixels, patches=True)

    @torch.no_grad()
    def features(self, pixels: Tensor, patches: bool) -> Tensor:
        """The features of images (B, 3, H, W) in [-1, 1]: patches (B, P, F), or embeddings (B, E)."""
        weight, size = next(self.tower.parameters()), self.tower.config.image_size
        return self._read(prepared_pixels(pixels.to(weight.device), size).to(weight.dtype), patches)

    def _read(self, pixels: Tensor, patches: bool) -> Tensor:
        """The patches of prepared pixels (B, 3, S, S) in the last layer but one, or their embeddings."""
        if patches:
            return self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        return self.tower(pixels).image_embeds

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        weight = next(self.tower.parameters())
        size = self.tower.config.image_size
        return torch.stack([prepared(image, size) for image in images]).to(weight.device, weight.dtype)

    def check(self, config: ImagePromptConfig) -> None:
        """Raise unless an IP-Adapter reads features of this encoder's width.

        Raises:
            LdmError: it reads those of another encoder.
        """
        own = self.tower.config.hidden_size if config.reads_patches else self.tower.config.projection_dim
        if own != config.features:
            raise LdmError(
                f"this IP-Adapter reads image features of {config.features} channels, and the image encoder gives "
                f"{own}: take the one that it was made with (image_encoder=, --image-encoder); ViT-H has patches of "
                "1280 channels and embeddings of 1024, ViT-bigG of 1664 and 1280"
            )


def prepared(image: Image.Image, size: int) -> Tensor:
    """An image as CLIP reads it: (3, size, size), its shorter side scaled to `size`, the middle, normalised."""
    image = image.convert("RGB")
    short, long = sorted(image.size)
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def prepared_pixels(pixels: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as `prepared`, but for rounding and clipping in between: (B, 3, size, size)."""
    short, long = sorted(pixels.shape[2:])
    longer = int(size * long / short)
    height, width = (longer, size) if pixels.shape[3] <= pixels.shape[2] else (size, longer)
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels.float(), size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (height - size) // 2, (width - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size] / 2 + 0.5
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def blank_encoder(source: str | PathLike[str]) -> Any:
    """An image encoder's network, from its configuration alone, with random weights on the default device.

    Raises:
        LdmError: there is none.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    name, folder = _place(source)
    try:
        return CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(name, subfolder=folder))
    except Exception as error:  # those of files, of the Hub and of transformers' own checks
        raise LdmError(f"image encoder {source}: {first_line(error)}") from None


def load_image_encoder(
    source: str | PathLike[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    allow_pickle: bool = False,
) -> ImageEncoder:
    """Load an image encoder: the folder of a `CLIPVisionModelWithProjection`, or of a whole model that has one as
    `image_encoder`, or a Hub name, with the folder within the repository after it (owner/name/models/image_encoder).

    Raises:
        LdmError: there is none, or it lacks weights.
    """
    from transformers import CLIPVisionModelWithProjection  # takes seconds

    name, folder = _place(source)
    safe = None if allow_pickle else True
    try:
        with _without_progress_bar():
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                name, subfolder=folder, dtype=dtype, use_safetensors=safe, output_loading_info=True
            )
    except Exception as error:  # those of files, of the Hub and of transformers' own checks
        raise LdmError(f"image encoder {source}: {first_line(error)}") from None
    tower, found = loaded
    lacking = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    if lacking:
        raise LdmError(f"{name} is no CLIP vision tower: it lacks {listing(sorted(lacking))}")
    return ImageEncoder(tower.eval().requires_grad_(False).to(device))


def _place(source: str | PathLike[str]) -> tuple[str, str]:
    """The folder of an image encoder, or its Hub name and the folder within the repository.

    Raises:
        LdmError: the source is neither.
    """
    path = Path(source)
    if (path / "image_encoder").is_dir():
        path = path / "image_encoder"
    name, folder = (str(path), "") if path.exists() else _on_hub(str(source))
    if not name or path.is_file():
        raise LdmError(f"{path}: an image encoder's folder (config.json, model.safetensors) or Hub name is needed")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LdmError(f"{path} is no image encoder's folder: it has no config.json")
    return name, folder


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """A context in which transformers shows no progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _on_hub(source: str) -> tuple[str, str]:
    """The Hub name and the folder within the repository that a source stands for; empty if it is no Hub name."""
    parts = source.strip("/").split("/")
    name = "/".join(parts[:2])
    return (name, "/".join(parts[2:])) if HUB_ID.fullmatch(name) else ("", "")
