"""Images without a watermark."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(seed: int, side: int = 256) -> Image.Image:
    """An image with the spectrum of a photograph."""
    random = np.random.default_rng(seed)
    squares = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.fftfreq(side)[None] ** 2
    squares[0, 0] = 1
    planes = [np.fft.ifft2(np.fft.fft2(random.normal(size=(side, side))) / squares**0.6).real for _ in range(3)]
    pixels = np.stack(planes, -1) / np.std(planes)
    gray = pixels.mean(-1, keepdims=True)
    return Image.fromarray(np.clip(128 + 60 * (gray + pixels) / 2, 0, 255).astype(np.uint8))
