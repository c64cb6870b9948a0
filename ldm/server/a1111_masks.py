"""Inpainting as AUTOMATIC1111's API asks for it: soft edges, the masked part alone, colours around it.

A job makes what is under its mask anew. Here the mask is grown by its soft edge, and the made image is blended over the
original through the soft mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from ldm.errors import LdmError
from ldm.images import WHITE, check_same_size

RADII = (256, 64, 16, 4)  # of the blurs that fill a mask with the colours around it, from coarse to fine
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class MaskSettings:
    """How a mask is used."""

    blur: tuple[float, float] = (4.0, 4.0)  # of its edge: standard deviations in x and y, in pixels
    fill: bool = True  # whether what is under it becomes the colours around it first
    invert: bool = False  # whether black is made anew
    padding: int | None = None  # around the masked part, which is made alone and larger; None: the whole image
    mode: int = 0  # of resizing the whole image


@dataclass(frozen=True)
class MaskedPart:
    """Where made images belong: a part of an original, through a soft mask of the original's size."""

    original: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]  # left, top, right, bottom of the part

    def finished(self, made: Image.Image) -> Image.Image:
        """The original with a made image in its place."""
        left, top, right, bottom = self.box
        part = made.resize((right - left, bottom - top), LANCZOS)
        image = self.original.copy()
        image.paste(part, (left, top), self.mask.crop(self.box))
        return image


def inpainting(
    image: Image.Image, mask: Image.Image, asked: MaskSettings, size: tuple[int, int] | None
) -> tuple[Image.Image, Image.Image, MaskedPart]:
    """The image and the mask of a job, and where the made image belongs; `size` is the job's, by default the image's.

    Raises:
        LdmError: the mask has another size than the image, or nothing is to be made anew.
    """
    check_same_size(mask, image)
    if asked.padding is None and size is not None:
        image, mask = resized(image, size, asked.mode), resized(mask, size, asked.mode)
    mask = mask.point(lambda shade: 255 if (shade >= WHITE) != asked.invert else 0)
    if mask.getbbox() is None:
        raise LdmError("the mask has no white pixel (or no black one, if it is inverted): nothing would be made anew")
    soft = mask.filter(ImageFilter.GaussianBlur(asked.blur)) if any(asked.blur) else mask
    soft = ImageChops.lighter(soft, mask.point(lambda shade: 1 if shade else 0))  # a wide blur of little is all black
    box, start = (0, 0, *image.size), filled(image, mask) if asked.fill else image
    hidden = soft.point(lambda shade: 255 if shade else 0)
    if asked.padding is not None and size is not None:
        box = region(hidden, asked.padding, *size)
        start, hidden = start.crop(box).resize(size, LANCZOS), hidden.crop(box).resize(size, Image.Resampling.NEAREST)
    return start, hidden, MaskedPart(image, soft, box)


def region(mask: Image.Image, padding: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of an image around its mask, of the shape of `width` × `height` as far as the image allows."""
    found = mask.getbbox()
    assert found is not None
    left, top, right, bottom = found
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    wide = min(max(right - left, math.ceil((bottom - top) * width / height)), mask.width)
    high = min(max(bottom - top, math.ceil((right - left) * height / width)), mask.height)
    left = min(max((left + right - wide) // 2, 0), mask.width - wide)
    top = min(max((top + bottom - high) // 2, 0), mask.height - high)
    return left, top, left + wide, top + high


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An image (RGB) whose part under the white of a mask has the colours around it, nearer ones before others."""
    known = ImageChops.invert(mask)
    clear = image.copy()
    clear.putalpha(known)
    weighted, result = clear.convert("RGBa"), Image.new("RGBA", image.size, "grey")
    for radius in RADII:
        result = Image.alpha_composite(result, weighted.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA"))
    return Image.composite(image, result.convert("RGB"), known)


def resized(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    """An image of another size: stretched (mode 0), cropped (1), or whole, with its edges repeated around it (2)."""
    if image.size == size or mode == 0:
        return image.resize(size, LANCZOS)
    if mode == 1:
        return ImageOps.fit(image, size, LANCZOS)
    inner = ImageOps.contain(image, size, LANCZOS)
    if not all(inner.size):  # a narrow one: Pillow rounds its shorter side to 0
        inner = image.resize((max(inner.width, 1), max(inner.height, 1)), LANCZOS)
    (wide, high), array = (size[0] - inner.width, size[1] - inner.height), np.asarray(inner)
    around = [(high // 2, high - high // 2), (wide // 2, wide - wide // 2), (0, 0)]
    return Image.fromarray(np.pad(array, around[: array.ndim], mode="edge"))
