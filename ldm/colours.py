"""The colours of image files: profiles, and the other ways in which files name their colours, converted to sRGB.

A file's colours are those of, in this order: a PNG's cICP chunk (ITU-T H.273), its colour profile (ICC), a PNG's chunks
gAMA and cHRM, EXIF that says Adobe RGB, as cameras write it without a profile (DCF 2.0: interoperability index R03).
Colours that are named without a profile are turned into one.

RGB primaries and white are pairs x, y of CIE 1931
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms

PAIR = tuple[float, float]
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # PIL's mode for the colours of a profile
_SAME_COLOURS = 2  # largest difference of 255 between sRGB and the colours of a profile that counts as sRGB
_D65: PAIR = (0.3127, 0.329)
_SRGB: tuple[PAIR, ...] = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06), _D65)
_ADOBE: tuple[PAIR, ...] = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), _D65)
_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
_PRIMARIES: dict[int, tuple[PAIR, ...]] = {  # of H.273, with their white
    1: _SRGB,
    9: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046), _D65),
    11: (*_P3, (0.314, 0.351)),
    12: (*_P3, _D65),
}
_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # sRGB's; light = (a v + b)^g, or c v below d
_TRANSFERS: dict[int, Sequence[float]] = {  # of H.273; programs show the curve of BT.709 as sRGB's
    **dict.fromkeys((1, 2, 6, 13, 14, 15), _CURVE), 4: (2.2,), 5: (2.8,), 8: (1.0,)
}  # fmt: skip
HDR = (16, 18)  # PQ and HLG
_USUAL_GAMMA = (0.42, 0.49)  # around 1/2.2, which programs write for sRGB


def profile_of(image: Image.Image) -> bytes | None:
    """The profile of an image's colours, made from other statements if there is none; None for sRGB.

    The image must not be decoded: its `info` still has what the file says.
    """
    info = image.info
    stated = info.get("cicp")
    if stated and stated[0] in _PRIMARIES and stated[1] in _TRANSFERS:
        return _made(_PRIMARIES[stated[0]], tuple(_TRANSFERS[stated[1]]))
    if isinstance(info.get("icc_profile"), bytes):
        return info["icc_profile"]
    if image.format == "PNG":
        gamma, points = info.get("gamma"), info.get("chromaticity")
        if "srgb" in info or not (gamma or points):
            return None
        curve = (1 / gamma,) if gamma and not _USUAL_GAMMA[0] < gamma < _USUAL_GAMMA[1] else _CURVE
        white, red, green, blue = [points[i : i + 2] for i in (0, 2, 4, 6)] if points else (_D65, *_SRGB[:3])
        return _made((red, green, blue, white), curve)
    return _made(_ADOBE, (563 / 256,)) if _is_adobe(image) else None


def is_hdr(image: Image.Image) -> bool:
    """Whether a PNG states a transfer function of high dynamic range, which has no conversion here."""
    return bool(image.info.get("cicp")) and image.info["cicp"][1] in HDR


def read_cicp(file: BinaryIO) -> bytes | None:
    """The four numbers of a PNG's chunk cICP, which PIL passes over; None if there is none. The place stays."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"cICP" and length == 4:
                return file.read(4)
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(place)


def _is_adobe(image: Image.Image) -> bool:
    """Whether EXIF says that the colours are Adobe RGB."""
    if "exif" not in image.info and image.format != "TIFF":
        return False
    try:
        exif = Image.Image.getexif(image)
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(1, "")
    except Exception:  # EXIF is written by cameras, and edited by many programs
        return False
    name = index if isinstance(index, str) else bytes(index).decode("latin-1")
    return space == 2 or (space != 1 and name.startswith("R03"))


# --- profiles ---------------------------------------------------------------------------------------------------------


def kind_of(mode: str) -> str:
    """The kind of colours of an image in PIL's `mode`: "RGB", "CMYK" or "L" (gray)."""
    return "CMYK" if mode == "CMYK" else "L" if mode[0] in "1LI" and mode != "LAB" else "RGB"


