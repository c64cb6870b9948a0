"""The order of batches as a pure function of the step, so that a resumed run has nothing to replay.

Every bucket is an endless sequence of images, shuffled anew for each epoch and cut into batches of B. For a bucket with
n images, epoch e holds the batches from floor(e·n / B) to floor((e+1)·n / B); the batches of all buckets are shuffled
within the epoch. So no image is dropped or repeated within an epoch, and a bucket with fewer images than a batch
appears every few epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.framing import Framing, choose_buckets
from ldm.data.image_set import Example, ImageSet
from ldm.data.keyed import generator, uniform
from ldm.data.tags import NO_TAGS, Tags
from ldm.errors import LdmError, check_whole

SPARES = 4  # replacement images of a batch, used for images that cannot be decoded


@dataclass(frozen=True)
class Visit:
    """One image in one epoch."""

    image: Any  # an index into the image set; in a stream, the image itself
    epoch: int  # of the plan; of an image that comes several times in one, its own count


@dataclass(frozen=True)
class Item:
    """The samples of a batch, before they are loaded."""

    sides: tuple[int, int]  # width and height of its bucket
    visits: list[Visit]
    spares: list[Visit]  # replacements from the same bucket


@dataclass(frozen=True)
class Turns:
    """The visits of one bucket in an epoch, before they are shuffled: an image with k repeats comes k times.

    Random numbers are keyed by image and epoch, so each of its visits counts as an epoch of the image's own.
    """

    images: np.ndarray  # (N,)
    number: np.ndarray  # (N,): which of its image's visits it is, from 0
    repeats: np.ndarray  # (N,): of the image

    @classmethod
    def of(cls, images: np.ndarray, repeats: np.ndarray) -> Turns:
        """The visits of images (n,) with these repeats (n,)."""
        first = np.cumsum(repeats) - repeats
        number = np.arange(repeats.sum()) - np.repeat(first, repeats)
        small = np.uint32
        return cls(np.repeat(images, repeats), number.astype(small), np.repeat(repeats.astype(small), repeats))

    def __len__(self) -> int:
        return len(self.images)

    def visit(self, index: int, epoch: int) -> Visit:
        """One of the visits in an epoch."""
        return Visit(int(self.images[index]), epoch * int(self.repeats[index]) + int(self.number[index]))


class BatchPlan:
    """The batches of a run over an image set.

    Args:
        images: the image set; several plans can share it.
        framing: buckets and crops.
        batch: images in a step, over all processes and micro-batches.
        seed: the run's seed.
        samples: indices of the images to use; all by default.
        tags: how captions change from visit to visit.

    Raises:
        LdmError: no image is large enough.
    """

    def __init__(
        self,
        images: ImageSet,
        framing: Framing,
        batch: int,
        seed: int,
        samples: np.ndarray | None = None,
        tags: Tags = NO_TAGS,
    ) -> None:
        check_whole("plan", "batch", batch, 1, 2**24)
        self.images, self.framing, self.batch, self.seed = images, framing, batch, seed
        self.name, self.folder, self.beside = images.source.name, images.folder, images.beside
        self.tags = tags
        samples = np.arange(len(images)) if samples is None else np.sort(samples)
        widths, heights = (lengths[samples] for lengths in images.sizes())
        bucket, enlarged = choose_buckets(framing, widths, heights)
        small = enlarged > framing.upscale
        self.left_out = samples[small]  # indices of images that would be enlarged too much
        buckets = [samples[(bucket == number) & ~small] for number in range(len(framing.sides()))]
        if small.all():
            raise LdmError(
                f"{self.name}: all {len(samples)} images are too small for size {framing.size}; choose a smaller size, "
                f"or an upscale above {framing.upscale}"
            )
        self.buckets = {sides: some for sides, some in zip(framing.sides(), buckets, strict=True) if len(some)}
        repeats = images.repeats()
        self._turns = {sides: Turns.of(some, repeats[some]) for sides, some in self.buckets.items()}
        self.visits = sum(map(len, self._turns.values()))  # in an epoch

    def __len__(self) -> int:
        """The number of images in use."""
        return sum(map(len, self.buckets.values()))

    def __str__(self) -> str:
        text = f"{len(self)} images in {len(self.buckets)} buckets"
        small = len(self.left_out)
        text += f", {self.visits} visits in an epoch" if self.visits > len(self) else ""
        return text + (f"; {small} are too small (upscale {self.framing.upscale}) and left out" if small else "")

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(epoch * len(some) // self.batch for some in self._turns.values())

    def epoch(self, step: int) -> int:
        """The epoch a step belongs to."""
        epoch = step * self.batch // self.visits  # a lower bound: what an epoch's end cuts belongs to the next
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def item(self, step: int) -> Item:
        """The samples of a step's batch."""
        epoch = self.epoch(step)
        counts = np.array([len(some) for some in self._turns.values()])
        owed = np.repeat(np.arange(len(counts)), (epoch + 1) * counts // self.batch - epoch * counts // self.batch)
        order = owed[_shuffled(self.seed, "batches", epoch, len(owed))]
        place = step - self.first_step(epoch)
        sides, turns = list(self._turns.items())[order[place]]
        size = len(turns)
        start = (epoch * size // self.batch + int((order[:place] == order[place]).sum())) * self.batch
        name = f"{sides[0]}x{sides[1]}"
        visits = []
        for position in range(start, start + self.batch):
            turn, index = divmod(position, size)
            visits.append(turns.visit(int(_shuffled(self.seed, name, turn, size)[index]), turn))
        chosen = [int(uniform(self.seed, "spare", name, start, number) * size) for number in range(SPARES)]
        return Item(sides, visits, [Visit(int(turns.images[index]), visits[0].epoch) for index in chosen])

    def items(self, start: int) -> Iterator[Item]:
        """The batches from a step on, without end."""
        return map(self.item, count(start))

    def example(self, image: int) -> Example:
        """An image's entry in the index."""
        return self.images.example(image)

    def read(self, image: int, least: int) -> Image.Image:
        """An image of the plan; for `least` see `load_image`. Raises LdmError if it cannot be decoded."""
        return self.images.read(image, least)


def split(images: ImageSet, held_out: int | float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images for training and for validation; `held_out` is a number of images, or, below 1, a fraction.

    The choice depends on each image's key, so that adding or removing other images does not change it (a fixed number:
    hardly).

    Raises:
        LdmError: no image would be left for training.
    """
    places = np.array([uniform(0, "held out", key) for key in images.all_keys()])
    held = places < held_out if held_out < 1 else np.argsort(np.argsort(places)) < held_out
    if held_out < 0 or held.all():
        raise LdmError(
            f"{images.source.name}: holding out {held_out:g} of {len(images)} images leaves none to train with; hold "
            "out fewer"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


@lru_cache(maxsize=256)  # a few epochs of every bucket
def _shuffled(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    order = torch.randperm(count, generator=generator(seed, "order", purpose, epoch), dtype=torch.int32)
    return order.numpy()
