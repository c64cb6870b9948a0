"""AUTOMATIC1111's API on a service: `/sdapi/v1/txt2img`, `img2img`, `progress`, `interrupt`, and lists.

A request becomes a job as one of `/v1/jobs` does. Progress, previews and interruption are those of the client's own
requests, never those of others.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ldm.errors import LdmError
from ldm.images import png_bytes, read_texts
from ldm.sampling.scheduler_names import A1111_NAMES, OTHER_NAMES, SAMPLERS, other_names
from ldm.server.a1111_fields import (
    LARGER,
    LATENT,
    SCRIPT,
    ImageRequest,
    check_option,
    image_request,
    options,
    title_of,
)  # fmt: skip
from ldm.server.guard import A1111
from ldm.server.info import Answering
from ldm.server.jobs import CANCELLED, DONE, Event, ServerJob
from ldm.server.reading import DECODING, FORMATS, image_text, uploaded_bytes
from ldm.server.receiving import RefusedError, until_over
from ldm.server.service import Service
from ldm.server.uploads import RequestUploads
from pipelines.a1111 import SPACING_NAMES, USUAL, fields_of, to_parameters

ROOT = f"{A1111}v1"
NONE_HERE = ("sd-vae", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "extensions")
TEXTS = 2**20  # characters in an image that are read
BYTES = 4  # of what is held, that count as a pixel
NOTHING_TO_DO = ("refresh-checkpoints", "refresh-vae", "refresh-loras")  # lists are always new


@dataclass(frozen=True)
class ApiClient:
    """Who asks: the address, and what the header Authorization says, with its user."""

    address: str
    credentials: str


def client_of(request: Request) -> ApiClient:
    """The client of a request."""
    return ApiClient(request.client.host if request.client else "", request.headers.get("authorization", ""))


@dataclass(eq=False)
class ApiTask:
    """A job of this API, from request to answer."""

    owner: ApiClient
    name: str  # that the client gave it
    job: ServerJob
    passes: int  # of each image
    interrupted: bool = False
    before: dict[int, tuple[int, int]] = field(default_factory=dict)  # first image -> passes done, last step

    def note(self, event: Event) -> None:
        """Note which pass a step is of."""
        if event.kind == "step":
            done, last = self.before.get(event.rows.start, (0, 0))
            self.before[event.rows.start] = (done + (event.step <= last), event.step)

    def progress(self) -> float:
        """The part of the work that is done, 0 to 1."""
        made = float(sum(one is not None for one in self.job.made))
        for event in self.steps():
            done, _ = self.before.get(event.rows.start, (0, 0))
            made += len(event.rows) * min((done + event.step / event.steps) / self.passes, 1)
        return made / len(self.job.made)

    def current(self) -> Event | None:
        """The last step of the first image that is worked on."""
        return min(self.steps(), key=lambda event: event.rows.start, default=None)

    def steps(self) -> list[Event]:
        """The last step of each image that is worked on."""
        return [event for event in list(self.job.latest.values()) if self.job.made[event.rows.start] is None]

    def interrupt(self) -> None:
        """Stop it, within a step."""
        self.interrupted = True
        self.job.cancel()


class WebuiApi:
    """The routes of AUTOMATIC1111's API."""

    def __init__(self, service: Service, answering: Answering) -> None:
        self.service, self.answering = service, answering
        self.tasks: list[ApiTask] = []  # that are not over, in the order of arrival

    def routes(self) -> APIRouter:
        """All routes."""
        routes = APIRouter()
        post: dict[str, Callable[..., Any]] = {
            "txt2img": self.from_text, "img2img": self.from_images, "png-info": self.png_info,
            "options": self.set_options, "interrupt": self.interrupt, "skip": self.skip,
            **dict.fromkeys(NOTHING_TO_DO, nothing),
        }  # fmt: skip
        get = {"progress": self.progress, **lists(self.service)}
        for method, answers in (("POST", post), ("GET", get)):
            for name, answer in answers.items():
                routes.add_api_route(f"{ROOT}/{name}", answer, methods=[method], response_model=None)
        for name, found in (
            ("model_list", {"model_list": self.service.control_models}), ("module_list", {"module_list": ["none"]}),
            ("version", {"version": 2}),
        ):  # fmt: skip
            routes.add_api_route(f"/controlnet/{name}", _answering(found), methods=["GET"], response_model=None)
        routes.add_api_route(
            A1111 + "{name:path}", absent, methods=["GET", "POST"], response_model=None, include_in_schema=False
        )
        return routes

    # --- images -------------------------------------------------------------------------------------------------------

    async def from_text(self, request: Request) -> Response:
        """Images of a prompt."""
        return await self._made(request, images=False)

    async def from_images(self, request: Request) -> Response:
        """Images of a prompt and an image."""
        return await self._made(request, images=True)

    async def _made(self, request: Request, images: bool) -> Response:
        self.service.engine.check_open()
        owner = client_of(request)
        with self.service.uploading() as share:
            echo, asked, task = await self.answering(request, lambda given: self._begun(owner, given, images, share))
            self.tasks.append(task)
            try:
                await until_over(task.job, request)
                return await run_in_threadpool(self._answer, echo, asked, task)
            finally:
                self.tasks.remove(task)
                self.service.forget(task.job)  # the client does not know its name

    def _begun(
        self, owner: ApiClient, given: dict[str, Any], images: bool, share: RequestUploads
    ) -> tuple[dict[str, Any], ImageRequest, ApiTask]:
        """What the answer to a request repeats of it, the request without its images, and its task, which has begun.

        The share goes on counting what is held until the answer, beside the images of the job: those of a masked part.

        Raises:
            LdmError, NotTakenError: as `image_request`.
            RefusedError: the client has a task of that name already.
        """
        try:
            asked = image_request(given, self.service, share, images)
            if asked.inpainting is None:
                share.give_back()
            echo = echo_of(given, share)
        except RecursionError:
            raise LdmError("the request is nested too deeply") from None
        if asked.task and self._task(owner, asked.task):
            raise RefusedError(409, f"force_task_id {asked.task!r}: a request has this name; choose another")
        job = self.service.accept({**asked.settings, "previews": True})
        task = ApiTask(owner, asked.task, job, 1 + bool(job.request.hires) + job.request.refined)
        job.listeners.append(task.note)
        kept = {name: value for name, value in asked.settings.items() if name not in ("image", "mask", "control")}
        return echo, replace(asked, settings=kept), task

    def _answer(self, echo: dict[str, Any], asked: ImageRequest, task: ApiTask) -> Response:
        """The finished images, with their settings; of an interrupted task those that were finished before."""
        job = task.job
        if job.state != DONE and not (job.state == CANCELLED and task.interrupted):
            raise RefusedError(job.status, job.reason)
        made = [found for number in range(len(job.made)) if (found := self.service.finished(job, number))]
        images = []
        for image, record in made if asked.send else ():
            if asked.inpainting:
                image = self.service.finishing.marked(asked.inpainting.finished(image))
            images.append(base64.b64encode(self.service.finishing.encoded(image, record)).decode())
        about = described(task, asked, [record for _, record in made])
        return JSONResponse({"images": images, "parameters": echo, "info": json.dumps(about)})

    # --- what runs ----------------------------------------------------------------------------------------------------

    def _task(self, owner: ApiClient, name: str = "") -> ApiTask | None:
        """The first task of that name and with the same credentials; without a name, of the same client."""
        for task in tuple(self.tasks):
            if task.job.over.is_set():
                continue
            if task.owner == owner if not name else (task.name == name and task.owner.credentials == owner.credentials):
                return task
        return None

    def _asked_about(self, request: Request) -> ApiTask | None:
        """The task that a request asks about: the one that it names, or the client's first."""
        return self._task(client_of(request), request.query_params.get("id_task", ""))

    async def progress(self, request: Request) -> Response:
        """How far the client's first task is, with a preview of its image."""
        task = self._asked_about(request)
        found: dict[str, Any] = {"progress": 0.0, "eta_relative": 0.0, "current_image": None, "textinfo": None}
        if task is None:
            return JSONResponse(found | {"state": state_of(None)})
        event, (_, ran), part = task.current(), task.job.seconds, task.progress()
        found |= {"progress": part, "eta_relative": ran * (1 - part) / part if part else 0.0, "state": state_of(task)}
        hidden = request.query_params.get("skip_current_image", "").lower() in ("true", "1")
        if event and event.previews and not hidden:
            data = await run_in_threadpool(png_bytes, event.previews[0])
            found["current_image"] = base64.b64encode(data).decode()
        return JSONResponse(found)

    async def interrupt(self, request: Request) -> Response:
        """Stop the client's first task; its answer has the images that are finished."""
        task = self._asked_about(request)
        if task:
            task.interrupt()
        return JSONResponse({})

    async def skip(self, request: Request) -> Response:
        """Stop the client's first task, if it is of one image: those of a task are made together."""
        task = self._asked_about(request)
        if task and len(task.job.made) > 1:
            raise RefusedError(400, "skip: the images of a request are made together; interrupt stops all of them")
        if task:
            task.interrupt()
        return JSONResponse(None)

    # --- more ---------------------------------------------------------------------------------------------------------

    async def set_options(self, request: Request) -> Response:
        """Take options that have the values that they have here; others are refused."""

        def check(given: dict[str, Any]) -> None:
            for name, value in given.items():
                check_option(name, value, self.service)

        await self.answering(request, check)
        return JSONResponse(None)

    async def png_info(self, request: Request) -> Response:
        """The texts in an image, and the settings in that of AUTOMATIC1111."""
        return JSONResponse(await self.answering(request, self._png_info))

    def _png_info(self, given: dict[str, Any]) -> dict[str, Any]:
        with self.service.uploading() as share:
            data = uploaded_bytes(image_text(given, "image"), "image", share)
            with DECODING:
                items = read_texts(io.BytesIO(data), "image", FORMATS)
        if (count := sum(map(len, items.values()))) > TEXTS:
            raise LdmError(f"image: its texts have {count:,} characters; this server reads at most {TEXTS:,}")
        info = items.pop("parameters", "")
        return {"info": info, "items": items, "parameters": fields_of(info) if info else {}}


