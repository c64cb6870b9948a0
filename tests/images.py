"""Tiny images: alone, as requests have them, and with captions in a folder, a tar shard or a dataset."""

from __future__ import annotations

import base64
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

SIZES = [(64, 64), (96, 64), (64, 96), (80, 72), (130, 70)]
UPPER = Image.new("L", (64, 64))  # a mask whose upper half is white
UPPER.paste(255, (0, 0, 64, 32))
CLEAR = Image.new("RGBA", (64, 64), (0, 0, 0, 255))  # whose upper half is transparent
CLEAR.paste((0, 0, 0, 0), (0, 0, 64, 32))


def image(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def place_image(width: int, height: int) -> Image.Image:
    """An image whose red is x and whose green is y of each pixel; blue is the same everywhere."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    return encoded(image, "PNG")


def in_base64(image: Image.Image, kind: str = "PNG", **options: object) -> str:
    """A file in base64."""
    return base64.b64encode(encoded(image, kind, **options)).decode()


def from_base64(text: str) -> Image.Image:
    """The image of a file in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images' values; they have the same size."""
    assert one.size == other.size
    pixels, others = (np.asarray(image.convert("RGB"), np.int32) for image in (one, other))
    return int(np.abs(pixels - others).max())


def samples(count: int) -> dict[str, tuple[bytes, str]]:
    """By name: files of noise of several sizes, and two captions each."""
    generator = np.random.default_rng(0)
    found = {}
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found[f"{number:03}"] = (png(Image.fromarray(noise)), f"image {number}\nthe same, number {number}")
    return found


def make_folder(root: Path, count: int) -> Path:
    """A folder of samples with text files beside them."""
    root.mkdir(parents=True, exist_ok=True)
    for name, (image, caption) in samples(count).items():
        (root / f"{name}.png").write_bytes(image)
        (root / f"{name}.txt").write_text(caption, encoding="utf-8")
    return root


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar file."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_shards(root: Path, count: int) -> str:
    """The same samples in two shards; their pattern."""
    root.mkdir(parents=True)
    files = [(f"{n}.png", f"{n}.txt", image, text.encode()) for n, (image, text) in samples(count).items()]
    for shard, some in enumerate((files[: count // 3], files[count // 3 :])):
        make_tar(root / f"{shard:04}.tar", {k: v for png, txt, i, t in some for k, v in ((png, i), (txt, t))})
    return f"{root}/{{0000..0001}}.tar"


def saved_dataset(root: Path, count: int, text: str = "text") -> str:
    """A dataset that `save_to_disk` wrote."""
    import datasets

    rows = [
        {"image": {"bytes": image, "path": None}, text: caption.splitlines(), "key": f"{name}.png"}
        for name, (image, caption) in samples(count).items()
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(root))
    return str(root)


def odd_files() -> dict[str, bytes]:
    """Ten: turned, CMYK, 16 bits, palette and transparency, animated, a JPEG called PNG."""
    image = place_image(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.full((16, 24), 40_000, dtype=np.uint16))
    clear = image.convert("RGBA")
    clear.putalpha(0)
    palette = image.quantize(16)
    palette.info["transparency"] = 0
    red = Image.new("RGB", (24, 16), "red")
    return {
        "turned.jpg": encoded(image, "JPEG", exif=exif), "turned.png": encoded(image, "PNG", exif=exif),
        "print.jpg": encoded(red.convert("CMYK"), "JPEG"), "deep.png": png(deep), "clear.png": png(clear),
        "palette.png": png(palette), "moving.gif": encoded(red, "GIF", save_all=True, append_images=[image]),
        "really-a-jpeg.png": encoded(red, "JPEG"), "gray.webp": encoded(image.convert("L"), "WEBP"),
        "deep.pgm": b"P5 24 16 65535\n" + np.full((16, 24), 40_000, dtype=">u2").tobytes(),
    }  # fmt: skip


BAD = {
    "empty.png": (b"", "it is no image, or damaged"),
    "text.png": (b"hello", "it is no image, or damaged"),
    "tiny.png": (png(place_image(7, 40)), "7×40 pixels: sides need at least 8 pixels"),
    "long.png": (png(place_image(161, 10)), "161×10 pixels: sides need at least 8 pixels and at most 16 times"),
    "program.png": (encoded(Image.new("RGB", (16, 16)), "EPS"), "is PostScript, a program that would be run"),
    "hdr.tif": (encoded(Image.new("F", (16, 16)), "TIFF"), "floating-point numbers"),
}


# --- colour profiles --------------------------------------------------------------------------------------------------


def s15(number: float) -> bytes:
    """A number as ICC's s15Fixed16."""
    return struct.pack(">i", round(number * 65536))


def profile(space: str, gamma: float, colorants: dict[str, tuple[float, float, float]]) -> bytes:
    """An ICC profile (version 2) of a space with one gamma; colorants (X, Y, Z) are relative to D50."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(8 + 3 + 67)
    white = (0.9642, 1.0, 0.8249)
    tags = {
        b"desc": text,
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + b"".join(map(s15, white)),
    }
    tags |= {name.encode() + b"XYZ": b"XYZ " + bytes(4) + b"".join(map(s15, xyz)) for name, xyz in colorants.items()}
    tags |= {name.encode() + b"TRC": curve for name in colorants or "k"}
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"test", 0x02400000, b"mntr", space.encode(), b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(s15, white))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


_RED, _GREEN, _BLUE = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
ADOBE = profile("RGB ", 563 / 256, {"r": _RED, "g": _GREEN, "b": _BLUE})  # Adobe RGB (1998)
GRAY = profile("GRAY", 1.0, {})  # linear
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREEN = (60, 180, 75)


def near(image: Image.Image, expected: tuple[int, ...], within: int = 1) -> bool:
    """Whether the image has these colours, to 1 of 255."""
    return bool((np.abs(np.asarray(image, np.int16) - np.array(expected)) <= within).all())
