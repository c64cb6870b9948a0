"""The HTTP interface of a service: jobs, their progress as Server-Sent Events, their images, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

import ldm
from ldm.errors import LdmError
from ldm.images import png_bytes
from ldm.server.engine import NotTakenError
from ldm.server.guard import Guard, error_body
from ldm.server.history_api import HistoryApi
from ldm.server.info import info_routes
from ldm.server.jobs import CANCELLED, FAILED, Event, ServerJob
from ldm.server.metrics import Metrics
from ldm.server.page_files import page_files, page_routes
from ldm.server.reading import read_json
from ldm.server.service import Service

LARGE = 2**18  # bytes of a request that is read beside few others
READERS = 4  # large requests that are read at a time
READ_SECONDS = 30.0  # in which a request must have arrived
EVENTS = 64  # of a reader that does not keep up, until steps are left out
ALIVE_SECONDS = 15.0  # between signs of life of a stream
LOOK_SECONDS = 0.25  # between looks whether a client that waits is still there
SEND_SECONDS = 60.0  # in which a reader must take an event


class RefusedError(Exception):
    """A request that is answered with a status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(service: Service, key: str = "", names: Iterable[str] = ()) -> Guard:
    """The application of a service; `key` and `names` are as for `Guard`."""
    app = FastAPI(title="ldm", version=ldm.__version__, docs_url=None, redoc_url=None)  # whose pages load scripts
    jobs = JobsApi(service)
    app.include_router(jobs.routes())
    app.include_router(about(service, Metrics(service)))
    for routes in (info_routes(service, jobs.answering), HistoryApi(service).routes(), page_routes()):
        app.include_router(routes)
    for kind in (LdmError, RefusedError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, jobs.failed)
    return Guard(app, key, names, page_files())


def about(service: Service, metrics: Metrics) -> APIRouter:
    """Routes that say how the server is and what it has."""
    engine = service.engine

    async def alive() -> Response:
        """Whether the server works; if not, it must be started again."""
        return JSONResponse({"problem": engine.failure}, 503 if engine.failure else 200)

    async def ready() -> Response:
        """Whether the server takes jobs now."""
        engine.check_open()
        return JSONResponse({"waiting": len(engine.waiting)})

    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def settings() -> dict[str, Any]:
        """JSON Schema of the body of a job."""
        return service.schema()

    async def adapters() -> list[str]:
        """The names of adapters that jobs can name."""
        return await run_in_threadpool(service.adapters)

    routes = APIRouter()
    for path, answer in (
        ("/healthz", alive), ("/readyz", ready), ("/metrics", figures), ("/v1/settings", settings),
        ("/v1/adapters", adapters),
    ):  # fmt: skip
        routes.add_api_route(path, answer, methods=["GET"], response_model=None)
    return routes


