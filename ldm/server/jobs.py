"""Jobs of an engine: requests with their state, their images as they are made, and how far they are."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from pipelines.pipeline import Result
from pipelines.request import Request

log = logging.getLogger(__name__)
WAITING, RUNNING, DONE, FAILED, CANCELLED = ("waiting", "running", "done", "failed", "cancelled")
NOTES: ContextVar[list[str] | None] = ContextVar("notes", default=None)  # what is told about the present job


@dataclass(frozen=True)
class Event:
    """A change of a job: its state, a step of some of its images, or finished images."""

    kind: str  # "state", "step" or "images"
    rows: range = range(0)  # numbers of the images within the job
    step: int = 0  # of the present pass, from 1
    steps: int = 0  # of the present pass
    previews: tuple[Image.Image, ...] = ()  # of these images after the step, with a pixel for each latent
    last: bool = False  # whether the job is over, which one event of each job says


Listener = Callable[[Event], None]


class ServerJob:
    """A request on its way. All methods may be called from any thread."""

    def __init__(
        self,
        request: Request,
        *,
        priority: int = 0,
        seconds: float | None = None,
        previews: bool = False,
        notes: list[str] | None = None,
        rows: Collection[int] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """A job that waits.

        Args:
            request: a checked request.
            priority: of jobs that wait, those with the largest number begin first, as far as fairness allows.
            seconds: the time after which it fails if it is not done.
            previews: whether its steps have previews.
            notes: what is known to tell about it; warnings while it runs are added.
            rows: numbers of the images to make, with those that share a batch with them; by default all.
            listener: is called after each change, by the thread of the engine, which waits for it meanwhile.
        """
        count = len(request.prompts)
        self.id = secrets.token_urlsafe(12)
        self.request, self.priority, self.previews = request, priority, previews
        self.rows = range(count) if rows is None else rows
        self.listeners = [listener] if listener else []
        self.notes: list[str] = [] if notes is None else notes
        self.state, self.error = WAITING, ""
        self.status = 500  # of HTTP, if it fails
        self.created = time.monotonic()
        self.deadline = None if seconds is None else self.created + seconds
        self.started: float | None = None
        self.ended: float | None = None
        self.made: list[MadeImage | None] = [None] * count
        self.fetched: set[int] = set()  # numbers of the images that somebody has taken
        self.latest: dict[int, Event] = {}  # the last step of the images, by the number of the first
        self.over = threading.Event()
        self._changing = threading.Lock()

    # --- for those who wait for it ------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop it: it runs to the end of the present step at most. Nothing happens if it is over."""
        self.end(CANCELLED, status=410)

    def result(self, timeout: float | None = None) -> Result:
        """Its images and records, when it is done.

        Raises:
            LdmError: it failed or was cancelled, or is not over after `timeout` seconds.
        """
        if not self.over.wait(timeout):
            raise LdmError(f"the job is not over after {timeout} seconds")
        if self.state != DONE:
            raise LdmError(self.reason)
        made = [one for one in self.made if one is not None]
        columns = [one.image for one in made], [one.record for one in made], [one.latents for one in made]
        return Result(*columns, rows=range(len(made)))

    @property
    def reason(self) -> str:
        """Why it has ended without all of its images."""
        return self.error or "the job was cancelled"

    @property
    def seconds(self) -> tuple[float, float]:
        """How long it has waited, and how long it has run."""
        now = self.ended or time.monotonic()
        begun = self.started or now
        return begun - self.created, now - begun

    # --- for the engine -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin it, if it waits."""
        with self._changing:
            if self.state != WAITING:
                return
            self.state, self.started = RUNNING, time.monotonic()
        self.tell(Event("state"))

    def end(self, state: str, error: str = "", status: int = 500) -> None:
        """End it, unless it is over; `status` is that of HTTP for those who wait for an image."""
        with self._changing:
            if self.over.is_set():
                return
            self.state, self.error, self.status, self.ended = state, error, status, time.monotonic()
            self.over.set()
        self.tell(Event("state", last=True))

    def add(self, rows: range, made: list[MadeImage]) -> None:
        """Add finished images; the last ones end it."""
        with self._changing:
            if self.over.is_set():
                return
            self.made[rows.start : rows.stop] = made
        self.tell(Event("images", rows))
        if all(self.made[row] is not None for row in self.rows):
            self.end(DONE)

    def tell(self, event: Event) -> None:
        """Tell the listeners of an event."""
        if event.kind == "step":
            self.latest[event.rows.start] = event
        for listener in tuple(self.listeners):
            try:
                listener(event)
            except Exception:  # a listener's defect ends neither the job nor the engine
                log.exception("a listener of a job has failed")


@dataclass(frozen=True, eq=False)
class MadeImage:
    """A finished image."""

    image: Image.Image
    record: dict[str, Any]  # with which it can be made again
    latents: Tensor  # (C, h, w), scaled
