"""Captioned images that can only be read from the beginning: remote or piped shards, streamed datasets.

The order is a function of the seed and the epoch: shards in shuffled order, and images through a shuffle buffer. Every
process reads the whole stream and decodes its own rows, so that the batches do not depend on the number of processes; a
resumed run reads the consumed images again, without decoding them. For long training, copy the data to a disk.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ldm.data import hugging_face
from ldm.data.beside import Beside
from ldm.data.framing import Framing, choose_buckets
from ldm.data.image_set import Captions, Example, check_captions, check_size, made, read_image
from ldm.data.keyed import generator, uniform
from ldm.data.places import IMAGE_SUFFIXES
from ldm.data.plan import SPARES, Item, Visit
from ldm.data.skipped import Skipped
from ldm.data.tags import NO_TAGS, Tags
from ldm.data.tar import captions_of
from ldm.errors import LdmError, check_whole, first_line
from ldm.images import image_header

log = logging.getLogger(__name__)

REPEATED = "repeats are not read of a stream: each image comes once in an epoch"

Arrival = tuple[str, bytes, Callable[[], Captions], list[str]]  # key, file, captions, what is not read of it


@dataclass(frozen=True)
class Streamed:
    """One image of a stream."""

    example: Example
    data: bytes


class Stream(Protocol):
    """A source of images that is read in one order."""

    name: str

    def arrivals(self, seed: int, epoch: int) -> Iterator[Arrival]:
        """All images once."""

    def unread(self) -> str:
        """What may hold captions in the stream and is not read, and the remedy; "" if nothing is known."""

    def passed_over(self) -> list[str]:
        """What the stream holds and is not read, a line for each kind, as far as it is known before it is read."""


class TarStream:
    """WebDataset shards at addresses that the `webdataset` library opens (https:, pipe:, files)."""

    def __init__(self, name: str, addresses: list[str], caption_column: str | None = None) -> None:
        self.name = name
        self.caption_column = caption_column or ""
        self.addresses = addresses

    def arrivals(self, seed: int, epoch: int) -> Iterator[Arrival]:
        """All images once."""
        from webdataset.tariterators import tarfile_samples

        order = torch.randperm(len(self.addresses), generator=generator(seed, "shards", epoch)).tolist()
        for sample in tarfile_samples({"url": self.addresses[index]} for index in order):
            texts = {suffix: sample[suffix] for suffix in ("txt", "json") if suffix in sample}
            others = [suffix for suffix in sample.keys() - texts.keys() - IMAGE_SUFFIXES if suffix[:2] != "__"]
            notes = [f".{suffix} beside it is not read of a stream" for suffix in sorted(others)]
            for suffix in sorted(sample.keys() & IMAGE_SUFFIXES):
                captions = partial(captions_of, texts, self.caption_column)
                yield f"{sample['__key__']}.{suffix}", sample[suffix], captions, notes

    def unread(self) -> str:
        """Nothing that is known before the shards are read."""
        return ""

    def passed_over(self) -> list[str]:
        """Nothing that is known before the shards are read."""
        return []


class DatasetStream:
    """A streamed dataset of Hugging Face's `datasets`. Without a column of keys, a key is a digest of the image."""

    def __init__(self, name: str, split: str = "train", caption: str | None = None, image: str | None = None) -> None:
        self.name = name
        dataset = hugging_face.load(name, split, streaming=True)
        self.columns = hugging_face.Columns(name, dataset, caption, image)
        self.rows = self.columns.undecoded(dataset)

    def arrivals(self, seed: int, epoch: int) -> Iterator[Arrival]:
        """All images once."""
        rows = self.rows.shuffle(seed=seed % 2**32, buffer_size=1)  # shuffles the order of the dataset's files
        rows.set_epoch(epoch)
        for row in rows:
            with hugging_face.open_image(row[self.columns.image]) as file:
                data = file.read()
            name = self.columns.key and row[self.columns.key]
            key = hashlib.blake2b(data, digest_size=8).hexdigest() if name is None else str(name)
            yield key, data, partial(self.columns.captions, row), []

    def unread(self) -> str:
        """The columns, if none is known to hold captions."""
        return self.columns.unread()

    def passed_over(self) -> list[str]:
        """The columns of images but the one that is read."""
        return self.columns.passed_over()


