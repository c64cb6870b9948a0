"""Images: reading files, conversion between PIL and tensors, and PNG files that hold the settings to reproduce them.

B images, H×W height and width
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from ldm.errors import LdmError

MOST_PIXELS = 100_000_000  # largest number of pixels of an image that is read: larger images are mistakes or attacks
KEY = "ldm"  # PNG text key of our JSON; AUTOMATIC1111's programs read the key "parameters"
WHITE = 128  # smallest value of a mask's white pixels
ImageFile = str | os.PathLike[str] | BinaryIO | Image.Image


def load_image(source: ImageFile, mode: str = "RGB", name: str | None = None, least: int = 0) -> Image.Image:
    """The first frame of an image file, upright; transparent parts become white, or black in mode "L" (a mask).

    Args:
        source: a path, a file open for reading, or an image.
        mode: PIL's mode of the result.
        name: the name in error messages, by default `source`.
        least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, rounded up, if its shorter side keeps this many pixels.

    Raises:
        LdmError: the file cannot be read, is not an image, is damaged, or has over 100 million pixels.
    """
    with _reading(source, name):
        image = _open(source, name)
        if least:
            _decode_smaller(image, least)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # PIL would clip 16 bits to white
            image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
        if mode in ("RGB", "L") and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if mode == "RGB" else "black"), image)
        return image if image.mode == mode else image.convert(mode)


def image_size(source: ImageFile, name: str | None = None) -> tuple[int, int]:
    """Width and height of an image, upright, from its header alone.

    Raises:
        LdmError: see `load_image`; only errors in the header are found.
    """
    with _reading(source, name):
        image = _open(source, name)
        return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size


def _open(source: ImageFile, name: str | None) -> Image.Image:
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if image.width * image.height > MOST_PIXELS:
        raise LdmError(f"{name or source} has {image.width}×{image.height} pixels; at most {MOST_PIXELS:,} are read")
    if image.format == "EPS":
        raise LdmError(f"{name or source} is PostScript, a program that would be run; save it as a PNG")
    if image.mode.startswith("F"):
        raise LdmError(f"{name or source} holds floating-point numbers, whose range is unknown; save it with 8 bits")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation in the header; a PNG's metadata after the pixels is ignored: reading it decodes the image."""
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else Image.Exif()
    return exif.get(ExifTags.Base.Orientation, 1)


def _decode_smaller(image: Image.Image, least: int) -> None:
    """Set a JPEG to be decoded at the smallest scale whose shorter side has at least `least` pixels."""
    for part in (8, 4, 2):
        # an incomplete block is at the right or bottom; rotating the image would then shift all other blocks
        whole = not (image.width % part or image.height % part) or _orientation(image) == 1
        if whole and min(image.size) // part >= least:
            image.draft(None, (image.width // part, image.height // part))
            return


@contextmanager
def _reading(source: ImageFile, name: str | None) -> Iterator[None]:
    """Turn any error of a decoder into an LdmError of one line."""
    name = name or str(source)
    try:
        yield
    except (LdmError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise LdmError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise LdmError(f"{name} does not exist") from None
    except Exception as error:  # decoders of damaged files raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no image, or damaged"
        raise LdmError(f"{name} cannot be read as an image: {reason}") from None


def to_tensor(images: Sequence[Image.Image], width: int, height: int) -> Tensor:
    """Resize images and convert them to (B, 3, H, W) in [-1, 1], float32."""
    arrays = [np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255 * 2 - 1


def mask_to_tensor(mask: Image.Image, width: int, height: int) -> Tensor:
    """Resize a mask and convert it to (1, 1, H, W): 1 (white, 128 or more) where the image is repainted, 0 elsewhere.

    In a smaller mask a pixel is white if any of the pixels that it stands for is, so that thin lines stay.
    """
    mask = mask.convert("L")
    if width < mask.width or height < mask.height:
        white = torch.from_numpy((np.asarray(mask) >= WHITE).astype(np.float32))
        return torch.nn.functional.adaptive_max_pool2d(white[None, None], (height, width))
    array = np.asarray(mask.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy((array >= WHITE).astype(np.float32))[None, None]


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [-1, 1] to 8-bit images."""
    numbers = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in numbers.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def grid(images: Sequence[Image.Image], columns: int = 0) -> Image.Image:
    """A contact sheet of images; by default with about as many columns as rows."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None, parameters: str = "") -> None:
    """Write a PNG atomically, with our settings as JSON and AUTOMATIC1111's parameters in its metadata.

    Raises:
        LdmError: the file cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    texts = {"parameters": parameters, KEY: json.dumps(settings, ensure_ascii=False) if settings else ""}
    for key, text in texts.items():
        if text:  # bytes of file names that are not UTF-8 become JSON escapes, which can be read back
            info.add_itxt(key, text.encode("utf-8", "backslashreplace").decode())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as file:
            image.save(file, "PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LdmError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_settings(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Our JSON in a PNG (None if absent) and AUTOMATIC1111's parameters ("" if absent).

    Raises:
        LdmError: the file is not an image, or our JSON is damaged.
    """
    load_image(path)
    with Image.open(path) as image:
        text = {key: value for key, value in image.info.items() if isinstance(value, str)}
    try:
        settings = json.loads(text.get(KEY, "null"))
    except (ValueError, RecursionError):
        raise LdmError(f"{path}: its settings are damaged") from None
    return settings if isinstance(settings, dict) else None, text.get("parameters", "")
