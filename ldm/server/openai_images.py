"""OpenAI's API for images on a service: `/v1/images/generations`, `edits`, `variations`, and `/v1/models`.

A request becomes a job as one of `/v1/jobs` does: settings that OpenAI's API does not have are those of that table.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from PIL import Image

from ldm.errors import LdmError
from ldm.images import WHITE
from ldm.server.events import ALIVE, EventReader, EventStream, message
from ldm.server.forms import read_form, values_of
from ldm.server.guard import EDITS, VARIATIONS, error_body
from ldm.server.jobs import DONE, Event, ServerJob
from ldm.server.reading import read_json, uploaded
from ldm.server.receiving import Readers, until_over
from ldm.server.service import Service
from ldm.server.uploads import RequestUploads
from pipelines.finishing import Finishing
from pipelines.settings import is_whole

log = logging.getLogger(__name__)
FORMATS = ("png", "jpeg", "webp")
VARIATION_STRENGTH = 0.6  # how much a variation changes its image, if the request does not say
MOST_PARTIAL = 3  # partial images of a stream
ANY = ()  # values of a parameter that may be any text
IGNORED: dict[str, tuple[str, ...]] = {  # parameters without effect here, with the values that are harmless
    "quality": ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"),
    "style": ("vivid", "natural"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "complexity": ("low", "medium", "high"),
    "input_fidelity": ("low", "high"),
    "user": ANY,
    "safety_identifier": ANY,
}
ABSENT = {  # parameters of what there is not here
    "frame_count": "there are no animations here; leave it out",
    "frame_duration_ms": "there are no animations here; leave it out",
    "svg": "there are no vector graphics here; leave it out",
    "markup": "drawings on the image are not read; give a mask",
    "previews": "a stream has partial_images in their place",
}
TEXTS = ("model", "prompt", "response_format", "output_format", *IGNORED)  # parameters that are texts
USAGE = {  # nothing is counted in tokens here
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


class ParameterError(LdmError):
    """A parameter of OpenAI's API that is wrong, or a job of it that failed."""

    def __init__(self, text: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(text)
        self.param, self.status, self.code = param, status, code


async def wrong_parameter(_: Request, error: Exception) -> Response:
    """The answer to a request with a `ParameterError`."""
    assert isinstance(error, ParameterError)
    body = error_of(error)
    # OpenAI's clients ask again by themselves after an error of the server; a job that has failed would fail again
    return JSONResponse(body, error.status, {"x-should-retry": "false"} if error.status >= 500 else None)


def error_of(error: ParameterError) -> dict[str, Any]:
    """The JSON of a `ParameterError`."""
    body = error_body(str(error), "invalid_request_error" if error.status < 500 else "server_error")
    body["error"] |= {"param": error.param, "code": error.code}
    return body


@dataclass(frozen=True)
class ImageOutput:
    """How a request wants its images."""

    format: str = "png"
    quality: int = 100  # of JPEG and WebP
    stream: str = ""  # what the names of its events begin with, if it is a stream
    partial: int = 0  # partial images of a stream
    ignored: tuple[str, ...] = ()  # parameters without effect

    def data(self, finishing: Finishing, image: Image.Image, record: dict[str, Any] | None = None) -> str:
        """An image with its record, in base64."""
        data = finishing.encoded(image, record, self.format.upper(), max(self.quality, 1))
        return base64.b64encode(data).decode()


# --- parameters -------------------------------------------------------------------------------------------------------


def output_of(given: dict[str, Any], stream: str) -> ImageOutput:
    """How a request wants its images: takes these parameters out of what is given.

    `stream` is what the names of events begin with, "" if there are no streams.

    Raises:
        ParameterError: one is wrong.
    """
    for name, remedy in ABSENT.items():
        if given.get(name) is not None:
            raise ParameterError(f"{name}: {remedy}", name)
    kind = _one_of(given, "output_format", FORMATS, "png")
    if _one_of(given, "response_format", ("b64_json", "url"), "b64_json") == "url":
        raise ParameterError(
            "response_format 'url': images are not kept at addresses here; take 'b64_json', or leave it out",
            "response_format",
        )
    quality = _whole(given, "output_compression", 100, 100)
    if quality != 100 and kind == "png":
        raise ParameterError(
            "output_compression: a PNG has no such choice; give output_format 'jpeg' or 'webp' with it",
            "output_compression",
        )
    streams, partial = given.pop("stream", None) or False, _whole(given, "partial_images", 0, MOST_PARTIAL)
    if not isinstance(streams, bool):
        raise ParameterError("stream: true or false is needed", "stream")
    if streams and not stream:
        raise ParameterError("stream: this address has none; leave it out", "stream")
    if partial and not streams:
        raise ParameterError("partial_images: they need stream true", "partial_images")
    if streams and given.get("n") not in (None, 1):
        raise ParameterError("n: a stream is of one image, because its events do not say of which they are", "n")
    return ImageOutput(kind, quality, stream if streams else "", partial, _ignored(given))


def _ignored(given: dict[str, Any]) -> tuple[str, ...]:
    """Take out the parameters without effect here; their names."""
    found = []
    for name, harmless in IGNORED.items():
        value = given.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, str) or (harmless and value not in harmless):
            wanted = f"{', '.join(harmless[:-1])} or {harmless[-1]}" if harmless else "a text"
            raise ParameterError(
                f"{name} {str(value)[:100]!r} is not possible here; {wanted} is (without effect)", name
            )
        found.append(name)
    return tuple(found)


