"""Condition images that need no network. OpenCV draws the edges: ControlNets were trained on those of its Canny.

H×W height and width of an image
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ldm.errors import LdmError

THRESHOLDS = (100, 200)  # of Canny's gradients, as ControlNets have them
RADIUS = 9  # pixels, of the blur
REDUCED = 4  # how much smaller the image is without its details
_WIDE = 6  # pixels, the standard deviation of the blur that lines differ from


def opencv() -> Any:
    """OpenCV's module.

    Raises:
        LdmError: it is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise LdmError("edges are drawn by OpenCV, which is missing: pip install opencv-python-headless") from None
    return cv2


def canny(image: Image.Image) -> Image.Image:
    """Edges, white on black (Canny 1986)."""
    return Image.fromarray(opencv().Canny(np.asarray(image), *THRESHOLDS)).convert("RGB")


def lineart(image: Image.Image) -> Image.Image:
    """Dark lines as white ones on black: how far each pixel is below its surroundings, in the least different channel.

    Half of the clear differences are made brighter than 127.
    """
    pixels = np.asarray(image, np.float32)
    darker = (opencv().GaussianBlur(pixels, (0, 0), _WIDE) - pixels).min(axis=2).clip(0, 255)
    clear = darker[darker > 8]
    level = max(16.0, float(np.median(clear))) if len(clear) else 16.0
    return Image.fromarray((darker / level * 127).clip(0, 255).astype(np.uint8)).convert("RGB")


def gray(image: Image.Image) -> Image.Image:
    """The image without its colours."""
    return image.convert("L").convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """The image under a Gaussian blur."""
    return image.filter(ImageFilter.GaussianBlur(RADIUS))


def tile(image: Image.Image) -> Image.Image:
    """The image without its details: reduced, and enlarged again."""
    width, height = (max(1, round(side / REDUCED)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def same(image: Image.Image) -> Image.Image:
    """The image as it is."""
    return image