def echo_of(given: dict[str, Any], share: RequestUploads) -> dict[str, Any]:
    """A request as its answer repeats it: without long texts, such as images; with `include_init_images`, with these.

    What is repeated is held until then, so images are counted in a share.

    Raises:
        LdmError, NotTakenError: as `RequestUploads.take`.
    """
    most = share.limits.characters
    found = {name: _short(value, most) for name, value in given.items()}
    for name in ("init_images", "mask"):
        images = given.get(name) if given.get("include_init_images") else None
        if images:
            share.take(name, len("".join(images)) // BYTES)
        if name in given:
            found[name] = images
    return found


def _short(value: Any, most: int) -> Any:
    """A value of JSON without its texts and names that have more than `most` characters."""
    if isinstance(value, str):
        return value if len(value) <= most else None
    if isinstance(value, list):
        return [_short(one, most) for one in value]
    if isinstance(value, dict):
        return {name: _short(one, most) for name, one in value.items() if len(name) <= most}
    return value


def state_of(task: ApiTask | None) -> dict[str, Any]:
    """The state of a task, in the words of AUTOMATIC1111's API."""
    event = task.current() if task else None
    made = task.job.made if task else []
    return {
        "skipped": False, "interrupted": bool(task and task.interrupted), "stopping_generation": False,
        "job": task.name if task else "", "job_count": len(made), "job_no": sum(one is not None for one in made),
        "job_timestamp": "0", "sampling_step": event.step if event else 0,
        "sampling_steps": event.steps if event else 0,
    }  # fmt: skip


def described(task: ApiTask, asked: ImageRequest, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the answer says about its images, by their records."""
    request, first = task.job.request, records[0] if records else {}
    texts = [to_parameters(record) for record in records]
    scheduler = first.get("scheduler", "")
    return {
        "prompt": request.prompts[0], "all_prompts": [record["prompt"] for record in records],
        "negative_prompt": request.negative[0] or "",
        "all_negative_prompts": [record["negative"] or "" for record in records],
        "seed": request.seeds[0], "all_seeds": [record["seed"] for record in records], "subseed": request.seeds[0],
        "all_subseeds": [record["seed"] for record in records], "subseed_strength": 0, "width": request.width,
        "height": request.height, "sampler_name": A1111_NAMES.get(scheduler, scheduler),
        "cfg_scale": request.guidance.scale, "steps": request.steps, "batch_size": asked.per_batch,
        "restore_faces": False, "face_restoration_model": None, "sd_model_name": first.get("model"),
        "sd_model_hash": first.get("model_hash"), "sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": 0,
        "seed_resize_from_h": 0, "denoising_strength": asked.settings.get("strength"), "extra_generation_params": {},
        "index_of_first_image": 0, "infotexts": texts, "styles": [], "clip_skip": request.clip_skip + 1,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"), "is_using_inpainting_conditioning": False,
        "version": first.get("version"), "interrupted": task.interrupted, "notes": list(task.job.notes),
    }  # fmt: skip


# --- lists of what there is -------------------------------------------------------------------------------------------


async def nothing() -> Response:
    """The answer where there is nothing to do."""
    return JSONResponse(None)


async def absent(name: str) -> Response:
    """The answer at paths of the API that do not exist here."""
    raise RefusedError(404, f"{A1111}{name[:100]} does not exist here")


def _answering(found: Any) -> Callable[[], Any]:
    async def answer() -> Response:
        return JSONResponse(found() if callable(found) else found)

    return answer


def lists(service: Service) -> dict[str, Callable[..., Any]]:
    """The answers of addresses that list what there is."""
    about, pipeline = service.about, service.engine.pipeline

    def adapters() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": "", "metadata": {}} for name in service.adapters()]

    async def loras() -> Response:
        return JSONResponse(await run_in_threadpool(adapters))

    embeddings = {
        name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": vectors.shape[-1],
               "vectors": vectors.shape[0]}
        for one in pipeline.embeddings
        for name in one.names
        for vectors in list(one.vectors.values())[:1]
    }  # fmt: skip
    script = [SCRIPT] if service.control_models else []
    model = {"title": title_of(service), "model_name": about["model"], "hash": about["model_hash"], "sha256": None,
             "filename": about["model"], "config": None}  # fmt: skip
    found: dict[str, Any] = {
        "samplers": samplers(), "schedulers": schedulers(), "sd-models": [model],
        "upscalers": [dict.fromkeys(("model_name", "model_path", "model_url")) | {"name": name, "scale": 4} for name in
                      LARGER],
        "latent-upscale-modes": [{"name": name} for name in LATENT],
        "embeddings": {"loaded": embeddings, "skipped": {}}, "options": options(service),
        "scripts": {"txt2img": script, "img2img": script}, "script-info": [],
        "cmd-flags": {"api": True, "nowebui": True},
        "memory": lambda: memory(pipeline.model.device), **{name: [] for name in NONE_HERE},
    }  # fmt: skip
    return {"loras": loras, **{name: _answering(value) for name, value in found.items()}}


def samplers() -> list[dict[str, Any]]:
    """The samplers, by AUTOMATIC1111's names; by ours, where it has none."""
    named = SAMPLERS | {ours: ours for ours in OTHER_NAMES if ours not in A1111_NAMES}
    return [
        {"name": name, "aliases": [ours, *(other for other in other_names(ours) if other != name)], "options": {}}
        for name, ours in named.items()
    ]


def schedulers() -> list[dict[str, Any]]:
    """The schedule types."""
    names = {label.lower().replace(" ", "_"): label for label in (*USUAL[1:], *SPACING_NAMES)}
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in names.items()
    ]


def memory(device: torch.device) -> dict[str, Any]:
    """The memory of the machine and of its GPU, in bytes."""
    page, total, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    ram = {"free": page * free, "used": page * (total - free), "total": page * total}
    if device.type != "cuda":
        return {"ram": ram, "cuda": {"error": "the model is not on a CUDA GPU"}}
    left, whole = torch.cuda.mem_get_info(device)
    return {"ram": ram, "cuda": {"system": {"free": left, "used": whole - left, "total": whole}}}