def _one_of(given: dict[str, Any], name: str, allowed: tuple[str, ...], usual: str) -> str:
    value = given.pop(name, None)
    if value is None:
        return usual
    if value not in allowed:
        raise ParameterError(f"{name} {str(value)[:100]!r}: {' or '.join(allowed)} is needed", name)
    return str(value)


def _whole(given: dict[str, Any], name: str, usual: int, most: int) -> int:
    value = given.pop(name, None)
    if value is None:
        return usual
    if not is_whole(value) or not 0 <= value <= most:
        raise ParameterError(f"{name} {str(value)[:100]!r}: a whole number from 0 to {most} is needed", name)
    return int(value)


def plain_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job in what is left of a request: those that are null, or a size that is "auto", are not given.

    Raises:
        ParameterError: the prompt is not a single text.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if found.get("size") == "auto":
        del found["size"]
    if not isinstance(found.get("prompt"), str):
        raise ParameterError("prompt: a text is needed; several prompts are for POST /v1/jobs", "prompt")
    return found


def read_files(files: list[tuple[str, bytes]]) -> dict[str, str]:
    """The files of a form, `image` and `mask`, in base64, as jobs have them.

    Raises:
        ParameterError: there is another one, or there are several images.
    """
    found: dict[str, str] = {}
    for called, data in files:
        name = called.removesuffix("[]")
        if name == "image" and name in found:
            raise ParameterError("image: one image is needed; models here change one", "image")
        if name not in ("image", "mask") or name in found:
            raise ParameterError(f"{called[:100]}: the files of this form are one image and one mask", called[:100])
        found[name] = base64.b64encode(data).decode()
    return found


