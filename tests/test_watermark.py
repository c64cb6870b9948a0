"""SDXL's watermark: it is found, by a reader written from the scheme; unmarked images have none; it outlasts JPEG."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from images import encoded
from PIL import Image
from watermarks import noise

from ldm.watermark import BITS, LEAST, by_chance, fits, matching_bits, with_watermark


def on_white(side: int = 256) -> Image.Image:
    """An image with plain ground."""
    image = Image.new("RGB", (side, side), "white")
    image.paste((250, 170, 20), (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    return image


def read_by_opencv(image: Image.Image) -> int:
    """The matching bits as the library invisible-watermark finds them: by OpenCV's colours and Haar's wavelet."""
    u = cv2.cvtColor(np.asarray(image)[:, :, ::-1].copy(), cv2.COLOR_BGR2YUV)[:, :, 1].astype(float)
    u = u[: len(u) // 4 * 4, : u.shape[1] // 4 * 4]
    low = (u[0::2, 0::2] + u[0::2, 1::2] + u[1::2, 0::2] + u[1::2, 1::2]) / 2
    said: list[list[bool]] = [[] for _ in BITS]
    blocks = [(top, left) for top in range(0, len(low) - 3, 4) for left in range(0, low.shape[1] - 3, 4)]
    for number, (top, left) in enumerate(blocks):
        block = low[top : top + 4, left : left + 4].ravel()
        value = block[1 + np.abs(block[1:]).argmax()]
        said[number % len(BITS)].append(abs(value) % 36 > 18)
    return sum((np.mean(votes) * 255 > 127) == bool(bit) for votes, bit in zip(said, BITS, strict=True))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


@pytest.mark.parametrize("image", [noise(0), on_white(), Image.new("RGB", (256, 256)), noise(1).crop((0, 0, 131, 98))])
def test_all_bits_are_found(image: Image.Image) -> None:
    made = with_watermark(image)
    assert read_by_opencv(made) >= len(BITS) - 1 and matching_bits(made) >= len(BITS) - 1
    assert made.size == image.size and matching_bits(image) < LEAST
    change = np.abs(np.asarray(made, int) - np.asarray(image, int))
    assert change[..., 0].max() == 0 and change[..., 1].max() <= 6 and change[..., 2].max() <= 26


def test_these_are_the_bits_of_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion_xl import watermark

    assert BITS.tolist() == watermark.WATERMARK_BITS


@pytest.mark.parametrize("image", [noise(2, 512), on_white(512)])
def test_it_outlasts_compression_and_resizing(image: Image.Image) -> None:
    made = with_watermark(image)
    assert matching_bits(jpeg(made, 90)) >= LEAST
    assert matching_bits(made.resize((256, 256)).resize((512, 512))) >= LEAST


def test_chance() -> None:
    assert by_chance(0) == 1 and by_chance(len(BITS)) == 2.0**-48
    assert 1 / 3000 < by_chance(LEAST) < 1 / 2500
    found = [matching_bits(noise(seed, 128)) for seed in range(40)]
    assert max(found) < LEAST and 20 < np.mean(found) < 28


def test_small_images_are_left_as_they_are() -> None:
    assert not fits(48, 48) and fits(64, 48)
    image = noise(3, 48)
    assert with_watermark(image).tobytes() == image.tobytes()
