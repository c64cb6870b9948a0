"""Images: reading files, conversion between PIL and tensors, and PNG files that hold the settings to reproduce them.

Colours are converted to sRGB (`ldm.colours`); a profile that is damaged, or belongs to another kind of colours than the
file's, is ignored, as browsers do. What lies beside the pixels never makes an image unreadable: damaged EXIF counts as
absent, and a PNG is read without its compressed texts if they are damaged or above PIL's limit. What is left out or
guessed is told in an image's header (`notes`), so that it can be said once for many images.

B images, H×W height and width
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from ldm.colours import differs, in_srgb, is_hdr, profile_of, read_cicp, usable
from ldm.errors import LdmError

MOST_PIXELS = 100_000_000  # largest number of pixels of an image that is read: larger images are mistakes or attacks
KEY = "ldm"  # PNG text key of our JSON
PARAMETERS = "parameters"  # that of AUTOMATIC1111's text
WHITE = 128  # smallest value of a mask's white pixels
ImageFile = str | os.PathLike[str] | BinaryIO | Image.Image

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
_WITH_ORIENTATION = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # PIL's keys
_COLOURS_IN_PNG = ("gamma", "chromaticity", "srgb", "cicp")  # PIL's keys, and ours
_BITS = 258  # TIFF's tag BitsPerSample
_UNICODE = b"UNICODE\0"
_CHARACTERS = {_UNICODE: "utf-16-be", b"ASCII\0\0\0": "ascii"}  # of EXIF's comment, by its first 8 bytes
_RECORDS = {  # PNG text keys of programs whose records are not read
    "workflow": "ComfyUI", "prompt": "ComfyUI", "invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI", "fooocus_scheme": "Fooocus", "Comment": "NovelAI",
}  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOST_OF_16 = 2**16 - 1  # largest value of an image with 16 bits
ANIMATED = "of an animation or of several pages the first alone is used"
TRANSPARENT = "transparent parts, by an alpha channel, become white"
NO_PROFILE = "a colour profile that is damaged, or for other colours, is ignored"
HIGH_RANGE = "colours of high dynamic range (PQ or HLG) are read as if they were sRGB's"


@dataclass(frozen=True)
class Header:
    """What an image's header says."""

    size: tuple[int, int]  # width and height, upright
    profile: str  # digest of the colour profile from which the image is converted to sRGB; "" if it is not
    notes: tuple[str, ...] = ()  # what is left out or guessed


def load_image(source: ImageFile, mode: str = "RGB", name: str | None = None, least: int = 0) -> Image.Image:
    """The first frame of an image file, upright, in sRGB; transparent parts become white.

    In mode "L" (a mask) transparent parts become black, and the colour profile is ignored.

    Args:
        source: a path, a file open for reading, or an image.
        mode: PIL's mode of the result.
        name: the name in error messages, by default `source`.
        least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, rounded up, if its shorter side keeps this many pixels.

    Raises:
        LdmError: the file cannot be read, is not an image, is damaged, or has over 100 million pixels.
    """
    image, _ = load_noted(source, name, least, colours=mode != "L")
    if mode in ("RGB", "L") and image.has_transparency_data:
        image = flattened(image, "white" if mode == "RGB" else "black")
    return image if image.mode == mode else image.convert(mode)


