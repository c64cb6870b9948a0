"""A replica: an engine in a process of its own, and what goes to it and comes back while it makes a job's images.

A job goes there as its checked request, with its seeds, and so has the same images wherever it is made. Adapters go by
their places and digests, and are opened there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ldm.errors import LdmError
from ldm.models.prompts import PromptReader
from ldm.server.engine import Counts, Engine, NotTakenError, loaded
from ldm.server.events import EventReader
from ldm.server.jobs import FAILED, Event, MadeImage, ServerJob
from ldm.server.service import log_to_stderr, without_places
from pipelines.mixes import Mix, MixedAdapter, Wanted
from pipelines.provenance import provenance
from pipelines.request import Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaOrder:
    """What a replica is to make: images of a job."""

    request: Request  # without opened adapters
    adapters: tuple[tuple[Wanted, ...], ...]  # of each image
    rows: tuple[int, ...]  # numbers of the images
    priority: int
    previews: bool


@dataclass(frozen=True)
class ReplicaReport:
    """A change of a job in a replica, and what is known then."""

    event: Event
    state: str
    error: str
    status: int  # of HTTP, if it has failed
    notes: tuple[str, ...]
    made: tuple[MadeImage, ...]  # those that the event is about
    replica: str  # its name
    counts: Counts  # of its engine


@dataclass(frozen=True)
class AboutReplica:
    """A replica's model and size."""

    model: dict[str, Any]  # as for `without_places`
    most: int  # pixels of latents that it works on at a time


def order_of(job: ServerJob) -> ReplicaOrder:
    """The order of a job's images that are not made yet."""
    request = job.request
    adapters = tuple(tuple(map(_wanted, mix)) for mix in request.mixes)
    plain = replace(request, mixes=(), reader=PromptReader(request.reader.weights))  # which holds tokenizers
    rows = tuple(row for row in job.rows if job.made[row] is None)
    return ReplicaOrder(plain, adapters, rows, job.priority, job.previews)


def _wanted(one: MixedAdapter) -> Wanted:
    """An adapter of a mix as it is asked for elsewhere."""
    return Wanted(
        one.name, by_name=True, unet=one.unet, text=one.text, place="adapters", path=str(one.file), sha256=one.sha256,
        autov3=one.autov3,
    )  # fmt: skip


class EngineReplica:
    """An engine that makes images of orders."""

    def __init__(self, loading: Mapping[str, Any], most: int | None, threads: int | None) -> None:
        """Load a pipeline, and start its engine.

        Args:
            loading: settings of loading.
            most: as for `Engine`.
            threads: that compute on the CPU; None: as many as PyTorch chooses.
        """
        log_to_stderr()
        if threads is not None:
            torch.set_num_threads(threads)
        pipeline = loaded(loading)
        self.engine = Engine(pipeline, most=most, queue=2**31)  # those who send orders bound them
        self.model = without_places(provenance(loading, pipeline))
        self.name = f"{socket.gethostname()}-{secrets.token_hex(4)}"

    def check_health(self) -> None:
        """Raise if the engine has stopped, so that the replica is replaced."""
        if self.engine.failure:
            raise LdmError(self.engine.failure)

    async def about(self) -> AboutReplica:
        """The model and the size of the replica."""
        return AboutReplica(self.model, self.engine.most)

    async def make(self, order: ReplicaOrder) -> AsyncIterator[ReplicaReport]:
        """Make images, and report until they are there or cannot be made; whoever stops reading stops them.

        Raises:
            NotTakenError: the engine has stopped; another replica can make them.
        """
        reader = EventReader(asyncio.get_running_loop())
        beginning = asyncio.ensure_future(asyncio.to_thread(self._begun, order, reader))
        try:
            job = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(_cancel)
            raise
        over = False
        try:
            while not over:
                event = await reader.next()
                if event is None:  # nothing has happened for some time
                    continue
                over = event.last
                if over and self.engine.failure:
                    raise NotTakenError(self.engine.failure)
                yield self._report(job, event)
        finally:
            job.cancel()

    def _begun(self, order: ReplicaOrder, reader: EventReader) -> ServerJob:
        """The job of an order, which is on its way; it has failed if its adapters are not here."""
        missing = ""
        mixes: tuple[Mix, ...] = ()
        try:
            mixes = tuple(map(self.engine.pipeline.adapters.opened_here, order.adapters))
        except LdmError as error:
            log.error("an adapter differs between machines: %s", error)
            missing = "an adapter of this job is not the same on all machines of the server; its log says which"
        job = ServerJob(
            replace(order.request, mixes=mixes), priority=order.priority, previews=order.previews, rows=order.rows,
            listener=reader,
        )  # fmt: skip
        if missing:
            job.end(FAILED, missing)
            return job
        self.engine.submit(job)
        return job

    def _report(self, job: ServerJob, event: Event) -> ReplicaReport:
        rows = event.rows if event.kind == "images" else range(0)
        made = tuple(one for row in rows if (one := job.made[row]) is not None)
        counts = replace(self.engine.counts)  # as they are now
        return ReplicaReport(event, job.state, job.error, job.status, tuple(job.notes), made, self.name, counts)


def _cancel(beginning: asyncio.Future[ServerJob]) -> None:
    """Cancel a job whose reader went before it had begun."""
    if not beginning.cancelled() and beginning.exception() is None:
        beginning.result().cancel()
