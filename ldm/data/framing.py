"""Crops and buckets: how an image is resized, cropped and flipped at a visit, and SDXL's six time ids.

Buckets are pairs (width, height). At size 1024 they are SDXL's (arXiv 2307.01952, section 2.2 and appendix I). SDXL is
conditioned on the original size, the crop's top left corner in the resized image, and the size of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.keyed import uniform
from ldm.errors import LdmError, check_whole


@dataclass(frozen=True)
class Framing:
    """The settings of buckets and crops."""

    size: int = 1024  # every bucket has about size² pixels, and never more
    buckets: bool = True  # use buckets of many aspects; False: crop all images to squares
    step: int = 64  # the sides of buckets are multiples of this
    aspect: float = 4.0  # width / height of the widest bucket; the tallest has 1 / aspect
    crop: str = "random"  # or "center"
    crops: int = 0  # number of fixed crops of each image, which can be cached; 0: a new crop at each visit
    flip: bool = False  # every other visit shows the mirror image
    upscale: float = 1.25  # largest factor by which images are enlarged; images that need more are left out

    def __post_init__(self) -> None:
        check_whole("framing", "step", self.step, 8, 1024)
        check_whole("framing", "size", self.size, self.step, 8192)
        check_whole("framing", "crops", self.crops, 0, 64)
        if self.step % 8 or self.size % self.step:
            raise LdmError(f"framing: size {self.size} must be a multiple of step {self.step}, itself a multiple of 8")
        if not 1 <= self.aspect <= 16:
            raise LdmError(f"framing: aspect is {self.aspect}; it must be from 1 to 16")
        if not 1 <= self.upscale <= 64:
            raise LdmError(f"framing: upscale is {self.upscale}; it must be from 1 (never enlarge) to 64")
        if self.crop not in ("random", "center"):
            raise LdmError(f"framing: crop {self.crop!r} is not known; choose random or center")
        if self.crop == "center" and self.crops > 1:
            raise LdmError(f"framing: an image has one crop at its center, not {self.crops}; set crops to 1")

    @property
    def fixed(self) -> int:
        """The number of fixed crops of an image; 0 if each visit has a new crop."""
        return 1 if self.crop == "center" else self.crops

    def sides(self) -> list[tuple[int, int]]:
        """The buckets, tallest first, each with 90 to 100 % of size² pixels; for small sizes the nearest ones below."""
        if not self.buckets:
            return [(self.size, self.size)]
        area, found = self.size**2, dict[float, tuple[int, int]]()
        for side in range(self.step, int(self.size * math.sqrt(self.aspect)) + 1, self.step):
            largest = area // side // self.step * self.step
            smallest = min(math.ceil(0.9 * area / side / self.step) * self.step, largest)
            for other in range(smallest, largest + 1, self.step):
                if other and max(side, other) <= self.aspect * min(side, other):
                    for pair in ((side, other), (other, side)):
                        found[pair[0] / pair[1]] = max(pair, found.get(pair[0] / pair[1], pair))
        return [found[aspect] for aspect in sorted(found)]


def choose_buckets(framing: Framing, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of nearest aspect (N,) and the factor of enlargement (N,), for images of these sizes (N,)."""
    sides = _sides(framing)
    aspects = np.log(sides[:, 0] / sides[:, 1])
    bucket = np.searchsorted((aspects[1:] + aspects[:-1]) / 2, np.log(widths / heights))
    return bucket, np.maximum(sides[bucket, 0] / widths, sides[bucket, 1] / heights)


@lru_cache
def _sides(framing: Framing) -> np.ndarray:
    return np.array(framing.sides(), dtype=np.float64)


@dataclass(frozen=True)
class Frame:
    """The crop of an image that a visit shows. All lengths are in pixels."""

    original: tuple[int, int]  # width and height of the image
    resized: tuple[int, int]  # width and height after resizing
    corner: tuple[int, int]  # left and top of the crop in the resized image, before the flip
    sides: tuple[int, int]  # width and height of the crop
    flip: bool

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's time ids: original height, width; top, left of the crop after the flip; height, width of the crop."""
        (width, height), (left, top) = self.original, self.corner
        if self.flip:
            left = self.resized[0] - self.sides[0] - left
        return height, width, top, left, self.sides[1], self.sides[0]


def fixed_frame(
    framing: Framing, key: str, number: int, flip: bool, original: tuple[int, int], sides: tuple[int, int]
) -> Frame:
    """Fixed crop `number` of an image. It does not depend on the run's seed, so that a cache serves all runs."""
    return _frame(framing, [uniform(0, f"fixed crop {axis}", key, number) for axis in "xy"], flip, original, sides)


def visit_frame(
    framing: Framing, seed: int, key: str, epoch: int, original: tuple[int, int], sides: tuple[int, int]
) -> Frame:
    """The frame of an image in an epoch."""
    number, flip = choose(framing, seed, key, epoch)
    if framing.fixed:
        return fixed_frame(framing, key, number, flip, original, sides)
    return _frame(framing, [uniform(seed, f"crop {axis}", key, epoch) for axis in "xy"], flip, original, sides)


def choose(framing: Framing, seed: int, key: str, epoch: int) -> tuple[int, bool]:
    """The number of the fixed crop that a visit shows, and whether the crop is mirrored."""
    number = int(uniform(seed, "crop number", key, epoch) * framing.fixed)
    return number, framing.flip and uniform(seed, "flip", key, epoch) < 0.5


def _frame(
    framing: Framing, at: Sequence[float], flip: bool, original: tuple[int, int], sides: tuple[int, int]
) -> Frame:
    """The frame of an image that is resized to cover the bucket and cropped at position `at` (0 to 1 in x and y)."""
    at = (0.5, 0.5) if framing.crop == "center" else at
    scale = max(side / length for side, length in zip(sides, original, strict=True))
    width, height = (max(side, round(length * scale)) for side, length in zip(sides, original, strict=True))
    left, top = int(at[0] * (width - sides[0] + 1)), int(at[1] * (height - sides[1] + 1))
    return Frame(original, (width, height), (left, top), sides, flip)


def decoded_side(frame: Frame) -> int:
    """The shortest side to which a JPEG may be decoded: twice the resized side, so that resizing still filters."""
    return 2 * min(frame.resized)


def render(image: Image.Image, frame: Frame) -> np.ndarray:
    """The crop as (H, W, 3) uint8. The image may have been decoded at 1/2, 1/4 or 1/8 of its size."""
    (left, top), (width, height) = frame.corner, frame.sides
    if image.size == frame.resized:
        image = image.crop((left, top, left + width, top + height))
    else:  # resize the crop only; the filter also reads pixels around it, so the result is the same
        part = round(frame.original[0] / image.width)
        across, down = (frame.original[axis] / part / frame.resized[axis] for axis in (0, 1))
        right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
        shown = (left * across, top * down, right, bottom)
        image = image.resize(frame.sides, Image.Resampling.BICUBIC, box=shown)
    return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if frame.flip else image)


def to_pixels(images: Tensor) -> Tensor:
    """Rendered images (B, H, W, 3) uint8 as pixels (B, 3, H, W) float32 in [-1, 1]."""
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1)