def flattened(image: Image.Image, colour: str) -> Image.Image:
    """An image with its transparent parts on a colour, in RGBA."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


def load_noted(
    source: ImageFile,
    name: str | None = None,
    least: int = 0,
    colours: bool = True,
    formats: tuple[str, ...] | None = None,
) -> tuple[Image.Image, tuple[str, ...]]:
    """An image with its transparency, and what of its file is left out or guessed; without `colours` as they are.

    `formats` are the only ones that a file may have, by PIL's names.

    Raises:
        LdmError: as `load_image`.
    """
    found: list[tuple[bytes | None, tuple[str, ...]]] = []

    def prepare(image: Image.Image) -> None:
        profile = profile_of(image)
        found.append((profile, tuple(_notes(image, profile))))
        _decode(image, least)

    with _reading(source, name):
        image = _upright(_opened(source, name, prepare, formats))
        profile, notes = found[-1]
        for key in ("icc_profile", *_COLOURS_IN_PNG):
            image.info.pop(key, None)
        if image.mode.startswith("I"):  # PIL would clip 16 bits to white
            image = _in_8_bits(image, name or str(source))
        if colours:
            image = in_srgb(image, profile)
        return image, notes


def image_header(source: ImageFile, name: str | None = None) -> Header:
    """What the header of an image says, without decoding the image.

    Raises:
        LdmError: see `load_image`; only errors in the header are found.
    """
    with _reading(source, name):
        image = _opened(source, name, lambda image: None)
        size = (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size
        profile = profile_of(image)
        other = profile is not None and differs(profile, image.mode)
        digest = hashlib.blake2b(profile, digest_size=8).hexdigest() if profile and other else ""
        return Header(size, digest, tuple(_notes(image, profile)))


def _notes(image: Image.Image, profile: bytes | None) -> Iterator[str]:
    """What is left out or guessed when an image is read, as far as its header says it."""
    if image.format != "MPO" and _is_animated(image):  # an MPO's further images are its previews
        yield ANIMATED
    if image.has_transparency_data:
        yield TRANSPARENT
    if profile and not usable(profile, image.mode):
        yield NO_PROFILE
    if is_hdr(image):
        yield HIGH_RANGE


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # it looks for the second frame, which may be damaged
        return False


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    """A gray image of 16 bits with 8 bits.

    Raises:
        LdmError: its numbers have more than 16 bits, or are negative.
    """
    numbers = np.asarray(image)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high > _MOST_OF_16:
        raise LdmError(f"{name} holds numbers from {low} to {high}, whose range is unknown; save it with 8 or 16 bits")
    return Image.fromarray((numbers >> 8).astype(np.uint8))


def _opened(
    source: ImageFile,
    name: str | None,
    prepare: Callable[[Image.Image], object],
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """An image, opened and prepared; a PNG whose metadata are at fault, without them."""
    try:
        image = _open(source, name, formats)
        prepare(image)
        return image
    except (LdmError, MemoryError):
        raise
    except Exception:  # decoders of damaged files raise anything
        plain = _plain_png(source)
        if plain is None:
            raise
    image = _open(plain, name or str(source), formats)
    prepare(image)
    return image


def _open(source: ImageFile, name: str | None, formats: tuple[str, ...] | None) -> Image.Image:
    image = source if isinstance(source, Image.Image) else Image.open(source, formats=formats)
    if image.width * image.height > MOST_PIXELS:
        raise LdmError(f"{name or source} has {image.width}×{image.height} pixels; at most {MOST_PIXELS:,} are read")
    if image.format == "EPS":
        raise LdmError(f"{name or source} is PostScript, a program that would be run; save it as a PNG")
    if image.mode.startswith("F"):
        raise LdmError(f"{name or source} holds floating-point numbers, whose range is unknown; save it with 8 bits")
    if image.format == "TIFF" and image.mode == "I" and 32 in image.tag_v2.get(_BITS, ()):  # type: ignore[attr-defined]
        raise LdmError(f"{name or source} holds numbers of 32 bits, whose range is unknown; save it with 8 or 16 bits")
    if image.format == "PNG" and image is not source and (cicp := read_cicp(image.fp)):  # type: ignore[attr-defined]
        image.info["cicp"] = cicp
    return image


def _decode(image: Image.Image, least: int) -> None:
    """Decode an image: a JPEG at the smallest scale whose shorter side has at least `least` pixels."""
    for part in (8, 4, 2) if least and image.format in ("JPEG", "MPO") else ():
        # an incomplete block is at the right or bottom; rotating the image would then shift all other blocks
        whole = not (image.width % part or image.height % part) or _orientation(image) == 1
        if whole and min(image.size) // part >= least:
            image.draft(None, (image.width // part, image.height // part))
            break
    image.load()


def _plain_png(source: ImageFile) -> io.BytesIO | None:
    """A PNG without damaged metadata and without compressed or long texts; None if the source is no PNG file."""
    if isinstance(source, Image.Image):
        return None
    with Path(source).open("rb") if isinstance(source, str | os.PathLike) else nullcontext(source) as file:
        file.seek(0)
        if file.read(len(_PNG)) != _PNG:
            return None
        data = file.read()
    kept, at = [_PNG], 0
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if (
            kind[:1].isupper()
            or (  # a chunk without which there are no pixels
                zlib.crc32(kind + content) == int.from_bytes(data[end - 4 : end], "big")
                and not (
                    kind in _TEXTS and (_is_compressed(kind, content) or len(content) > PngImagePlugin.MAX_TEXT_CHUNK)
                )
            )
        ):
            kept.append(data[at:end])
        at = end
    return io.BytesIO(b"".join(kept))


def _is_compressed(kind: bytes, content: bytes) -> bool:
    """Whether a chunk of text is compressed: an international text says so after its key."""
    return kind == b"zTXt" or (kind == b"iTXt" and content.partition(b"\0")[2][:1] != b"\0")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, or 1 if it is damaged. A PNG's metadata after its pixels are known once it is decoded."""
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own method would decode it
    except Exception:  # EXIF is written by cameras, and edited by many programs
        return 1
    return int(orientation) if orientation and orientation in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    """A decoded image, rotated as its metadata say, without these metadata."""
    orientation = _orientation(image)
    image = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image.copy()
    for key in _WITH_ORIENTATION:
        image.info.pop(key, None)
    return image


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
        if "MAX_TEXT" in str(error):  # PIL's limit, which a colour profile can exceed
            reason = "its colour profile has over 1 MB; save it with a smaller one"
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


