"""A job's events as Server-Sent Events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.types import Message, Receive, Scope, Send

from ldm.images import png_bytes
from ldm.server.jobs import Event, ServerJob

EVENTS = 64  # of a reader that does not keep up, until steps are left out
ALIVE_SECONDS = 15.0  # between signs of life of a stream
ALIVE = ": still at it\n\n"  # a sign of life
SEND_SECONDS = 60.0  # in which a reader must take an event


class EventReader:
    """The events of a job for one stream: called by the engine's thread, read in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._put, event)

    async def next(self) -> Event | None:
        """The next event; None if there is none for so long that a stream needs a sign of life."""
        try:
            async with asyncio.timeout(ALIVE_SECONDS):  # `wait_for` of Python 3.11 may forget that it was cancelled
                return await self.queue.get()
        except TimeoutError:
            return None

    def _put(self, event: Event) -> None:
        if event.kind != "step" or self.queue.qsize() < EVENTS:
            self.queue.put_nowait(event)


class EventStream(StreamingResponse):
    """Messages about a job as Server-Sent Events; with `own`, the job is cancelled when the client is gone.

    A client that is gone at once never starts the generator of messages, so it is the response that cleans up. One that
    takes an event too slowly counts as gone.
    """

    def __init__(self, job: ServerJob, reader: EventReader, messages: AsyncIterator[str], own: bool) -> None:
        super().__init__(messages, media_type="text/event-stream")
        self.job, self.reader, self.own = job, reader, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            with contextlib.suppress(TimeoutError):
                await super().__call__(scope, receive, send_in_time)
        finally:
            with contextlib.suppress(ValueError):
                self.job.listeners.remove(self.reader)
            if self.own:
                self.job.cancel()


async def messages(job: ServerJob, reader: EventReader) -> AsyncIterator[str]:
    """A job's state and then its events, as `/v1/jobs` has them."""
    over = job.over.is_set()
    yield message("state", described(job))
    while not over:
        event = await reader.next()
        if event is None:
            yield ALIVE
            continue
        over = event.last
        data = described(job) if event.kind != "step" else await run_in_threadpool(_step, event)  # encodes previews
        yield message(event.kind, data)


def message(kind: str, data: Mapping[str, Any]) -> str:
    """A Server-Sent Event."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _step(event: Event) -> dict[str, Any]:
    """A step as JSON."""
    found: dict[str, Any] = {"images": list(event.rows), "step": event.step, "steps": event.steps}
    if event.previews:
        found["previews"] = [_data_url(image) for image in event.previews]
    return found


def _data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def described(job: ServerJob) -> dict[str, Any]:
    """A job as JSON."""
    waited, ran = job.seconds
    return {
        "id": job.id,
        "state": job.state,
        "error": job.error,
        "notes": list(job.notes),
        "images": [
            None if made is None else {"url": f"/v1/jobs/{job.id}/images/{number}", "seed": job.request.seeds[number]}
            for number, made in enumerate(job.made)
        ],
        "steps": [[event.rows.start, event.step, event.steps] for event in list(job.latest.values())],
        "waited": round(waited, 3),
        "ran": round(ran, 3),
    }
