"""Receiving requests: bodies within limits, answers before their end, and clients that are gone while they wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.server.jobs import Event, ServerJob

T = TypeVar("T")
LARGE = 2**18  # bytes of a request that is read beside few others
READERS = 4  # large requests that are read at a time
READ_SECONDS = 30.0  # in which a request must have arrived
LINGER_SECONDS = 5.0  # in which the rest of a request arrives that was answered before
LOOK_SECONDS = 0.25  # between looks whether a client that waits is still there


class RefusedError(Exception):
    """A request that is answered with a status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Readers:
    """Reads requests, few large ones at a time."""

    def __init__(self, most: int) -> None:
        """A request has at most `most` bytes."""
        self.most = most
        self._places = asyncio.Semaphore(READERS)

    async def read(self, request: Request, answer: Callable[[bytes], T]) -> T:
        """What a function, called in another thread, gives for the body of a request; then nothing holds the body.

        Raises:
            RefusedError: as `read_body`.
        """
        large = int(request.headers.get("content-length", LARGE)) >= LARGE
        async with self._places if large else contextlib.nullcontext():
            return await run_in_threadpool(answer, await read_body(request, self.most))


class Lingering:
    """An ASGI application around another one: the rest of a request that was answered before is read, and dropped.

    A connection that is closed with data unread is reset, and the client may lose the answer (RFC 9112, section 9.6).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = scope["type"] == "http"

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if unread and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while unread:
                            await receiving()
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, receiving, sending)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: it is larger than `most` bytes, or does not arrive as a whole or in time.
    """
    too_large = RefusedError(413, f"the request has more than {most:,} bytes")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except ClientDisconnect:
        raise RefusedError(400, "the client was gone before the request had arrived") from None
    except TimeoutError:
        raise RefusedError(408, f"the request did not arrive within {READ_SECONDS:g} seconds") from None
    return bytes(body)


async def until_over(job: ServerJob, request: Request) -> None:
    """Wait until a job is over; cancel it if the client is gone."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def listen(event: Event) -> None:
        if event.last:
            loop.call_soon_threadsafe(over.set)

    job.listeners.append(listen)
    while not job.over.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await over.wait()
        if await request.is_disconnected():
            job.cancel()