class StreamPlan:
    """The batches of a run over a stream, with the interface of `BatchPlan`.

    Args:
        stream: the source of the images.
        framing: buckets and crops.
        batch: images in a step, over all processes and micro-batches.
        seed: the run's seed.
        folder: the folder for the list of skipped images.
        captions: "required" (images without captions are skipped and counted) or "optional".
        buffer: the size of the shuffle buffer in images; memory also holds up to a batch for each bucket.
        rank: the rank of this process, which writes a list of its own.
        tags: how captions change from visit to visit.
    """

    def __init__(
        self,
        stream: Stream,
        framing: Framing,
        batch: int,
        seed: int,
        folder: Path,
        captions: str = "required",
        buffer: int = 1000,
        rank: int = 0,
        tags: Tags = NO_TAGS,
    ) -> None:
        check_captions(captions)
        check_whole("stream", "batch", batch, 1, 2**24)
        check_whole("stream", "buffer", buffer, 1, 2**24)
        self.stream, self.framing, self.batch, self.seed = stream, framing, batch, seed
        self.name, self.folder, self.captions, self.buffer = stream.name, folder, captions, buffer
        self.beside: dict[str, Beside] = {}  # a stream has none
        self.tags = tags
        self.seen = 0  # images read so far
        self.left_out = 0  # images so far that would be enlarged too much
        self.noted: set[str] = set()  # what was logged of images
        self.unread = stream.unread()
        if self.unread and captions == "optional":
            log.warning("%s: no image has a caption; %s", self.name, self.unread)
        for line in stream.passed_over():
            log.warning("%s: %s", self.name, line)
        self.list = made(folder) / f"skipped-stream-{rank}.txt"

    def items(self, start: int) -> Iterator[Item]:
        """The batches from a step on, without end; earlier ones are read, but not returned.

        Raises:
            LdmError: the stream fails, holds no usable image, or too many cannot be used.
        """
        waiting: defaultdict[int, list[Visit]] = defaultdict(list)
        spares: dict[int, list[Visit]] = {}
        skipped, self.seen, self.left_out = Skipped(self.name, self.list, fresh=True), 0, 0
        sides, step = self.framing.sides(), 0
        for epoch in count():
            usable = 0
            for streamed in self._shuffled(epoch, skipped):
                bucket, enlarged = choose_buckets(
                    self.framing, np.array([streamed.example.width]), np.array([streamed.example.height])
                )
                if enlarged[0] > self.framing.upscale:
                    self.left_out += 1
                    continue
                usable += 1
                number = int(bucket[0])
                waiting[number].append(Visit(streamed, epoch))
                if len(waiting[number]) == self.batch:
                    visits = waiting.pop(number)
                    if step >= start:
                        yield Item(sides[number], visits, spares.get(number, visits[:SPARES]))
                    spares[number] = visits[:SPARES]
                    step += 1
            if not usable:
                raise LdmError(f"{self.name} holds no image that can be used; {self.left_out} are too small")

    def example(self, image: Streamed) -> Example:
        """The key, captions and size of an image of the plan."""
        return image.example

    def read(self, image: Streamed, least: int) -> Image.Image:
        """An image of the plan; for `least` see `load_image`. Raises LdmError if it cannot be decoded."""
        return read_image(io.BytesIO(image.data), (image.example.width, image.example.height), least)

    def _note(self, key: str, notes: Iterable[str]) -> None:
        """Log each kind of what is left out or guessed when images are read, with the first image of its kind."""
        for note in notes:
            if note not in self.noted:
                self.noted.add(note)
                log.warning("%s: %s is the first image of which this is true: %s", self.name, key, note)

    def _shuffled(self, epoch: int, skipped: Skipped) -> Iterator[Streamed]:
        """The images of an epoch, shuffled by the buffer."""
        buffer: list[Streamed] = []
        for number, streamed in enumerate(self._usable(epoch, skipped)):
            if len(buffer) < self.buffer:
                buffer.append(streamed)
                continue
            index = int(uniform(self.seed, "buffer", epoch, number) * len(buffer))
            yield buffer[index]
            buffer[index] = streamed
        for index in torch.randperm(len(buffer), generator=generator(self.seed, "rest", epoch)).tolist():
            yield buffer[index]

    def _usable(self, epoch: int, skipped: Skipped) -> Iterator[Streamed]:
        """The images of an epoch with valid headers and captions, in the stream's order."""
        arrivals = self.stream.arrivals(self.seed, epoch)
        while True:
            try:
                key, data, captions, notes = next(arrivals)
            except StopIteration:
                return
            except Exception as error:  # the libraries pass on any error of their file systems
                raise LdmError(f"{self.name}: the stream broke off: {first_line(error)}") from None
            self.seen += 1
            try:
                header = image_header(io.BytesIO(data), "the file")
                width, height = header.size
                check_size(width, height)
                said = captions()
                self._note(key, [*notes, *header.notes, *([REPEATED] if said.repeats > 1 else [])])
                if not said.texts and self.captions == "required":
                    raise LdmError("it has no caption" + (f"; {self.unread}" if self.unread else ""))
            except LdmError as error:
                skipped.add(key, str(error))
                skipped.check(self.seen)
                continue
            yield Streamed(Example(key, said.texts, width, height, said.score, said.weight), data)
