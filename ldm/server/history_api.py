"""The routes of a server's history, which exists only if it was asked for at start."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ldm.errors import LdmError
from ldm.server.history import History, HistoryError, HistoryImage
from ldm.server.info import Info, as_json
from ldm.server.service import Service


class HistoryApi:
    """The routes of a history."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> APIRouter:
        """All routes."""
        routes, image = APIRouter(), "/v1/history/{number}"
        routes.add_api_route("/v1/history", self.find, methods=["GET"], response_model=None)
        routes.add_api_route(f"{image}/image", self.image, methods=["GET"], response_model=None)
        routes.add_api_route(image, self.delete, methods=["DELETE"], response_model=None)
        return routes

    async def find(self, text: str = "", before: int | None = None, count: int = 24) -> Response:
        """The latest images, with all words of a text in their prompts or adapters, or as seed."""
        history = self._history()
        return as_json(await run_in_threadpool(self._found, history, text, before, count))

    def _found(self, history: History, text: str, before: int | None, count: int) -> dict[str, Any]:
        images, total = history.find(text[: self.service.limits.characters], before, count)
        info = Info(self.service)
        return {"total": total, "images": [_described(kept, info) for kept in images]}

    async def image(self, number: int) -> Response:
        """An image, with its record."""
        history = self._history()
        try:
            data = await run_in_threadpool(history.image, number)
        except HistoryError:
            raise
        except LdmError as error:
            raise HTTPException(410, str(error)) from None
        if data is None:
            raise HTTPException(404, f"image {number} is not in the history")
        return Response(data, media_type="image/png")

    async def delete(self, number: int) -> Response:
        """Delete an image and its file."""
        history = self._history()
        if not await run_in_threadpool(history.delete, number):
            raise HTTPException(404, f"image {number} is not in the history")
        return Response(status_code=204)

    def _history(self) -> History:
        if self.service.history is None:
            raise HTTPException(404, "this server keeps no history; start it with --history FOLDER")
        return self.service.history


def _described(kept: HistoryImage, info: Info) -> dict[str, Any]:
    """An image of the history as JSON."""
    try:
        found = info.of_record(kept.record)
    except LdmError as error:
        found = {"settings": {}, "notes": [str(error)], "model": ""}
    return {"id": kept.id, "made": kept.made, "url": f"/v1/history/{kept.id}/image", **found}
