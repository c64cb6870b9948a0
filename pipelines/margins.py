"""Outpainting: an image is extended by margins, which are made anew.

The image lies on a larger canvas, and a mask is white in the margins and in a strip of the image beside each of them.
All that follows is inpainting (`pipelines.tasks.inpaint`). The strip is made anew because the autoencoder, which sees
some pixels around each latent, mixes the canvas into the latents at the image's edges, and so that the mask ends where
a latent does. The canvas goes on with the colours of each edge, because the autoencoder lets all of it change the
tone of each latent. With the built-in model the step at a seam is 1.7 times as high if the mask ends elsewhere, and 1.4
times on a canvas that is grey, or has a mean of the image's colours.

Margins are pixels beside the left, upper, right and lower side of an image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from ldm.errors import LdmError
from ldm.images import MOST_PIXELS, check_same_size
from pipelines.settings import LARGEST_SIDE

log = logging.getLogger(__name__)
Margins = tuple[int, int, int, int]  # left, top, right, bottom
OVERLAP = 16  # pixels: the largest width of the strips
LARGE = 512  # pixels of an image's longer side, from which on they grow with it: large images are often made smaller
MOST_OF_SIDE = 4  # parts of a side, of which a strip is at most one
LATENT = 8  # pixels: a side of what a latent stands for
BLUR = 8  # pixels: the radius of the canvas's blur in the margins


def each_margin(given: int | Sequence[int]) -> Margins:
    """The four margins of a value of the setting `margins`."""
    left, top, right, bottom = (given,) * 4 if isinstance(given, int) else given
    return left, top, right, bottom


def canvas_size(size: tuple[int, int], margins: int | Sequence[int]) -> tuple[int, int]:
    """Width and height of an image of that size with its margins."""
    left, top, right, bottom = each_margin(margins)
    return size[0] + left + right, size[1] + top + bottom


def rounded_margins(given: int | Sequence[int], size: tuple[int, int], factor: int) -> Margins:
    """The margins of an image of that size, enlarged so that the canvas's sides are multiples of `factor`.

    The right and the lower one grow, unless the one across alone is asked for. That is logged.
    """
    found = list(each_margin(given))
    for near, side in enumerate(canvas_size(size, given)):
        found[near if found[near] and not found[near + 2] else near + 2] += -side % factor
    left, top, right, bottom = found
    margins = (left, top, right, bottom)
    if margins != each_margin(given):
        log.warning(
            "margins %s are enlarged to %s, so that the sides of the image are multiples of %d",
            *(",".join(map(str, one)) for one in (each_margin(given), margins)), factor,
        )  # fmt: skip
    return margins


def extended(image: Image.Image, mask: Image.Image | None, margins: Margins) -> tuple[Image.Image, Image.Image]:
    """An image (RGB) on its canvas, and the canvas's mask (L), to which a mask of the image is added.

    In the margins the canvas has the colours of the image's edges, blurred.

    Raises:
        LdmError: the mask has another size than the image, or the canvas is too large.
    """
    width, height = canvas_size(image.size, margins)
    if max(width, height) > LARGEST_SIDE or width * height > MOST_PIXELS:
        raise LdmError(
            f"margins {','.join(map(str, margins))}: the image would have {width}×{height} pixels; at most "
            f"{LARGEST_SIDE} a side, and {MOST_PIXELS:,} in all, are possible"
        )
    if mask is not None:
        check_same_size(mask, image)
    left, top, right, bottom = margins
    edges = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    canvas = Image.fromarray(edges).filter(ImageFilter.GaussianBlur(BLUR))
    canvas.paste(image, (left, top))
    kept = _kept(image.size, margins)
    white = Image.new("L", (width, height), 255)
    white.paste(0 if mask is None else mask.crop(kept), (left + kept[0], top + kept[1], left + kept[2], top + kept[3]))
    return canvas, white


def _kept(size: tuple[int, int], margins: Margins) -> tuple[int, int, int, int]:
    """The part of an image of that size between the strips: left, top, right, bottom."""
    strips = [
        _strip(margin, min(OVERLAP * max(*size, LARGE) // LARGE, size[place % 2] // MOST_OF_SIDE)) if margin else 0
        for place, margin in enumerate(margins)
    ]
    return strips[0], strips[1], size[0] - strips[2], size[1] - strips[3]


def _strip(margin: int, most: int) -> int:
    """The width of the strip beside a margin: the largest up to `most` that ends where a latent does, if one does."""
    beyond = (margin + most) % LATENT
    return most - beyond if beyond < most else most
