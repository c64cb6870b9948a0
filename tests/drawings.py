"""Drawings with captions, and a toy network that looks at them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ldm.images import to_tensor

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "gold": (230, 190, 40)}
SHAPES = {"circle": 40, "square": 4, "triangle": 3}  # corners
SIDE = 32  # pixels


class Toy:
    """Random convolutions in place of a trained network; captions become the image that they describe."""

    name, digest, preparation = "Toy", "0" * 64, "as it is"
    gives = frozenset(("features", "spatial", "logits"))

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 16, 5, 2), nn.Tanh(), nn.Conv2d(16, 24, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1)
            ).requires_grad_(False)

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor([image], SIDE, SIDE)[0]

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        features = (self.net(inputs) - self.net(torch.ones(1, 3, SIDE, SIDE))).flatten(1)  # 0 for a white page
        return {"features": features, "spatial": features[:, :8], "logits": 4 * features[:, :12]}

    def texts(self, captions: Sequence[str]) -> Tensor:
        drawn = [drawing(*caption.split()[1:3], random.Random(0)) for caption in captions]
        return self(torch.stack([self.prepare(one) for one in drawn]))["features"]


def drawing(colour: str, shape: str, draw: random.Random) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    place = (SIDE // 2 + draw.randint(-4, 4), SIDE // 2 + draw.randint(-4, 4), draw.randint(7, 11))
    ImageDraw.Draw(image).regular_polygon(place, SHAPES[shape], draw.randrange(0, 20), fill=COLOURS[colour])
    return image


def caption(number: int) -> str:
    return f"a {list(COLOURS)[number % 4]} {list(SHAPES)[number // 4 % 3]} number {number % 60}"


def drawings(folder: Path, count: int, seed: int, change: Callable[[Image.Image], Image.Image] | None = None) -> Path:
    """A folder of drawings with captions."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for number in range(count):
        image = drawing(*caption(number).split()[1:3], draw)
        (change(image) if change else image).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(caption(number))
    return folder


def tinted(image: Image.Image, amount: float) -> Image.Image:
    """Colours on their way to change places."""
    red, green, blue = image.split()
    return Image.blend(image, Image.merge("RGB", (blue, red, green)), amount)
