"""The HTTP interface of a service: jobs, their progress as Server-Sent Events, their images, health and metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import ldm
from ldm.errors import LdmError
from ldm.server.a1111 import WebuiApi
from ldm.server.engine import NotTakenError
from ldm.server.events import EventReader, EventStream, described, messages
from ldm.server.guard import Guard, error_body
from ldm.server.history import HistoryError
from ldm.server.history_api import HistoryApi
from ldm.server.info import info_routes
from ldm.server.jobs import CANCELLED, FAILED, ServerJob
from ldm.server.metrics import Metrics
from ldm.server.openai_images import ImagesApi, ParameterError, wrong_parameter
from ldm.server.page_files import page_files, page_routes
from ldm.server.reading import read_json
from ldm.server.receiving import Lingering, Readers, RefusedError, until_over
from ldm.server.runs_api import RunsApi
from ldm.server.service import Service


def make_app(service: Service, key: str = "", names: Iterable[str] = ()) -> ASGIApp:
    """The application of a service; `key` and `names` are as for `Guard`."""
    app = FastAPI(title="ldm", version=ldm.__version__, docs_url=None, redoc_url=None)  # whose pages load scripts
    jobs = JobsApi(service)
    app.include_router(jobs.routes())
    app.include_router(ImagesApi(service, jobs.readers).routes())
    app.include_router(WebuiApi(service, jobs.answering).routes())
    app.include_router(about(service, Metrics(service)))
    app.include_router(RunsApi(service, jobs.answering).routes())
    for routes in (info_routes(service, jobs.answering), HistoryApi(service).routes(), page_routes()):
        app.include_router(routes)
    for kind in (LdmError, RefusedError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, jobs.failed)
    app.add_exception_handler(ParameterError, wrong_parameter)
    return Lingering(Guard(app, key, names, page_files()))


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
        self.readers = Readers(service.limits.body)

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
            return EventStream(job, reader, messages(job, reader), own=True)
        job.listeners.remove(reader)
        if wanted == "image/png":
            await until_over(job, request)
            try:
                return await self._image(job, 0)
            finally:
                self.service.forget(job)  # the client does not know its name
        return JSONResponse(described(job), 202, {"location": f"/v1/jobs/{job.id}"})

    async def answering(self, request: Request, answer: Callable[[dict[str, Any]], Any]) -> Any:
        """What a function gives for the JSON object of a request."""
        return await self.readers.read(request, lambda body: answer(read_json(body)))

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
        return EventStream(job, reader, messages(job, reader), own=False)

    async def image(self, name: str, number: int) -> Response:
        """A finished image, with its record."""
        return await self._image(self._job(name), number)

    async def _image(self, job: ServerJob, number: int) -> Response:
        data = await run_in_threadpool(self.service.png, job, number)
        if data is None and job.state in (FAILED, CANCELLED):
            raise RefusedError(job.status, job.reason)
        if data is None:
            raise RefusedError(404, f"image {number} is not there, or not yet")
        return Response(data, media_type="image/png")

    def _job(self, name: str) -> ServerJob:
        job = self.service.job(name)
        if job is None:
            raise RefusedError(404, "there is no such job, or no more")
        return job

    async def failed(self, request: Request, error: Exception) -> Response:
        """The answer to a request that failed."""
        said = partial(error_body, path=request.url.path)
        if isinstance(error, NotTakenError):
            return JSONResponse(said(str(error), "busy"), 503, {"retry-after": str(self._wait())})
        if isinstance(error, HistoryError):
            return JSONResponse(said(str(error), "server_error"), 503)
        if isinstance(error, LdmError):
            return JSONResponse(said(str(error), "invalid_request_error"), 400)
        if isinstance(error, RefusedError):
            return JSONResponse(said(str(error), "invalid_request_error"), error.status)
        if isinstance(error, HTTPException):
            return JSONResponse(said(str(error.detail), "invalid_request_error"), error.status_code, error.headers)
        if isinstance(error, RequestValidationError):
            return JSONResponse(said("the address needs a whole number", "invalid_request_error"), 404)
        return JSONResponse(said("a defect of this program; its log says more", "server_error"), 500)

    def _wait(self) -> int:
        """Seconds in which about half of the queue will have begun, 1 to 60."""
        counts = self.service.engine.counts
        each = counts.busy / counts.images if counts.images else 1.0
        return min(max(math.ceil(each * len(self.service.engine.waiting) / 2), 1), 60)
