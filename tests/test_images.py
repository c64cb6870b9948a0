"""Images as they are read: colours, rotation, and files whose metadata are damaged."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from images import ADOBE, GRAY, GREEN, SRGB, encoded, near, place_image, png
from PIL import ExifTags, Image, ImageCms

from ldm.errors import LdmError
from ldm.images import (
    ANIMATED,
    HIGH_RANGE,
    KEY,
    NO_PROFILE,
    TRANSPARENT,
    image_header,
    load_image,
    load_noted,
    read_settings,
    save_png,
)

# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_are_converted_from_the_profile(kind: str) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.new("RGB", (16, 16), GREEN), kind, icc_profile=ADOBE, **options)
    read = load_image(io.BytesIO(data), name="x")
    assert near(read, (0, 181, 64), within=3 if kind == "JPEG" else 1)
    assert image_header(io.BytesIO(data)).profile
    assert load_image(read).tobytes() == read.tobytes() and "icc_profile" not in read.info  # converted once only


def test_an_opened_image_is_converted_and_left_as_it_is() -> None:
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (16, 16), GREEN), "PNG", icc_profile=ADOBE)))
    assert near(load_image(image), (0, 181, 64))
    assert image.info["icc_profile"] == ADOBE and image.getpixel((0, 0)) == GREEN


def test_a_profile_of_srgb_changes_nothing() -> None:
    image = place_image(64, 64)
    data = encoded(image, "PNG", icc_profile=SRGB)
    assert load_image(io.BytesIO(data)).tobytes() == image.tobytes()
    assert image_header(io.BytesIO(data)).profile == image_header(io.BytesIO(png(image))).profile == ""


def test_profiles_of_gray_palettes_and_transparency() -> None:
    def read(image: Image.Image, icc: bytes, mode: str = "RGB") -> Image.Image:
        return load_image(io.BytesIO(encoded(image, "PNG", icc_profile=icc)), mode)

    gray = Image.new("L", (8, 8), 55)
    assert near(read(gray, GRAY), (128, 128, 128))  # 0.2157 of the light
    assert near(read(Image.merge("LA", (gray, Image.new("L", (8, 8), 255))), GRAY), (128, 128, 128))
    assert near(read(Image.fromarray(np.full((8, 8), 55 * 257, np.uint16)), GRAY), (128, 128, 128))
    assert near(read(gray, ADOBE), (52, 52, 52))
    assert near(read(gray, GRAY, "L"), (55,))  # a mask is no colour
    assert near(read(Image.new("RGB", (8, 8), GREEN).quantize(4), ADOBE), (0, 181, 64))
    half = Image.new("RGBA", (8, 8), (*GREEN, 255))
    half.paste((*GREEN, 0), (0, 0, 4, 8))
    shown = read(half, ADOBE)
    assert near(shown.crop((0, 0, 4, 8)), (255, 255, 255)) and near(shown.crop((4, 0, 8, 8)), (0, 181, 64))


@pytest.mark.parametrize("icc", [b"no profile", ADOBE[:200], GRAY])
def test_a_profile_that_cannot_be_used_is_ignored(icc: bytes) -> None:
    data = encoded(Image.new("RGB", (16, 16), GREEN), "PNG", icc_profile=icc)
    assert near(load_image(io.BytesIO(data)), GREEN)
    assert image_header(io.BytesIO(data)).profile == ""


def with_chunks(image: Image.Image, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG file with further chunks after its header."""
    data = png(image)
    more = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return io.BytesIO(data[:33] + b"".join(more) + data[33:])


def points(*numbers: float) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(number * 100_000) for number in numbers))


