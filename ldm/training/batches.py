"""The batches of a stage: those to train on, through all its resolutions, and the held-out ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from accelerate import Accelerator

from ldm.data.cache import Latents
from ldm.data.framing import choose_buckets
from ldm.data.loader import Batch, Loader, once
from ldm.data.plan import BatchPlan
from ldm.data.sources import open_stream
from ldm.data.streams import StreamPlan
from ldm.errors import LdmError
from ldm.training.caching import Caches
from ldm.training.images import TrainingImages
from ldm.training.phases import Phase, phases
from ldm.training.prior import Prior, weighed
from ldm.training.sections import StageSection

log = logging.getLogger(__name__)
MOST_TIMES = 1000  # of an image in one batch


@dataclass(frozen=True)
class StageBatches:
    """This process's share of the batches of a stage."""

    data: TrainingImages
    section: StageSection
    accelerator: Accelerator
    seed: int  # of the run
    caches: Caches
    prior: Prior | None = None  # class images, which take half of each batch

    def sides(self) -> list[tuple[int, int]]:
        """Width and height of every image size in the stage."""
        return [pair for phase in phases(self.section) for pair in self.data.framing(phase.size).sides()]

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `start` on, through all resolutions.

        With class images, the loss is the mean over the others plus, times its weight, the mean over class images.
        """
        if self.prior is None:
            yield from self._steps(self.data, phases(self.section), self.caches.latents, start)
            return
        halves = [phase.halved for phase in phases(self.section)]
        pairs = zip(
            self._steps(self.data, halves, self.caches.latents, start),
            self._steps(self.prior.data, halves, self.caches.prior, start),
            strict=True,
        )
        for images, of_class in pairs:
            yield [*(weighed(batch, 2.0) for batch in images), *(self.prior.marked(batch) for batch in of_class)]

    def _steps(
        self, data: TrainingImages, parts_of_stage: Sequence[Phase], cached: Sequence[Latents], start: int
    ) -> Iterator[list[Batch]]:
        """The micro-batches of each step, of some images."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for number, phase in enumerate(parts_of_stage):
            if phase.end <= start:
                continue
            parts = phase.parts(world)
            plan = batch_plan(data, phase, self.seed, rank)
            if isinstance(plan, BatchPlan):
                log.info("size %d: %s", phase.size, plan)
            loader = Loader(
                plan, start=max(start, phase.first) - phase.first, rank=rank, world=world, micro_batches=parts,
                workers=data.section.workers, device=self.accelerator.device,
                latents=cached[number] if cached else None,
            )  # fmt: skip
            batches = iter(loader)
            for _ in range(max(start, phase.first), phase.end):
                yield list(islice(batches, parts))

    def last_resolution(self) -> Iterator[Batch]:
        """The batches of the last resolution, one after the other."""
        return chain.from_iterable(self.steps(phases(self.section)[-1].first))

    def held_out(self) -> Iterable[Batch]:
        """The held-out images at the last resolution, cropped in the middle."""
        phase, data = phases(self.section)[-1], self.data
        if data.images is None or not data.section.holdout:
            return ()
        framing = replace(data.framing(phase.size), crop="center", crops=0, flip=False)
        width, height = (lengths[data.rows[1]] for lengths in data.images.sizes())
        if (choose_buckets(framing, width, height)[1] > framing.upscale).all():
            return ()  # all held-out images are too small
        plan = BatchPlan(data.images, framing, phase.batch, self.seed, data.rows[1])
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = phase.micro_batch or max(phase.batch // world, 1)
        return once(plan, rows, rank, world, self.accelerator.device)


def check_batch(name: str, phase: Phase, plan: BatchPlan | StreamPlan) -> None:
    """Tell of a batch that has more images than there are.

    Raises:
        LdmError: it has so many that nobody can mean it.
    """
    if not isinstance(plan, BatchPlan) or phase.batch <= plan.visits:
        return
    times = phase.batch // plan.visits
    told = f"{name}: the batch at size {phase.size} is {phase.halves * phase.batch}"
    repeated = f", {plan.visits} with repeats" if plan.visits > len(plan) else ""
    each = f"{plan.name} has {len(plan)} images{repeated}: each comes {times} times or more in one update"
    if times > MOST_TIMES:
        raise LdmError(f"{told}, and {each}; set {name}.batch to {phase.halves * plan.visits}, or less")
    log.warning("%s, and %s, each time with its own noise", told, each)


def batch_plan(data: TrainingImages, phase: Phase, seed: int, rank: int) -> BatchPlan | StreamPlan:
    """The training batches at one resolution."""
    section, framing = data.section, data.framing(phase.size)
    if data.images is not None:
        return BatchPlan(data.images, framing, phase.batch, seed, data.rows[0], data.tags())
    assert section.source
    stream = open_stream(
        section.source, split=section.split, caption_column=section.caption_column, image_column=section.image_column
    )
    return StreamPlan(stream, framing, phase.batch, seed, data.folder, section.captions, rank=rank, tags=data.tags())
