"""Images beside an image: its condition image, its mask, the image before an edit; framed exactly as their image.

They are read from files (`ldm.data.given`), or made of the framed image when it is loaded.

B rows, H×W height and width of the bucket, C channels: 1 of a mask, else 3
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.conditions.table import condition
from ldm.data.framing import Frame, to_pixels
from ldm.data.keyed import uniform
from ldm.data.masks import RULES


@dataclass(frozen=True)
class BesideKind:
    """How images of a kind are read."""

    mode: str  # PIL's, of the files
    signed: bool  # numbers from -1 to 1, not from 0 to 1


KINDS: Mapping[str, BesideKind] = {  # by their names in a batch
    "condition": BesideKind("RGB", signed=False),
    "mask": BesideKind("L", signed=False),
    "before": BesideKind("RGB", signed=True),
}


@dataclass(frozen=True)
class Framed:
    """An image at a visit, framed."""

    index: Any  # of the image in its plan
    seed: int  # of the run
    key: str  # of the image
    epoch: int
    frame: Frame
    render: Callable[[], np.ndarray]  # gives its pixels (H, W, 3) uint8; may raise LdmError

    @cached_property
    def pixels(self) -> np.ndarray:
        """The pixels (H, W, 3) uint8; errors as of `render`."""
        return self.render()


class Beside(Protocol):
    """Images beside the images of a plan, one for each. It can be pickled and sent to other processes."""

    def of(self, image: Framed) -> np.ndarray:
        """The image beside this one, in its frame: (H, W, C) uint8. Raises LdmError if it cannot be read."""


@dataclass(frozen=True)
class Made:
    """Condition images made of the framed images by a filter (`ldm.conditions.table`)."""

    kind: str

    def of(self, image: Framed) -> np.ndarray:
        """The condition image (H, W, 3) uint8."""
        return np.array(condition(self.kind, Image.fromarray(image.pixels)))


@dataclass(frozen=True)
class Drawn:
    """Masks drawn by a rule (`ldm.data.masks`), new ones at each visit."""

    rule: str

    def of(self, image: Framed) -> np.ndarray:
        """The mask (H, W, 1) uint8."""
        numbers = (uniform(image.seed, "mask", image.key, image.epoch, number) for number in count())
        return np.array(RULES[self.rule](image.frame.sides, numbers))[..., None]


def to_numbers(name: str, images: Tensor) -> Tensor:
    """Images beside others (B, H, W, C) uint8 as (B, C, H, W) float32, from 0 or -1 to 1 by their kind."""
    pixels = to_pixels(images)
    return pixels if KINDS[name].signed else pixels.add_(1).div_(2)