USUAL = (b"gAMA", struct.pack(">I", 45455))
LINEAR = (b"gAMA", struct.pack(">I", 100_000))
ADOBE_POINTS = points(0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


@pytest.mark.parametrize(
    ("chunks", "colour"),
    [
        ([USUAL], GREEN),
        ([USUAL, ADOBE_POINTS], (0, 180, 66)),  # with sRGB's curve, as programs show it
        ([(b"sRGB", b"\0"), LINEAR], GREEN),
        ([LINEAR], (132, 218, 147)),
        ([(b"cICP", bytes([1, 13, 0, 1]))], GREEN),
        ([(b"cICP", bytes([12, 13, 0, 1]))], (0, 183, 57)),  # Display P3
        ([(b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0")], (0, 183, 57)),
        ([points(0.3127, 0, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)], GREEN),  # no such white
    ],
)
def test_colours_are_converted_from_the_chunks_of_a_png(
    chunks: list[tuple[bytes, bytes]], colour: tuple[int, int, int]
) -> None:
    file = with_chunks(Image.new("RGB", (8, 8), GREEN), *chunks)
    assert near(load_image(file, name="x"), colour)
    assert bool(image_header(file, "x").profile) == (colour != GREEN)


def test_a_gray_png_with_linear_light() -> None:
    assert near(load_image(with_chunks(Image.new("L", (8, 8), 55), LINEAR), name="x"), (128, 128, 128))


@pytest.mark.parametrize(
    ("space", "index", "colour"),
    [(0xFFFF, "R03", (0, 181, 64)), (2, "", (0, 181, 64)), (1, "R98", GREEN), (0xFFFF, "R98", GREEN)],
)
def test_adobe_rgb_that_only_exif_names(space: int, index: str, colour: tuple[int, int, int]) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = space
    if index:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: index}
    data = encoded(Image.new("RGB", (8, 8), GREEN), "JPEG", exif=exif, quality=100, subsampling=0)
    assert near(load_image(io.BytesIO(data), name="x"), colour, within=2)
    assert bool(image_header(io.BytesIO(data), "x").profile) == (colour != GREEN)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_told(kind: str) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = io.BytesIO(encoded(first, kind, save_all=True, append_images=[second]))
    assert image_header(data, "x").notes == (ANIMATED,)
    assert near(load_image(data, name="x"), (255, 0, 0), within=2)
    assert image_header(io.BytesIO(encoded(first, kind)), "x").notes == ()


def test_what_is_guessed_of_colours_is_told() -> None:
    image = Image.new("RGB", (8, 8), GREEN)
    assert image_header(with_chunks(image, (b"cICP", bytes([9, 16, 0, 1]))), "x").notes == (HIGH_RANGE,)
    assert image_header(io.BytesIO(encoded(image, "PNG", icc_profile=b"x" * 200)), "x").notes == (NO_PROFILE,)
    assert image_header(io.BytesIO(encoded(image, "PNG", icc_profile=GRAY)), "x").notes == (NO_PROFILE,)
    assert image_header(io.BytesIO(png(image.convert("RGBA"))), "x").notes == (TRANSPARENT,)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_whose_range_is_unknown_are_refused(kind: type) -> None:
    numbers = np.arange(64, dtype=kind).reshape(8, 8) * 10_000
    with pytest.raises(LdmError, match="whose range is unknown"):
        image_header(io.BytesIO(encoded(Image.fromarray(numbers), "TIFF")), "x")
    with pytest.raises(LdmError, match="whose range is unknown"):
        load_image(Image.fromarray(numbers))
    short = Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))
    assert near(load_image(io.BytesIO(encoded(short, "TIFF")), name="x").crop((7, 7, 8, 8)), (246, 246, 246))


def test_lab_is_converted(tmp_path: Path) -> None:
    lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    image = ImageCms.profileToProfile(Image.new("RGB", (16, 16), (150, 140, 130)), srgb, lab, outputMode="LAB")
    assert isinstance(image, Image.Image)
    image.save(tmp_path / "a.tif")
    assert near(load_image(tmp_path / "a.tif"), (150, 140, 130), within=3)


# --- what lies beside the pixels --------------------------------------------------------------------------------------


def with_chunk(data: bytes, kind: bytes, content: bytes, late: bool = False, damaged: bool = False) -> bytes:
    """A PNG with another chunk after its header, or after its pixels."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ damaged)
    at = len(data) - 12 if late else 33
    return data[:at] + chunk + data[at:]


LONG = zlib.compress((b"ABCDEFG" * 430_000)[:3_000_000])
BESIDE = {
    "EXIF": (b"eXIf", b"garbage not tiff"),
    "bytes": (b"eXIf", b"b'Exif\\x00\\x00II*\\x00'"),
    "cut": (b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
    "raw": (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nno hex\n"),
    "zTXt": (b"zTXt", b"workflow\0\0" + LONG),
    "iTXt": (b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "method": (b"zTXt", b"workflow\0\7" + LONG[:50]),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_damaged_or_long_metadata_do_not_hide_the_pixels(tmp_path: Path, name: str, late: bool) -> None:
    image = place_image(24, 16)
    data = with_chunk(png(image), *BESIDE[name], late=late)
    assert image_header(io.BytesIO(data)).size == (24, 16)
    assert load_image(io.BytesIO(data)).tobytes() == image.tobytes()
    (tmp_path / "a.png").write_bytes(data)
    assert load_image(tmp_path / "a.png").tobytes() == image.tobytes()


def test_a_wrong_checksum_beside_the_pixels() -> None:
    image = place_image(24, 16)
    data = with_chunk(png(image), b"tEXt", b"a\0b", damaged=True)
    assert load_image(io.BytesIO(data)).tobytes() == image.tobytes()


def test_a_jpeg_with_damaged_exif() -> None:
    data = encoded(place_image(24, 16), "JPEG", exif=b"Exif\0\0garbage not tiff")
    assert load_image(io.BytesIO(data), least=1).size == (3, 2) and image_header(io.BytesIO(data)).size == (24, 16)


def test_an_image_is_turned_even_if_its_texts_are_too_long() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = with_chunk(encoded(place_image(24, 16), "PNG", exif=exif), *BESIDE["zTXt"])
    assert image_header(io.BytesIO(data)).size == load_image(io.BytesIO(data)).size == (16, 24)
    assert load_image(load_image(io.BytesIO(data))).size == (16, 24)  # turned once only


def test_settings_beside_long_texts(tmp_path: Path) -> None:
    save_png(place_image(24, 16), tmp_path / "a.png", {"seed": 1}, "a fox")
    (tmp_path / "b.png").write_bytes(with_chunk((tmp_path / "a.png").read_bytes(), *BESIDE["zTXt"]))
    assert read_settings(tmp_path / "b.png") == read_settings(tmp_path / "a.png") == ({"seed": 1}, "a fox")
    assert KEY in Image.open(tmp_path / "a.png").info


def test_a_profile_above_the_limit_is_named() -> None:
    data = with_chunk(png(place_image(24, 16)), b"iCCP", b"x\0\0" + LONG)
    with pytest.raises(LdmError, match="x cannot be read as an image: its colour profile has over 1 MB; save it with"):
        load_image(io.BytesIO(data), name="x")


def test_pixels_that_are_damaged_are_still_refused() -> None:
    data = png(place_image(240, 160))
    with pytest.raises(LdmError, match="it is no image, or damaged"):
        load_image(io.BytesIO(data[: len(data) // 2]), name="x")


def test_only_the_formats_that_are_allowed() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PPM")
    with pytest.raises(LdmError, match="cannot be read as an image"):
        load_noted(file, "upload", formats=("PNG", "JPEG"))
    assert load_noted(file, "upload", formats=("PPM",))[0].size == (8, 8)