def images_of(files: Mapping[str, str], share: RequestUploads, edits: bool) -> dict[str, Any]:
    """The `image` of a job, and its `mask`, white where transparent parts of the form's `mask` or else `image` are.

    With `edits` the model changes images as a whole, and an image's transparent parts are no mask.

    Raises:
        LdmError: as `uploaded`; or nothing in the mask is transparent.
    """
    given = "mask" if "mask" in files else "image"
    if given == "image" and edits:
        return {"image": files["image"]}
    image = uploaded(files[given], given, share)
    alpha = np.asarray(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else np.full((1, 1), 255)
    if (alpha > 255 - WHITE).all():
        if given == "image":
            return {"image": image}
        raise ParameterError("mask: nothing in it is transparent; what is transparent in it is made anew", "mask")
    return {"image": image if given == "image" else files["image"], "mask": Image.fromarray(255 - alpha)}


# --- routes -----------------------------------------------------------------------------------------------------------


class ImagesApi:
    """The routes of OpenAI's API."""

    def __init__(self, service: Service, readers: Readers) -> None:
        self.service, self.readers = service, readers
        self.model = {
            "id": str(service.about["model"]), "object": "model", "created": int(time.time()), "owned_by": "ldm",
        }  # fmt: skip

    def routes(self) -> APIRouter:
        """All routes of images and models."""
        routes = APIRouter()
        for path, answer in (("/v1/images/generations", self.generate), (EDITS, self.edit), (VARIATIONS, self.vary)):
            routes.add_api_route(path, answer, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        routes.add_api_route("/v1/models/{name:path}", self.one_model, methods=["GET"], response_model=None)
        return routes

    async def models(self) -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [self.model]})

    async def one_model(self, name: str) -> Response:
        """The model of that name."""
        self._check_model(name)
        return JSONResponse(self.model)

    async def generate(self, request: Request) -> Response:
        """Images of a prompt."""

        def read(body: bytes) -> tuple[dict[str, Any], ImageOutput]:
            given = read_json(body)
            self._check_model(given.pop("model", None))
            output = output_of(given, "image_generation")
            return plain_settings(given), output

        return await self._answer(request, read)

    async def edit(self, request: Request) -> Response:
        """Images of a prompt and an image: where a mask or the image is transparent, or as a whole."""
        return await self._answer(request, lambda body: self._read_form(request, body, "image_edit"))

    async def vary(self, request: Request) -> Response:
        """Images like an image."""
        return await self._answer(request, lambda body: self._read_form(request, body, ""))

    def _read_form(self, request: Request, body: bytes, stream: str) -> tuple[dict[str, Any], ImageOutput]:
        """Settings and output of a form; one without streams is of variations."""
        form = read_form(body, request.headers.get("content-type", ""))
        given, files = values_of(form, TEXTS), read_files(form.files)
        self._check_model(given.pop("model", None))
        output = output_of(given, stream)
        if "image" not in files or (not stream and "mask" in files):
            raise ParameterError("image: one file of that name is needed", "image")
        if not stream:
            given = {"prompt": "", "strength": VARIATION_STRENGTH} | given
        both = given.keys() & {"image", "mask"}
        if both:
            raise ParameterError(f"{min(both)}: a file is needed, not a text", min(both))
        settings = plain_settings(given)
        if stream:
            edits = self.service.engine.pipeline.model.family.task == "edit"
            with self.service.uploading() as share:
                return settings | images_of(files, share, edits), output
        return settings | files, output

    def _check_model(self, name: Any) -> None:
        if name not in (None, "", self.model["id"]):
            raise ParameterError(
                f"the model {str(name)[:100]!r} does not exist here; the model is {self.model['id']!r}",
                "model", 404, "model_not_found",
            )  # fmt: skip

    async def _answer(self, request: Request, read: Callable[[bytes], tuple[dict[str, Any], ImageOutput]]) -> Response:
        """The answer to a request, of whose body `read` gives settings and output."""
        reader = EventReader(asyncio.get_running_loop())
        self.service.engine.check_open()  # before anything is read

        def accept(body: bytes) -> tuple[ServerJob, ImageOutput]:
            settings, output = read(body)
            if output.partial:
                settings |= {"previews": True}
            return self.service.accept(settings, reader), output

        job, output = await self.readers.read(request, accept)
        if output.ignored:
            log.info("job %s: without effect: %s", job.id, ", ".join(output.ignored))
        headers = {"x-ignored": ", ".join(output.ignored)} if output.ignored else {}
        if output.stream:
            stream = EventStream(job, reader, self._messages(job, reader, output), own=True)
            stream.headers.update(headers)
            return stream
        job.listeners.remove(reader)
        try:
            await until_over(job, request)
            found = await run_in_threadpool(self._response, job, output)
        finally:
            self.service.forget(job)  # the client does not know its name
        return JSONResponse(found, headers=headers)

    def _response(self, job: ServerJob, output: ImageOutput) -> dict[str, Any]:
        """The JSON of a job's images."""
        _check_done(job)
        return {
            "created": int(time.time()),
            **_about(job, output),
            "data": [
                {"b64_json": self._data(job, number, output), "seed": job.request.seeds[number]}
                for number in range(len(job.made))
            ],
            "usage": USAGE,
            "notes": notes_of(job, output),
        }

    def _data(self, job: ServerJob, number: int, output: ImageOutput) -> str:
        made = self.service.finished(job, number)
        assert made is not None
        return output.data(self.service.finishing, *made)

    def _partial(self, job: ServerJob, event: Event, output: ImageOutput) -> str:
        """A partial image: the preview of a step, enlarged to the image's size."""
        size, finishing = (job.request.width, job.request.height), self.service.finishing
        return output.data(finishing, finishing.marked(event.previews[0].resize(size, Image.Resampling.BICUBIC)))

    async def _messages(self, job: ServerJob, reader: EventReader, output: ImageOutput) -> AsyncIterator[str]:
        """The events of a stream."""
        sent = 0
        about = {**_about(job, output), "quality": "auto", "created_at": int(time.time())}
        while not job.over.is_set():
            event = await reader.next()
            if event is None:
                yield ALIVE
            elif event.previews and sent < output.partial and _is_due(event, sent, output.partial):
                name = f"{output.stream}.partial_image"
                data = await run_in_threadpool(self._partial, job, event, output)
                yield message(name, {"type": name, "b64_json": data, "partial_image_index": sent, **about})
                sent += 1
        try:
            _check_done(job)
        except ParameterError as error:
            yield message("error", error_of(error))
        else:
            name = f"{output.stream}.completed"
            data = await run_in_threadpool(self._data, job, 0, output)
            more = {"usage": USAGE, "seed": job.request.seeds[0], "notes": notes_of(job, output)}
            yield message(name, {"type": name, "b64_json": data, **about, **more})
        self.service.forget(job)


def notes_of(job: ServerJob, output: ImageOutput) -> list[str]:
    """What is told about a job, with the parameters that had no effect."""
    ignored = [f"without effect here: {', '.join(output.ignored)}"] if output.ignored else []
    return [*ignored, *job.notes]


def _about(job: ServerJob, output: ImageOutput) -> dict[str, Any]:
    """What OpenAI's answers and events say about an image."""
    image = next((made.image for made in job.made if made is not None), None)
    width, height = (job.request.width, job.request.height) if image is None else image.size
    return {"background": "opaque", "output_format": output.format, "size": f"{width}x{height}"}


def _is_due(event: Event, sent: int, count: int) -> bool:
    """Whether a step is the one of the next of `count` partial images, which are spread over the steps."""
    return event.step * (count + 1) >= event.steps * (sent + 1)


def _check_done(job: ServerJob) -> None:
    """Raise unless a job is done.

    Raises:
        ParameterError: it has failed or was cancelled.
    """
    if job.state != DONE:
        raise ParameterError(job.reason, status=job.status, code="job_failed")
