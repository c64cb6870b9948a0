"""The routes that show runs of training, which exist only if a folder of them was named at start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException

from ldm.errors import LdmError
from ldm.images import png_bytes
from ldm.server.run_reports import RunReport, reports
from ldm.server.runs import SHOWN, RunFolder, Runs, StageFolder
from ldm.server.service import Service

T = TypeVar("T")
# A report is a file that somebody else may have written: its page has no script, no origin, and loads nothing.
PAGE_HEADERS = {
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
}


class RunsApi:
    """The routes of runs."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> APIRouter:
        """All routes."""
        routes = APIRouter()
        run, stage, report = "/v1/runs/{name}", "/v1/runs/{name}/stages/{stage}", "/v1/runs/{name}/reports/{report}"
        for path, answer in (
            ("/v1/runs", self.list), (run, self.state), (f"{stage}/curves", self.curves),
            (f"{stage}/previews/{{step}}", self.preview), (f"{stage}/sheet", self.sheet),
            (report, self.report), (f"{report}/page", self.page),
        ):  # fmt: skip
            routes.add_api_route(path, answer, methods=["GET"], response_model=None)
        return routes

    async def list(self) -> Response:
        """The runs, those that changed last first."""
        return JSONResponse(await run_in_threadpool(self._list, self._runs()))

    def _list(self, runs: Runs) -> dict[str, Any]:
        found = sorted(runs.all(), key=RunFolder.written, reverse=True)
        return {"total": len(found), "runs": [run.described() for run in found[:SHOWN]]}

    async def state(self, name: str) -> Response:
        """The state of a run, its stages and its reports."""

        def found(run: RunFolder) -> dict[str, Any]:
            return {**run.described(), "reports": [one.described() for one in reports(run)]}

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
