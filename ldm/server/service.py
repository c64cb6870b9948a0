"""A service: an engine with the limits of its requests, the records of its images, and the jobs that it knows."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import LdmError, check_whole
from ldm.models.prompts import PromptReader, count_chunks
from ldm.server.engine import Engine, JobTaker
from ldm.server.history import History
from ldm.server.jobs import DONE, NOTES, Event, Listener, MadeImage, ServerJob
from ldm.server.limits import Limits, check_most
from ldm.server.reading import settings_of
from ldm.server.runs import Runs
from ldm.server.trainings import Trainer
from ldm.server.uploads import RequestUploads, Uploads
from ldm.weights.builtin import adapters_of
from pipelines import Pipeline
from pipelines.adapters import files_in
from pipelines.passes import largest_request
from pipelines.provenance import provenance
from pipelines.request import Request
from pipelines.settings import at

log = logging.getLogger(__name__)
OPTIONS = ("priority", "seconds", "previews", "keep")  # of a job, beside its settings
PRIORITIES = (-9, 9)
Watcher = Callable[[ServerJob, Event], None]
PLACES = (
    "source",
    "refiner",
    "components",
    "control_models",
    "lora_dir",
    "safety_model",
)  # what records of served images leave out


class Service:
    """Makes jobs of requests. All methods may be called from any thread."""

    def __init__(
        self,
        pipeline: Pipeline,
        loading: Mapping[str, Any],
        limits: Limits,
        most: int | None = None,
        history: History | None = None,
        runs: Runs | None = None,
        trainer: Trainer | None = None,
        engine: JobTaker | None = None,
    ) -> None:
        """Start an engine for a pipeline; `loading` are the settings that the pipeline was loaded with, for records.

        `most` is as for `Engine`; `history` has the images of jobs that ask for it; `runs` are shown, and `trainer`
        makes new ones; `engine` makes the images in place of one that is started here.
        """
        self.limits, self.history, self.runs, self.trainer = limits, history, runs, trainer
        self.engine = engine or Engine(pipeline, most=most, queue=limits.queue)
        self.finishing = pipeline.finishing
        own = provenance(loading, pipeline)
        self.about = without_places(own)
        self.refiner = Path(own.get("refiner", "")).stem  # its name; "" for none
        self.control_models = [Path(one).stem for one in own.get("control_models", ())]  # their names, in order
        self.builtin = adapters_of(own["source"])  # names of adapters
        self.jobs: dict[str, ServerJob] = {}
        self.uploads = Uploads()
        folder = pipeline.adapters.folder
        self.folder = None if folder is None else folder.absolute()  # of the adapters
        self.watchers: list[Watcher] = []  # of all jobs
        self._changing = threading.Lock()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def accept(self, given: Mapping[str, Any], listener: Listener | None = None) -> ServerJob:
        """The job of a request: settings by name and options of the job.

        Raises:
            LdmError: a setting is not allowed or above a limit.
            NotTakenError: too many images wait, or the engine is closing.
        """
        self.engine.check_open()
        share = RequestUploads(self.uploads, self.limits)
        try:
            job = self._job_of(given, share)
            job.listeners += [] if listener is None else [listener]
            self.engine.submit(job)
        except BaseException:
            share.give_back()
            raise
        with self._changing:
            self._forget()
            self.jobs[job.id] = job
        return job

    @contextmanager
    def uploading(self) -> Iterator[RequestUploads]:
        """A share that counts the images which are read within the context."""
        share = RequestUploads(self.uploads, self.limits)
        try:
            yield share
        finally:
            share.give_back()

    def _job_of(self, given: Mapping[str, Any], share: RequestUploads) -> ServerJob:
        """The job of a request, whose listeners are the service's own."""
        with noted() as notes:
            try:
                options = self._checked({name: given[name] for name in OPTIONS if given.get(name) is not None})
                request = self.request({name: value for name, value in given.items() if name not in OPTIONS}, share)
            except RecursionError:
                raise LdmError("the request is nested too deeply") from None
        keep = options.pop("keep")
        job = ServerJob(request, notes=[self._without_folder(note) for note in notes], **options)
        job.listeners += [partial(release, job, share), *(partial(watcher, job) for watcher in self.watchers)]
        job.listeners += [partial(self._keep, job)] if keep else []
        return job

    def request(self, given: Mapping[str, Any], share: RequestUploads) -> Request:
        """The checked request for settings, whose images are counted in a share.

        Raises:
            LdmError: a setting is not allowed or above a limit.
            NotTakenError: as `RequestUploads.take`.
        """
        values = settings_of(given, share)
        if "prompt" not in values:
            raise LdmError("no prompt: at least one text is needed")
        try:
            request = self.engine.request(values.pop("prompt"), **values)
        except LdmError as error:
            raise LdmError(self._without_folder(str(error))) from None
        largest = largest_request(request, self.engine.pipeline.model.family)
        pixels = largest.width * largest.height
        check_most(
            ("images", len(request.prompts), self.limits.images),
            ("pixels", pixels, self.limits.pixels),
            ("pixels in a batch", pixels * min(request.batch or 1, len(request.prompts)), self.limits.pixels),
            ("chunks of a prompt", self._chunks(request), self.limits.chunks),
        )
        return request

    def _chunks(self, request: Request) -> int:
        """The number of chunks of the longest text of a request."""
        encoders = self.engine.pipeline.model.text_encoders
        both = [texts for texts in request.texts(len(encoders.configs)) if texts[0]]
        counts = [count_chunks(encoders, texts, request.reader) for texts in both] if request.chunks else []
        return max((count for row in counts for count in row), default=1)

    def job(self, name: str) -> ServerJob | None:
        """The job of that name; None if there is none any more."""
        with self._changing:
            self._forget()
            return self.jobs.get(name)

    def forget(self, job: ServerJob) -> None:
        """Forget a job that nobody can ask for any more."""
        with self._changing:
            self.jobs.pop(job.id, None)

    def png(self, job: ServerJob, number: int) -> bytes | None:
        """A finished image of a job with its record, as PNG; None if it is not finished."""
        found = self.finished(job, number)
        return None if found is None else self.finishing.encoded(*found)

    def finished(self, job: ServerJob, number: int) -> tuple[Image.Image, dict[str, Any]] | None:
        """A finished image of a job, which counts as fetched, and its record; None if it is not finished."""
        made = job.made[number] if 0 <= number < len(job.made) else None
        if made is None:
            return None
        job.fetched.add(number)
        return made.image, self._record(made)

    def record(self, job: ServerJob, number: int) -> dict[str, Any] | None:
        """The record of a finished image of a job; None if it is not finished."""
        made = job.made[number] if 0 <= number < len(job.made) else None
        return None if made is None else self._record(made)

    def _record(self, made: MadeImage) -> dict[str, Any]:
        return without_paths({**made.record, **self.about}, self.folder)

    def _keep(self, job: ServerJob, event: Event) -> None:
        """Keep the finished images of an event in the history."""
        if event.kind == "images" and self.history is not None:
            for number in event.rows:
                made, note = job.made[number], f"image {number} could not be kept in the history; the log says why"
                if made is not None:
                    record, failed = self._record(made), partial(job.notes.append, note)
                    self.history.keep(partial(self.finishing.encoded, made.image, record), record, failed)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a job within their bounds."""
        check_whole("request", "priority", options.setdefault("priority", 0), *PRIORITIES)
        seconds = options.setdefault("seconds", self.limits.seconds)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= self.limits.seconds:
            raise LdmError(f"seconds {seconds!r}: a number above 0, at most {self.limits.seconds:g}, is needed")
        for name in ("previews", "keep"):
            if not isinstance(options.setdefault(name, False), bool):
                raise LdmError(f"{name} {options[name]!r}: true or false is needed")
        if options["keep"] and self.history is None:
            raise LdmError("keep: this server keeps no history (ldm serve --history); leave it out")
        return options

    def _forget(self) -> None:
        """Forget jobs that are over: those that ended long ago, and the first that ended if too many are kept."""
        now, kept = time.monotonic(), 0
        over = sorted(
            (job for job in self.jobs.values() if job.over.is_set()), key=lambda job: job.ended or now, reverse=True
        )
        for number, job in enumerate(over):
            kept += sum(one.image.width * one.image.height for one in job.made if one is not None)
            old = now - (job.ended or now) > self.limits.keep_seconds
            if old or kept > self.limits.kept or number >= self.limits.kept_jobs:
                del self.jobs[job.id]

    def _without_folder(self, text: str) -> str:
        """A message without the place of the folder of adapters."""
        place = str(self.folder)
        return text.replace(f"{place}{os.sep}", "").replace(place, "the folder") if self.folder else text

    def fetched(self) -> bool:
        """Whether all images have been fetched."""
        with self._changing:
            return all(len(job.fetched) == len(job.made) for job in self.jobs.values() if job.state == DONE)

    # --- what there is ------------------------------------------------------------------------------------------------

    def adapters(self) -> list[str]:
        """The names of the adapters that requests can name."""
        own = self.engine.pipeline.adapters
        files = [path.relative_to(own.folder) for path in files_in(own.folder)] if own.folder else []
        names = {path.with_suffix("").as_posix() for path in files} | {one.name for one in own.usual}
        return sorted(names | set(self.builtin))

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the body of a job, from the table of settings."""
        properties: dict[str, Any] = {}
        for name, row in at("http").items():
            properties[name] = {**row.kind.schema, "description": row.help}
            if row.usual is not None:
                properties[name]["default"] = row.usual
        bounds = {"steps": self.limits.steps, "n": self.limits.images, "batch": self.limits.images}
        for name, most in bounds.items():
            properties[name]["maximum"] = most
        low, high = PRIORITIES
        properties |= {
            "priority": {"type": "integer", "minimum": low, "maximum": high, "default": 0},
            "seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": self.limits.seconds},
            "previews": {"type": "boolean", "default": False},
            "keep": {"type": "boolean", "default": False, "description": "Keep the images in the server's history."},
        }
        return {"type": "object", "required": ["prompt"], "properties": properties}


