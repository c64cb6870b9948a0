"""Tiny captioned images, in a folder, a tar shard or a dataset."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(64, 64), (96, 64), (64, 96), (80, 72), (130, 70)]


def place_image(width: int, height: int) -> Image.Image:
    """An image whose red is x and whose green is y of each pixel; blue is the same everywhere."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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