def usable(profile: bytes, mode: str) -> bool:
    """Whether an image in PIL's `mode` can have colours of this profile."""
    return _opened(profile, kind_of(mode)) is not None


def differs(profile: bytes, mode: str) -> bool:
    """Whether the colours of a profile are others than sRGB's."""
    return _conversion(profile, kind_of(mode)) is not None


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image converted to sRGB from its profile, or from L*a*b*; its transparency stays."""
    if image.mode == "LAB":
        transform = ImageCms.ImageCmsTransform(_standard("LAB"), _standard("sRGB"), "LAB", "RGB")
    elif profile and (found := _conversion(profile, kind_of(image.mode))):
        transform = found
    else:
        return image
    mode, alpha = transform.input_mode, None
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        alpha, image = whole.getchannel("A"), image if mode == "L" else whole
    converted = transform.apply(image if image.mode == mode else image.convert(mode))
    converted.info.clear()
    if alpha:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=64)  # the images of a set have few different profiles
def _conversion(profile: bytes, colours: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB of such colours with a profile; None if they are sRGB, or the profile is not for them."""
    transform = _opened(profile, colours)
    if transform is None or transform.input_mode == "CMYK":
        return transform
    rgb = transform.input_mode == "RGB"
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    every = np.stack(np.meshgrid(*[levels] * 3), axis=-1).reshape(1, -1, 3) if rgb else levels[None]
    converted = np.asarray(transform.apply(Image.fromarray(every)), np.int16)
    difference = converted - (every if rgb else every[..., None])
    return transform if np.abs(difference).max() > _SAME_COLOURS else None


@lru_cache(maxsize=64)
def _opened(profile: bytes, colours: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB of such colours with a profile; None if it is damaged, or not for them."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip(), "")
        if mode != colours and (colours, mode) != ("L", "RGB"):
            return None
        return ImageCms.ImageCmsTransform(source, _standard("sRGB"), mode, "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None


def _standard(name: Literal["sRGB", "LAB"]) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name))


@lru_cache(maxsize=64)
def _made(points: tuple[PAIR, ...], curve: Sequence[float]) -> bytes | None:
    """A profile (ICC.1:2010) of red, green, blue and white, and of a curve: a power, or the numbers of sRGB's.

    None if there are no such colours.
    """
    columns = np.array([[x, y, 1 - x - y] for x, y in points]).T  # (3, 4)
    rgb, white = columns[:, :3], columns[:, 3] / (columns[1, 3] or np.nan)
    if not abs(np.linalg.det(rgb)) > 1e-6:
        return None
    to_xyz = rgb * np.linalg.solve(rgb, white)
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # Bradford's
    d50 = np.array([0.9642, 1, 0.8249])
    adapted = np.linalg.inv(cones) @ np.diag(cones @ d50 / (cones @ white)) @ cones @ to_xyz
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 100:
        return None
    shape = struct.pack(">4sIHH", b"para", 0, 3 if len(curve) == 5 else 0, 0) + _fixed(curve)
    values = [b"XYZ \0\0\0\0" + _fixed(column) for column in (*adapted.T, d50)]
    names = (b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt", b"rTRC", b"gTRC", b"bTRC")
    at, tags, data = 128 + 4 + 12 * len(names), b"", b""
    for name, value in zip(names, [*values, shape, shape, shape], strict=True):
        tags += struct.pack(">4sII", name, at + len(data), len(value))
        data += value
    size = at + len(data)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp") + _fixed(d50)
    return head.ljust(128, b"\0") + struct.pack(">I", 7) + tags + data


def _fixed(numbers: Sequence[float] | np.ndarray) -> bytes:
    """Numbers of 16 bits before and after the point."""
    return b"".join(struct.pack(">i", round(float(number) * 65536)) for number in numbers)
