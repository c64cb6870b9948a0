"""The routes that show runs of training, and begin some, which exist only if they were asked for at start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException

from ldm.errors import LdmError
from ldm.images import png_bytes
from ldm.server.info import Answering
from ldm.server.run_reports import RunReport, reports
from ldm.server.runs import RUNNING, SHOWN, RunFolder, Runs, StageFolder, size_of
from ldm.server.service import Service
from ldm.server.trainings import Trainer

T = TypeVar("T")
PIECE = 2**20  # bytes of a file that are sent at a time
# A report is a file that somebody else may have written: its page has no script, no origin, and loads nothing.
PAGE_HEADERS = {
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
}


class RunsApi:
    """The routes of runs."""

    def __init__(self, service: Service, answering: Answering) -> None:
        self.service, self.answering = service, answering

    def routes(self) -> APIRouter:
        """All routes."""
        routes = APIRouter()
        run, stage, report = "/v1/runs/{name}", "/v1/runs/{name}/stages/{stage}", "/v1/runs/{name}/reports/{report}"
        shown: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("/v1/runs", self.list), (run, self.state), (f"{run}/adapter", self.adapter),
            (f"{stage}/curves", self.curves), (f"{stage}/previews/{{step}}", self.preview),
            (f"{stage}/sheet", self.sheet), (report, self.report), (f"{report}/page", self.page),
        )  # fmt: skip
        done: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("/v1/runs", self.begin), (f"{run}/stop", self.stop), (f"{run}/keep", self.keep),
        )  # fmt: skip
        for path, answer in shown:
            routes.add_api_route(path, answer, methods=["GET"], response_model=None)
        for path, answer in done:
            routes.add_api_route(path, answer, methods=["POST"], response_model=None)
        return routes

    async def list(self) -> Response:
        """The runs, those that changed last first."""
        return JSONResponse(await run_in_threadpool(self._list, self._runs()))

    def _list(self, runs: Runs) -> dict[str, Any]:
        written = {run: run.written() for run in runs.all()}
        latest = sorted(written, key=lambda run: written[run], reverse=True)[:SHOWN]
        return {"total": len(written), "runs": [run.described(written[run], self._process(run)) for run in latest]}

    def _process(self, run: RunFolder) -> str | None:
        """The state of the process of a run, if this server started it."""
        return None if self.service.trainer is None else self.service.trainer.state(run)

    async def state(self, name: str) -> Response:
        """The state of a run, its stages and reports, and what its program said if a server started it."""

        def found(run: RunFolder) -> dict[str, Any]:
            process = self._process(run)
            return {
                **run.described(run.written(), process),
                "reports": [one.described() for one in reports(run)],
                "said": run.said(),
                "stops": process == RUNNING,
                "adapter": run.adapter() is not None,
            }

        return JSONResponse(await self._of(name, found))

    async def curves(self, name: str, stage: str) -> Response:
        """The figures of a stage's log, thinned to few points."""
        found = await self._of(name, lambda run: _stage(run, stage).curves())
        return JSONResponse({"curves": found.points, "damaged": found.damaged, "sampled": found.sampled})

    async def preview(self, name: str, stage: str, step: int) -> Response:
        """A preview of a stage."""
        pixels = self.service.limits.upload
        return await self._image(name, lambda run: _stage(run, stage).preview(step, pixels))

    async def sheet(self, name: str, stage: str) -> Response:
        """The sheet of images that ends the training of an adapter."""
        return await self._image(name, lambda run: _stage(run, stage).sheet(self.service.limits.upload))

    async def _image(self, name: str, find: Callable[[RunFolder], Image.Image | None]) -> Response:
        def found(run: RunFolder) -> bytes:
            image = find(run)
            if image is None:
                raise HTTPException(404, "there is no such image")
            return png_bytes(image)

        return Response(await self._of(name, found), media_type="image/png")

    async def report(self, name: str, report: str) -> Response:
        """The figures of a report."""
        return JSONResponse(await self._of(name, lambda run: _report(run, report).figures()))

    async def page(self, name: str, report: str) -> Response:
        """The page of a report, as it was written, in a sandbox."""
        data = await self._of(name, lambda run: _report(run, report).page())
        return Response(data, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    # --- training -----------------------------------------------------------------------------------------------------

    async def begin(self, request: Request) -> Response:
        """Train an adapter on uploaded images."""
        trainer = self._trainer()

        def begun(given: dict[str, Any]) -> dict[str, Any]:
            with self.service.uploading() as share:
                return {"id": trainer.begin(given, share).id}

        return JSONResponse(await self.answering(request, begun), 202)

    async def stop(self, name: str) -> Response:
        """Let a training save a checkpoint and end; asked again, let it end at once."""
        trainer = self._trainer()
        if not await self._of(name, trainer.stop):
            raise HTTPException(409, "this server trains no such run now")
        return Response(status_code=204)

    async def keep(self, request: Request, name: str) -> Response:
        """Copy a finished adapter to those that jobs can name."""
        trainer = self._trainer()
        wanted = (await self.answering(request, dict)).get("name")
        return JSONResponse({"name": await self._of(name, lambda run: trainer.keep(run, wanted))})

    async def adapter(self, name: str) -> Response:
        """The file of a finished adapter."""

        def found(run: RunFolder) -> tuple[BinaryIO, int]:
            file = run.adapter_file()
            if file is None:
                raise HTTPException(404, "the run has no finished adapter")
            return file, size_of(file)

        file, size = await self._of(name, found)
        headers = {"content-length": str(size)}
        return StreamingResponse(_pieces(file), media_type="application/octet-stream", headers=headers)

    def _trainer(self) -> Trainer:
        if self.service.trainer is None:
            raise HTTPException(404, "this server trains nothing; start it with --runs FOLDER --train")
        return self.service.trainer

    async def _of(self, name: str, ask: Callable[[RunFolder], T]) -> T:
        """What a function says of the run of a name."""
        runs = self._runs()

        def found() -> T:
            run = runs.run(name)
            if run is None:
                raise HTTPException(404, "there is no such run, or no more")
            try:
                return ask(run)
            except LdmError as error:
                raise HTTPException(422, str(error)) from None

        return await run_in_threadpool(found)

    def _runs(self) -> Runs:
        if self.service.runs is None:
            raise HTTPException(404, "this server shows no runs; start it with --runs FOLDER")
        return self.service.runs


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE):
            yield piece


def _stage(run: RunFolder, name: str) -> StageFolder:
    found = run.stage(name)
    if found is None:
        raise HTTPException(404, "the run has no such stage")
    return found


def _report(run: RunFolder, name: str) -> RunReport:
    found = next((one for one in reports(run) if one.id == name), None)
    if found is None:
        raise HTTPException(404, "the run has no such report")
    return found
