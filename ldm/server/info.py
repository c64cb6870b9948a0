"""What a page needs beside jobs: what the server has, settings read back from an image, and condition images.

An image's settings come from its record, ours or the text of AUTOMATIC1111's programs, as a job would name them; what
cannot be used here is said in notes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import cached_property
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import ldm
from ldm.conditions.table import KINDS, condition
from ldm.errors import LdmError
from ldm.images import flattened, png_bytes, read_settings
from ldm.server.reading import DECODING, FORMATS, check_control, image_text, uploaded, uploaded_bytes
from ldm.server.service import Service, noted
from pipelines.a1111 import from_parameters
from pipelines.mixes import wanted
from pipelines.provenance import settings_of
from pipelines.request import defaults
from pipelines.settings import at, expanded

Answering = Callable[[Request, Callable[[dict[str, Any]], Any]], Awaitable[Any]]  # reads a request, and calls with it
ABSENT = {
    "image": "the image that it was made from",
    "mask": "the mask",
    "control": "the condition image",
    "image_prompt": "the image prompt",
}  # what a record does not hold


class Info:
    """The answer to one request about a service, or about images that are sent to it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @cached_property
    def adapters(self) -> set[str]:
        """The names by which a record may have an adapter that is here."""
        return {name for place in self.service.adapters() for name in (place, PurePath(place).name)}

    def about(self) -> dict[str, Any]:
        """The model by name, its defaults, and which images it can be steered by."""
        pipeline, model = self.service.engine.pipeline, self.service.engine.pipeline.model
        trainer = self.service.trainer
        usual = defaults(model.family, None, False, (), None)
        return {
            "version": ldm.__version__,
            "model": self.service.about["model"],
            "family": model.family.name,
            "task": model.family.task,
            "multiple": model.family.autoencoder.factor,  # of which sides are
            "defaults": {name: usual[name] for name in ("width", "height", "steps", "guidance")},
            "control": [name for name, kind in KINDS.items() if not kind.model] if pipeline.control_models else [],
            "image_prompts": bool(pipeline.image_prompts.files),
            "refiner": pipeline.refiner is not None,
            "history": self.service.history is not None,
            "runs": self.service.runs is not None,
            "trains": trainer is not None,
            "keeps": trainer is not None and trainer.adapters is not None,
        }

    def read_back(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an uploaded image (`image`, in base64), and notes on what is not used of its record.

        Raises:
            LdmError: it is no image that can be read, or does not say how it was made.
            NotTakenError: as `RequestUploads.take`.
        """
        with self.service.uploading() as share:
            data = uploaded_bytes(image_text(given, "image"), "the image", share)
            with DECODING:
                record, parameters = read_settings(io.BytesIO(data), "the image", FORMATS)
        if record is None and not parameters:
            raise LdmError("the image does not say how it was made")
        with noted() as notes:
            settings = from_parameters(parameters) if record is None else settings_of(record)
        found = self.of_record(record or {}, settings)
        return {**found, "notes": notes + found["notes"]}

    def of_record(self, record: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings of a record as a job names them, and notes on what is not used of it.

        Raises:
            LdmError: the record is damaged.
        """
        notes: list[str] = []
        found: dict[str, Any] = {}
        rows = at("http")
        given = expanded(settings_of(dict(record)) if settings is None else settings)
        for name, value in given.items():
            if name in ABSENT or value is None:
                continue
            try:
                if name == "adapters":
                    found |= self._adapters(value, notes)
                elif name in rows:
                    rows[name].check(value)
                    found[name] = value
                elif name.startswith("guidance."):
                    raise LdmError(f"{name}, which this version of ldm does not know")
            except LdmError as error:
                notes.append(f"left out: {error}")
        notes += self._unused({**record, **given})
        return {"settings": found, "notes": notes, "model": str(record.get("model", ""))}

    def _adapters(self, value: Any, notes: list[str]) -> dict[str, Any]:
        """The setting `adapters`, without those that are not here."""
        (mix,) = wanted(at("http")["adapters"].check(value), 1)
        notes += [f"left out: the adapter {one.name!r} is not here" for one in mix if one.name not in self.adapters]
        weights = {
            one.name: one.unet if one.unet == one.text else {"unet": one.unet, "text": one.text}
            for one in mix
            if one.name in self.adapters
        }
        return {"adapters": weights} if weights else {}

    def _unused(self, record: Mapping[str, Any]) -> Iterator[str]:
        """Notes on what a record tells that is no setting of a job here."""
        yield from (f"left out: {what} is not in the file" for name, what in ABSENT.items() if record.get(name))
        if record.get("task") in ("image-to-image", "inpaint") and not record.get("image"):
            yield f"left out: {ABSENT['image']} is not in the file"
        own, stated = self.service.about["model_hash"], record.get("model_hash")
        if stated and stated != own:
            yield f"made with another model: {record.get('model', stated)}"
        here = {name for one in self.service.engine.pipeline.embeddings for name in one.names}
        embeddings = record.get("embeddings")
        named = (
            [one.get("name") for one in embeddings if isinstance(one, Mapping)] if isinstance(embeddings, list) else ()
        )
        yield from (f"made with the embedding {name!r}, which is not here" for name in named if str(name) not in here)

    def condition(self, given: Mapping[str, Any]) -> bytes:
        """The condition image of an uploaded one (`image`), of a `kind`, as PNG.

        Raises:
            LdmError: as `uploaded`; or the kind is not known, or is made by a network.
            NotTakenError: as `RequestUploads.take`.
        """
        kind, text = str(given.get("kind")), image_text(given, "image")
        check_control(kind, text)
        with self.service.uploading() as share:
            image = uploaded(text, f"control {kind}", share)
            with DECODING:
                return png_bytes(condition(kind, flattened(image, "white").convert("RGB")))


def as_json(found: dict[str, Any]) -> Response:
    """An answer with texts of images, which may hold halves of characters."""
    return Response(json.dumps(found), media_type="application/json")


def info_routes(service: Service, answering: Answering) -> APIRouter:
    """The routes; `answering` reads the body of a request."""

    async def about() -> Response:
        """What the server has."""
        return JSONResponse(Info(service).about())

    async def read_back(request: Request) -> Response:
        """The settings of an uploaded image."""
        return as_json(await answering(request, Info(service).read_back))

    async def conditions(request: Request) -> Response:
        """The condition image of an uploaded image."""
        return Response(await answering(request, Info(service).condition), media_type="image/png")

    async def settings(name: str, number: int) -> Response:
        """The settings of a finished image."""
        job = service.job(name)
        record = None if job is None else service.record(job, number)
        if record is None:
            raise HTTPException(404, f"image {number} is not there, or not yet")
        return as_json(await run_in_threadpool(Info(service).of_record, record))

    routes = APIRouter()
    for path, answer, method in (
        ("/v1/about", about, "GET"), ("/v1/info", read_back, "POST"), ("/v1/conditions", conditions, "POST"),
        ("/v1/jobs/{name}/images/{number}/settings", settings, "GET"),
    ):  # fmt: skip
        routes.add_api_route(path, answer, methods=[method], response_model=None)
    return routes