def without_places(own: Mapping[str, Any]) -> dict[str, Any]:
    """What records of served images say about their model, of all its `provenance`."""
    return {key: value for key, value in own.items() if key not in PLACES}


def release(job: ServerJob, share: RequestUploads, event: Event) -> None:
    """Let a job that is over hold no uploaded images, and no tokens of its prompts."""
    if event.last:
        plain = job.request.changed(control=(), image_prompt=())
        job.request = replace(plain, image=None, mask=None, reader=PromptReader())
        share.give_back()


@contextmanager
def noted() -> Iterator[list[str]]:
    """A context whose warnings are kept in the list, if a `NoteHandler` is installed."""
    notes: list[str] = []
    token = NOTES.set(notes)
    try:
        yield notes
    finally:
        NOTES.reset(token)


class NoteHandler(logging.Handler):
    """A handler that gives warnings to the job that they are about, not to the log, which has no prompts."""

    def emit(self, record: logging.LogRecord) -> None:
        notes, text = NOTES.get(), record.getMessage()
        if notes is not None and len(notes) < 32 and text not in notes:
            notes.append(text)


def log_to_stderr() -> None:
    """Let the log of this process, which serves, go to stderr, without what is told about jobs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(about_no_job)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, handlers=[handler, NoteHandler()])
    logging.getLogger("ldm.server").setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client is told what is wrong with its form


def about_no_job(record: logging.LogRecord) -> bool:
    """A filter for the log: what is told about jobs is not for it, unless it is an error."""
    return NOTES.get() is None or record.levelno >= logging.ERROR


def without_paths(record: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """A record without the places of the server's files; `folder` is that of the adapters."""
    found = dict(record)
    if "adapters" in found:
        found["adapters"] = {_name(name, folder): {**own, "path": ""} for name, own in found["adapters"].items()}
    if "embeddings" in found:
        found["embeddings"] = [{**own, "path": ""} for own in found["embeddings"]]
    if "image_prompt" in found:
        found["image_prompt"] = [{**own, "adapter": {**own["adapter"], "path": None}} for own in found["image_prompt"]]
        found["image_encoder"] = None
    return found


def _name(name: str, folder: Path | None) -> str:
    """The name of an adapter in a record; its place in the folder, if two have one name and so stand with theirs."""
    place = Path(name)
    if not place.is_absolute():
        return name
    return place.relative_to(folder).as_posix() if folder and place.is_relative_to(folder) else place.stem
