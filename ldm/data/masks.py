"""Masks for inpainting, drawn by rule: boxes and brush strokes, as in the training of LaMa (Suvorov et al. 2021,
arXiv 2109.07161), and for a quarter of the images everything, as in that of Stable Diffusion's inpainting models.

Each mask depends on its numbers alone, which depend on the seed, the image and the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from PIL import Image, ImageChops, ImageDraw

Numbers = Iterator[float]  # from 0 to 1, without 1
WHOLE = 0.25  # part of the random masks that are white everywhere
_OUTSIDE = 0.1  # part of the random masks that are white around a box
_STROKES = 0.35


def boxes(size: tuple[int, int], numbers: Numbers) -> Image.Image:
    """One to four white boxes whose sides are 1/8 to 1/2 of the image's."""
    mask = Image.new("L", size)
    for _ in range(1 + int(4 * next(numbers))):
        sides = [max(1, round(side * (1 / 8 + 3 / 8 * next(numbers)))) for side in size]
        left, top = (int((side - length + 1) * next(numbers)) for side, length in zip(size, sides, strict=True))
        mask.paste(255, (left, top, left + sides[0], top + sides[1]))
    return mask


def strokes(size: tuple[int, int], numbers: Numbers) -> Image.Image:
    """One to four brush strokes of two to eight turns, 1/16 to 1/6 of the image's shorter side wide."""
    mask = Image.new("L", size)
    draw, short = ImageDraw.Draw(mask), min(size)
    for _ in range(1 + int(4 * next(numbers))):
        width = max(1, round(short * (1 / 16 + (1 / 6 - 1 / 16) * next(numbers))))
        x, y, angle = next(numbers) * size[0], next(numbers) * size[1], next(numbers) * 2 * math.pi
        points = [(x, y)]
        for _ in range(2 + int(7 * next(numbers))):
            angle += (next(numbers) - 0.5) * math.pi
            length = short * (1 / 8 + next(numbers) / 4)
            x = min(max(x + length * math.cos(angle), 0), size[0] - 1)
            y = min(max(y + length * math.sin(angle), 0), size[1] - 1)
            points.append((x, y))
        draw.line(points, fill=255, width=width, joint="curve")
        for x, y in points:  # round ends
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return mask


def random(size: tuple[int, int], numbers: Numbers) -> Image.Image:
    """Everything for a quarter of the images; else what is around a box, strokes, or boxes."""
    kind = next(numbers)
    if kind < WHOLE:
        return Image.new("L", size, 255)
    if kind < WHOLE + _OUTSIDE:
        return ImageChops.invert(boxes(size, numbers))
    return (strokes if kind < WHOLE + _OUTSIDE + _STROKES else boxes)(size, numbers)


RULES: dict[str, Callable[[tuple[int, int], Numbers], Image.Image]] = {
    "boxes": boxes,
    "strokes": strokes,
    "random": random,
}
