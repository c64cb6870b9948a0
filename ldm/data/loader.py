"""A plan's batches, loaded in worker processes and handed out on the device.

Images are sent to the device as 8-bit numbers. Every process takes its rows of each batch: the number of processes and
of micro-batches changes only who computes a row, not the rows of the whole batch; and the crop, caption and noise of a
row depend on its sample alone.

B rows of this process, C latent channels, H×W height and width of the bucket, h×w height and width of the latents
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.beside import Framed, to_numbers
from ldm.data.cache import Latents
from ldm.data.framing import Frame, choose, decoded_side, render, to_pixels, visit_frame
from ldm.data.keyed import uniform
from ldm.data.plan import BatchPlan, Item, Visit
from ldm.data.skipped import Skipped
from ldm.data.streams import StreamPlan
from ldm.errors import LdmError, check_whole, first_line

T = TypeVar("T")


class Loaded(NamedTuple):
    """One loaded image."""

    key: str
    epoch: int
    caption: str
    score: float
    weight: float
    numbers: tuple[int, ...]  # time ids
    shown: Tensor  # pixels (H, W, 3) uint8, or moments (2C, h, w)
    beside: dict[str, Tensor]  # (H, W, C) uint8 each


@dataclass(frozen=True)
class Batch:
    """The samples of one forward pass of a process, with pixels, or with moments if latents are cached."""

    keys: list[str]  # the images' keys
    epochs: list[int]  # the epoch of each image
    captions: list[str]
    pixels: Tensor | None  # (B, 3, H, W) float32 in [-1, 1]
    moments: Tensor | None  # (B, 2C, h, w) float32: mean and standard deviation of the latents, not scaled
    size: Tensor  # (B, 6) float32: original height, width; top, left of the crop; target height, width (SDXL's order)
    scores: Tensor  # (B,) float32: aesthetic scores, NaN for images without a score
    weights: Tensor  # (B,) float32: of the images' losses
    # images beside these, framed as they are: condition (B, 3, H, W) and mask (B, 1, H, W) in [0, 1], before
    # (B, 3, H, W) in [-1, 1]; those that the data have
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy of the batch with `change` applied to every tensor."""
        pixels, moments = (None if one is None else change(one) for one in (self.pixels, self.moments))
        beside = {name: change(images) for name, images in self.beside.items()}
        size, scores, weights = change(self.size), change(self.scores), change(self.weights)
        return replace(self, pixels=pixels, moments=moments, size=size, scores=scores, weights=weights, beside=beside)

    def parts(self, count: int) -> list[Batch]:
        """The batch cut into `count` parts of (nearly) equal length; fewer parts if it has fewer images."""
        edges = [len(self.keys) * k // count for k in range(count + 1)]
        rows = [slice(start, end) for start, end in pairwise(edges) if start < end]
        return [
            replace(
                self.map(lambda tensor, row=row: tensor[row]),  # type: ignore[misc]
                keys=self.keys[row], epochs=self.epochs[row], captions=self.captions[row],
            )
            for row in rows
        ]  # fmt: skip

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        pinned = torch.device(device).type == "cuda"  # to other devices, asynchronous copies might be read too early
        return self.map(lambda tensor: tensor.to(device, non_blocking=pinned))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; PyTorch's data loader calls this."""
        return self.map(lambda tensor: tensor.pin_memory())


class Loader:
    """An endless iterator over the batches of one process, `micro_batches` for each step, from step `start` on.

    A damaged image is replaced by another image of its bucket, counted in `skipped` and listed.

    Args:
        plan: the order of the samples.
        start: the first step.
        rank: the rank of this process.
        world: the number of processes.
        micro_batches: the number of batches into which this process's rows of a step are divided.
        workers: the number of worker processes; 0: load in this process.
        device: the device of the batches.
        latents: the plan's cache; batches then have moments and no pixels.

    Raises:
        LdmError: the batch does not divide, or a number makes no sense; while iterating: too many images are damaged.
    """

    def __init__(
        self,
        plan: BatchPlan | StreamPlan,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batches: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        latents: Latents | None = None,
    ) -> None:
        check_whole("loader", "start", start, 0, 2**62)
        check_whole("loader", "workers", workers, 0, 1024)
        check_whole("loader", "rank", rank, 0, world - 1)
        check_whole("loader", "micro_batches", micro_batches, 1, plan.batch)
        if plan.batch % (world * micro_batches):
            raise LdmError(
                f"a batch of {plan.batch} does not divide among {world} processes and {micro_batches} micro-batches; "
                "choose a multiple of their product"
            )
        self.plan, self.start, self.rank, self.world, self.micro_batches = plan, start, rank, world, micro_batches
        self.workers, self.device, self.latents = workers, torch.device(device), latents
        self.skipped = Skipped(plan.name, plan.folder / f"skipped-{rank}.txt")

    def __iter__(self) -> Iterator[Batch]:
        loading = DataLoader(
            _Loading(self.plan, self.latents),
            sampler=self._items(),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise the data loader draws from the global generator
            worker_init_fn=_deaf,
        )
        seen = 0
        for batch, damaged in _named(loading):
            for key, reason in damaged:
                self.skipped.add(key, reason)
            if batch is None:
                key, reason = damaged[-1]
                raise LdmError(f"{self.plan.name}: neither an image nor its replacements can be read: {key}: {reason}")
            seen += len(batch.keys)
            self.skipped.check(seen)
            yield _ready(batch, self.device)

    def _items(self) -> Iterator[Item]:
        """This process's rows of each micro-batch."""
        rows = self.plan.batch // (self.world * self.micro_batches)
        for item in self.plan.items(self.start):
            for part in range(self.micro_batches):
                first = (part * self.world + self.rank) * rows
                yield replace(item, visits=item.visits[first : first + rows])


def once(plan: BatchPlan, rows: int, rank: int, world: int, device: torch.device | str) -> Iterator[Batch]:
    """This process's share of all images of a plan, each once, with the crop of epoch 0, in a fixed order.

    A batch has up to `rows` images of one bucket, the fullest buckets first. Images that cannot be decoded are left
    out and listed.
    """
    loading, skipped = _Loading(plan, None), Skipped(plan.name, plan.folder / f"skipped-{rank}.txt")
    pieces = [
        Item(sides, [Visit(int(index), 0) for index in members[start : start + rows]], [])
        for sides, members in sorted(plan.buckets.items(), key=lambda bucket: -len(bucket[1]))
        for start in range(0, len(members), rows)
    ]
    for item in pieces[rank::world]:
        found, damaged = loading.rows(item)
        for key, reason in damaged:
            skipped.add(key, reason)
        if found:
            yield _ready(loading.batch(found), device)


def _deaf(worker: int) -> None:
    """Make a worker ignore SIGINT and SIGTERM: the main process ends its workers once it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _named(loading: Iterable[T]) -> Iterator[T]:
    """Iterate over `loading`, and raise a clear LdmError if a worker was killed."""
    try:
        yield from loading
    except (RuntimeError, ConnectionError, EOFError) as error:
        said = first_line(error) if isinstance(error, RuntimeError) else "DataLoader worker closed its connection"
        if "DataLoader worker" not in said:
            raise
        raise LdmError(f"a process that loads images ended ({said}); if memory ran out, lower data.workers") from None


def _ready(batch: Batch, device: torch.device | str) -> Batch:
    """A loaded batch moved to the device, with pixels (B, 3, H, W) in [-1, 1] and images beside them as numbers."""
    batch = batch.to(device)
    beside = {name: to_numbers(name, images) for name, images in batch.beside.items()}
    return replace(batch, pixels=None if batch.pixels is None else to_pixels(batch.pixels), beside=beside)


class _Loading(Dataset):
    """The dataset of batches: a plan's item gives a batch, pixels (B, H, W, 3) uint8, and a list of damaged images."""

    def __init__(self, plan: BatchPlan | StreamPlan, latents: Latents | None) -> None:
        self.plan = plan
        self.latents = latents

    def __getitem__(self, item: Item) -> tuple[Batch | None, list[tuple[str, str]]]:
        rows, damaged = self.rows(item)
        return self.batch(rows) if len(rows) == len(item.visits) else None, damaged

    def rows(self, item: Item) -> tuple[list[Loaded], list[tuple[str, str]]]:
        """The readable images, and the keys of damaged ones with reasons."""
        rows: list[Loaded] = []
        damaged: list[tuple[str, str]] = []
        for visit in item.visits:
            for candidate in self._candidates(visit, item.spares):
                try:
                    rows.append(self._row(candidate, item.sides))
                    break
                except LdmError as error:
                    damaged.append((self.plan.example(candidate.image).key, str(error)))
        return rows, damaged

    def batch(self, rows: list[Loaded]) -> Batch:
        """Rows as a batch."""
        shown = torch.stack([row.shown for row in rows])
        pixels, moments = (None, shown) if self.latents else (shown, None)
        size, scores, weights = (
            torch.tensor(column, dtype=torch.float32)
            for column in zip(*((row.numbers, row.score, row.weight) for row in rows), strict=True)
        )
        beside = {name: torch.stack([row.beside[name] for row in rows]) for name in self.plan.beside}
        keys, epochs, captions = (list(column) for column in zip(*(row[:3] for row in rows), strict=True))
        return Batch(keys, epochs, captions, pixels, moments, size, scores, weights, beside)

    def _candidates(self, visit: Visit, spares: list[Visit]) -> Iterator[Visit]:
        """The visit, then the spares that may replace it, in an order that depends on the visit."""
        yield visit
        key = self.plan.example(visit.image).key
        first = int(uniform(self.plan.seed, "replacement", key, visit.epoch) * len(spares))
        yield from [*spares[first:], *spares[:first]]

    def _row(self, visit: Visit, sides: tuple[int, int]) -> Loaded:
        plan, example = self.plan, self.plan.example(visit.image)
        choice = int(uniform(plan.seed, "caption", example.key, visit.epoch) * len(example.captions))
        caption = example.captions[choice] if example.captions else ""
        caption = plan.tags.of(caption, plan.seed, example.key, visit.epoch)
        score = float("nan") if example.score is None else example.score
        known = example.key, visit.epoch, caption, score, example.weight
        original = example.width, example.height
        frame = visit_frame(plan.framing, plan.seed, example.key, visit.epoch, original, sides)
        image = Framed(visit.image, plan.seed, example.key, visit.epoch, frame, partial(self._rendered, visit, frame))
        beside = {name: torch.from_numpy(one.of(image)) for name, one in plan.beside.items()}
        if self.latents:
            crop = choose(plan.framing, plan.seed, example.key, visit.epoch)
            moments, numbers = self.latents.read(visit.image, *crop)
            return Loaded(*known, numbers, moments, beside)
        return Loaded(*known, frame.numbers, torch.from_numpy(image.pixels), beside)

    def _rendered(self, visit: Visit, frame: Frame) -> np.ndarray:
        """An image's pixels (H, W, 3) uint8 in its frame."""
        return render(self.plan.read(visit.image, decoded_side(frame)), frame)
