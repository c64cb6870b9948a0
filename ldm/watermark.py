"""The invisible watermark of SDXL's reference program: 48 bits in the blue of an image.

A reader (the scheme dwtDct of the library invisible-watermark) takes U = 0.492 (B - Y) + 128 of each pixel, rounded,
half the sum of each cell of 2×2 pixels, and of each block of 4×4 cells the largest number but for the first cell. That
number modulo 36 says one bit: 1 above 18. The blocks in their order say the bits again and again; the majority counts.

The library is not used: it needs another build of OpenCV than ours, whose files replace each other, and in images with
plain ground the bits that it writes are not found again. Here a bit is written by shifting the blue of a whole block,
in those blocks of a bit that need the least of it, until enough of them say it with a margin.

B blocks of 8×8 pixels, H×W height and width in pixels
"""

from __future__ import annotations

from math import comb

import numpy as np
from PIL import Image

BITS = np.array([int(bit) for bit in f"{0b101100111110110010010000011110111011000110011110:b}"])  # of SDXL's programs
LEAST = 36  # bits of a watermark that is found
SMALLEST_ELSEWHERE = 256 * 256  # pixels of an image that other programs read
_SIDE = 8  # of a block, in pixels
_STEP = 36.0  # numbers of a block that are a step apart say the same bit
_MARGIN = (4.0, 6.0)  # from the lower and the upper end of a bit's numbers; noise raises the largest of 15 cells
_SHARE = 0.75  # of a bit's blocks that say it with this margin
_MOST = 24.0  # largest shift of a block's numbers
_ROUNDS = 4  # of writing, rounding to whole colours, and reading again
_CELL = 2 * 0.492  # change of a cell's number when its blue rises by 1, with Y kept by green
_GREEN = 0.114 / 0.587  # parts of Y: blue / green


def fits(width: int, height: int) -> bool:
    """Whether an image has a block for each bit."""
    return (width // _SIDE) * (height // _SIDE) >= len(BITS)


def by_chance(bits: int) -> float:
    """The probability that so many bits of the watermark, or more, are found where each is a toss of a coin."""
    return sum(comb(len(BITS), count) for count in range(bits, len(BITS) + 1)) / 2 ** len(BITS)


def matching_bits(image: Image.Image) -> int:
    """How many of the 48 bits an image says; an image without the watermark about half of them."""
    numbers = _numbers(np.asarray(image.convert("RGB"), np.float64))
    place = np.arange(len(numbers)) % len(BITS)
    ones = np.bincount(place, numbers % _STEP > _STEP / 2, len(BITS))
    said = ones / np.maximum(np.bincount(place, minlength=len(BITS)), 1) * 255 > 127
    return int((said == BITS).sum())


def with_watermark(image: Image.Image) -> Image.Image:
    """A copy of an image (RGB) with the watermark. A smaller image than `fits` says is not changed.

    Blue changes by at most 25, for the sides of plain areas by about 10 of 255; Y stays, up to clipping.
    """
    start = np.asarray(image.convert("RGB"), np.float64)
    rows, columns = (side // _SIDE for side in start.shape[:2])
    place = np.arange(rows * columns) % len(BITS)
    if not fits(*image.size):
        return image.copy()
    needed = np.ceil(np.bincount(place, minlength=len(BITS)) * _SHARE)
    blue = start[: rows * _SIDE, : columns * _SIDE, 2].reshape(rows, _SIDE, columns, _SIDE)
    room = _CELL * (255 - blue.max((1, 3))).ravel(), _CELL * blue.min((1, 3)).ravel()
    made, shift = start, np.zeros(len(place))
    for _ in range(_ROUNDS):
        target, cost = _targets(_numbers(made), BITS[place], shift, room)
        chosen = (_ranks(cost, place) < needed[place]) & (cost > 0) & np.isfinite(cost)
        if not chosen.any():
            break
        shift = np.where(chosen, target, shift)
        made = _shifted(start, (shift / _CELL).reshape(rows, columns))
    return Image.fromarray(made.astype(np.uint8))


def _numbers(pixels: np.ndarray) -> np.ndarray:
    """The number that each block says a bit with: (B,), of pixels (H, W, 3) from 0 to 255."""
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    u = np.clip(np.round(0.492 * (pixels[..., 2] - luma) + 128), 0, 255)
    rows, columns = (side // _SIDE for side in u.shape)
    u = u[: rows * _SIDE, : columns * _SIDE]
    cells = u.reshape(rows, 4, 2, columns, 4, 2).sum((2, 5)) / 2  # (rows, 4, columns, 4)
    return cells.transpose(0, 2, 1, 3).reshape(rows * columns, 16)[:, 1:].max(1)


def _targets(
    numbers: np.ndarray, bits: np.ndarray, shift: np.ndarray, room: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The shift (B,) with which each block says its bit, and its size: 0 if it does so, infinite if blue has no room.

    `shift` is that which is in the numbers; `room` is how far the numbers can go up and down in all.
    """
    half = _STEP / 2
    inside = (numbers - bits * half) % _STEP  # from 0 to a half where the bit is said
    low, high = _MARGIN
    up, down = shift + (low - inside) % _STEP, shift - (inside - half + high) % _STEP
    up_cost = np.where(up > np.minimum(room[0], _MOST), np.inf, np.abs(up))
    down_cost = np.where(-down > np.minimum(room[1], _MOST), np.inf, np.abs(down))
    cost = np.where((inside >= low) & (inside <= half - high), 0.0, np.minimum(up_cost, down_cost))
    return np.where(up_cost < down_cost, up, down), cost


def _ranks(cost: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The place of each block among those of its bit, the cheapest first: (B,)."""
    order = np.lexsort((cost, place))
    counts = np.bincount(place, minlength=len(BITS))
    ranks = np.empty(len(order), int)
    ranks[order] = np.arange(len(order))
    return ranks - (np.cumsum(counts) - counts)[place]


def _shifted(start: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) with another blue in each block (rows, columns), and with their Y; whole numbers."""
    change = blue.repeat(_SIDE, 0).repeat(_SIDE, 1)
    made, (height, width) = start.copy(), change.shape
    made[:height, :width, 2] += change
    made[:height, :width, 1] -= change * _GREEN
    return np.clip(np.round(made), 0, 255)