class JobsApi:
    """The routes of jobs."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.readers = asyncio.Semaphore(READERS)

    def routes(self) -> APIRouter:
        """All routes of jobs."""
        routes, job = APIRouter(), "/v1/jobs/{name}"
        body = {"requestBody": {"content": {"application/json": {"schema": self.service.schema()}}, "required": True}}
        routes.add_api_route(
            "/v1/jobs", self.submit, methods=["POST"], status_code=202, response_model=None, openapi_extra=body
        )
        routes.add_api_route(job, self.state, methods=["GET"], response_model=None)
        routes.add_api_route(job, self.cancel, methods=["DELETE"], response_model=None)
        routes.add_api_route(f"{job}/events", self.events, methods=["GET"], response_model=None)
        routes.add_api_route(f"{job}/images/{{number}}", self.image, methods=["GET"], response_model=None)
        return routes

    async def submit(self, request: Request) -> Response:
        """Take a job. The header Accept chooses the answer: by default the job's state, at once.

        With `text/event-stream` its events follow, with `image/png` its first image; both end it if the client is gone.
        """
        reader, wanted = EventReader(asyncio.get_running_loop()), request.headers.get("accept", "")
        self.service.engine.check_open()  # before anything is read
        job = await self.answering(request, lambda given: self.service.accept(given, reader))
        if "text/event-stream" in wanted:
            return EventStream(job, reader, own=True)
        job.listeners.remove(reader)
        if wanted == "image/png":
            await until_over(job, request)
            try:
                return await self._image(job, 0)
            finally:
                self.service.forget(job)  # the client does not know its name
        return JSONResponse(described(job), 202, {"location": f"/v1/jobs/{job.id}"})

    async def answering(self, request: Request, answer: Callable[[dict[str, Any]], Any]) -> Any:
        """What a function gives for the JSON object of a request; a large one is read beside few others."""
        large = int(request.headers.get("content-length", LARGE)) >= LARGE
        async with self.readers if large else contextlib.nullcontext():
            body = await read_body(request, self.service.limits.body)
            return await run_in_threadpool(lambda: answer(read_json(body)))

    async def state(self, name: str) -> Response:
        """The state of a job."""
        return JSONResponse(described(self._job(name)))

    async def cancel(self, name: str) -> Response:
        """Stop a job, within a step."""
        job = self._job(name)
        job.cancel()
        return JSONResponse(described(job))

    async def events(self, name: str) -> Response:
        """The events of a job, from now on."""
        job, reader = self._job(name), EventReader(asyncio.get_running_loop())
        job.listeners.append(reader)
        return EventStream(job, reader, own=False)

    async def image(self, name: str, number: int) -> Response:
        """A finished image, with its record."""
        return await self._image(self._job(name), number)

    async def _image(self, job: ServerJob, number: int) -> Response:
        data = await run_in_threadpool(self.service.png, job, number)
        if data is None and job.state in (FAILED, CANCELLED):
            raise RefusedError(job.status, job.error or "the job was cancelled")
        if data is None:
            raise RefusedError(404, f"image {number} is not there, or not yet")
        return Response(data, media_type="image/png")

    def _job(self, name: str) -> ServerJob:
        job = self.service.job(name)
        if job is None:
            raise RefusedError(404, "there is no such job, or no more")
        return job

    async def failed(self, _: Request, error: Exception) -> Response:
        """The answer to a request that failed."""
        if isinstance(error, NotTakenError):
            return JSONResponse(error_body(str(error), "busy"), 503, {"retry-after": str(self._wait())})
        if isinstance(error, LdmError):
            return JSONResponse(error_body(str(error), "invalid_request_error"), 400)
        if isinstance(error, RefusedError):
            return JSONResponse(error_body(str(error), "invalid_request_error"), error.status)
        if isinstance(error, HTTPException):
            return JSONResponse(
                error_body(str(error.detail), "invalid_request_error"), error.status_code, error.headers
            )
        if isinstance(error, RequestValidationError):
            return JSONResponse(error_body("the path needs a whole number", "invalid_request_error"), 404)
        return JSONResponse(error_body("a defect of this program; its log says more", "server_error"), 500)

    def _wait(self) -> int:
        """Seconds in which about half of the queue will have begun, 1 to 60."""
        counts = self.service.engine.counts
        each = counts.busy / counts.images if counts.images else 1.0
        return min(max(math.ceil(each * len(self.service.engine.waiting) / 2), 1), 60)


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

    def listen(_: Event) -> None:
        if job.over.is_set():
            loop.call_soon_threadsafe(over.set)

    job.listeners.append(listen)
    while not job.over.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), LOOK_SECONDS)
        if await request.is_disconnected():
            job.cancel()


# --- events -----------------------------------------------------------------------------------------------------------


class EventReader:
    """The events of a job for one stream: called by the engine's thread, read in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if event.kind != "step" or self.queue.qsize() < EVENTS:
            self.queue.put_nowait(event)


class EventStream(StreamingResponse):
    """A job's events as Server-Sent Events; with `own`, the job is cancelled when the client is gone.

    A client that is gone at once never starts the generator of messages, so it is the response that cleans up. One that
    takes an event too slowly counts as gone.
    """

    def __init__(self, job: ServerJob, reader: EventReader, own: bool) -> None:
        super().__init__(_messages(job, reader), media_type="text/event-stream")
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


async def _messages(job: ServerJob, reader: EventReader) -> AsyncIterator[str]:
    over = job.over.is_set()
    yield _message("state", described(job))
    while not over:
        try:
            event = await asyncio.wait_for(reader.queue.get(), ALIVE_SECONDS)
        except TimeoutError:
            yield ": still at it\n\n"
            continue
        over = event.kind == "state" and job.over.is_set()
        data = described(job) if event.kind != "step" else await run_in_threadpool(_step, event)  # encodes previews
        yield _message(event.kind, data)


def _message(kind: str, data: dict[str, Any]) -> str:
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