def check_same_size(mask: Image.Image, image: Image.Image) -> None:
    """Raise unless a mask has the size of its image.

    Raises:
        LdmError: it has another one.
    """
    if mask.size != image.size:
        sizes = f"{mask.width}×{mask.height} pixels, its image {image.width}×{image.height}"
        raise LdmError(f"the mask has {sizes}; their sizes must be equal")


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [-1, 1] to 8-bit images."""
    numbers = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in numbers.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def png_bytes(image: Image.Image, settings: Mapping[str, Any] | None = None, parameters: str = "") -> bytes:
    """A PNG, with our settings as JSON and AUTOMATIC1111's parameters in its metadata."""
    info = PngImagePlugin.PngInfo()
    texts = {PARAMETERS: parameters, KEY: json.dumps(settings, ensure_ascii=False) if settings else ""}
    for key, text in texts.items():
        if text:  # bytes of file names that are not UTF-8 become JSON escapes, which can be read back
            info.add_itxt(key, text.encode("utf-8", "backslashreplace").decode())
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def lossy_bytes(image: Image.Image, kind: str, quality: int, parameters: str) -> bytes:
    """A JPEG or WebP with AUTOMATIC1111's parameters in its EXIF comment; `quality` is from 1 to 100."""
    comment = _UNICODE + parameters.encode(_CHARACTERS[_UNICODE], "replace")
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    file = io.BytesIO()
    image.save(file, kind, quality=quality, exif=exif)
    return file.getvalue()


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None, parameters: str = "") -> None:
    """Write a PNG atomically, as `png_bytes` gives it.

    Raises:
        LdmError: the file cannot be written.
    """
    save_file(png_bytes(image, settings, parameters), path)


def save_file(data: bytes, path: Path) -> None:
    """Write the file of an image atomically.

    Raises:
        LdmError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LdmError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_settings(
    path: ImageFile, name: str | None = None, formats: tuple[str, ...] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Our JSON in a PNG (None if absent) and AUTOMATIC1111's parameters ("" if absent), in JPEG and WebP from EXIF.

    `name` is that in error messages, by default `path`; `formats` are as for `load_noted`.

    Raises:
        LdmError: the file is not an image, our JSON is damaged, or the image has the record of another program alone.
    """
    name = name or str(path)
    text = read_texts(path, name, formats)
    try:
        settings = json.loads(text.get(KEY, "null"))
    except (ValueError, RecursionError):
        raise LdmError(f"{name}: its settings are damaged") from None
    parameters = text.get(PARAMETERS, "")
    others = [program for key, program in _RECORDS.items() if key in text]
    if others and not settings and not parameters:
        raise LdmError(f"{name} has a record of {others[0]} alone, which ldm does not read")
    return settings if isinstance(settings, dict) else None, parameters


def read_texts(path: ImageFile, name: str, formats: tuple[str, ...] | None = None) -> dict[str, str]:
    """The texts in an image by their keys in PNG; EXIF's comment as `parameters`, if there are no others.

    `name` and `formats` are as for `read_settings`.

    Raises:
        LdmError: the file is not an image, or damaged.
    """
    with _reading(path, name):
        image = _opened(path, name, Image.Image.load, formats)
    found = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    if not found.get(PARAMETERS) and (comment := _user_comment(image)):
        found[PARAMETERS] = comment
    return found


def _user_comment(image: Image.Image) -> str:
    """EXIF's comment, where AUTOMATIC1111's programs put their text into JPEG and WebP; "" if there is none."""
    try:
        data = Image.Image.getexif(image).get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except Exception:  # EXIF is written by cameras, and edited by many programs
        return ""
    if not isinstance(data, bytes) or data[:8] not in _CHARACTERS:
        return ""
    return data[8:].decode(_CHARACTERS[data[:8]], "replace").strip("\0 ")
