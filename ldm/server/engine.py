"""The engine: one thread makes the images of many jobs, with their networks' calls made together.

Each job runs the code of `Pipeline`, as a coroutine for each image; before every step, the calls that the coroutines
wait for are packed into as few as their sizes and patches allow (`ldm.server.joining`). A job joins between two steps
and leaves when it is done. An image depends on its own seed, not on those beside it, up to rounding, as in a batch.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent

from ldm.errors import LdmError, out_of_memory
from ldm.runtime.kernels.memory import give_back, share_heap
from ldm.sampling.loop import Step
from ldm.server.jobs import FAILED, NOTES, Event, MadeImage, ServerJob
from ldm.server.joining import Joints, NetworkCall, Run, UNetCall, waiting
from ldm.server.limits import Limits
from pipelines import Pipeline
from pipelines.adapters import KEPT
from pipelines.batching import BUSY
from pipelines.mixes import Mix
from pipelines.passes import largest_request
from pipelines.pipeline import Result, with_networks
from pipelines.request import Request
from pipelines.run import TooManyError
from pipelines.tuning import cpu_by_default, room_of, typed

log = logging.getLogger(__name__)
LAST_SECONDS = 30.0  # in which the step that is worked on must end when an engine is closed
OVERTAKEN = 16  # later images that may begin before an image that waits
GIVE_BACK_SECONDS = 30.0  # between times at which freed memory is given back to the system


class NotTakenError(LdmError):
    """Raised if a job is not taken now, because too many wait or the engine is closing."""


@dataclass(eq=False)
class Piece:
    """Images of a job that one coroutine makes: a single one, unless the job says how many are made at a time."""

    job: ServerJob
    rows: range
    number: int  # in the order of arrival
    pixels: int  # of latents, in the largest pass
    mix: Mix  # its adapters
    overtaken: int = 0  # by later ones
    run: Run | None = None
    call: NetworkCall | None = None  # that the run waits for


@dataclass
class Counts:
    """What an engine has done so far."""

    calls: int = 0  # of U-Nets
    steps: int = 0  # of coroutines, made in these calls
    images: int = 0
    busy: float = 0.0  # seconds


class JobTaker(ABC):
    """What makes the images of a service's jobs, here or elsewhere. All methods may be called from any thread."""

    def __init__(self, pipeline: Pipeline, most: int, queue: int) -> None:
        """A job's settings are checked by a pipeline; `most` and `queue` are as for `Engine`."""
        self.pipeline, self.most, self.queue = pipeline, most, queue
        self.waiting: list[Piece] = []
        self.running: list[Piece] = []
        self.counts = Counts()
        self.replicas = 1  # engines that work
        self.failure = ""  # why it has ended, if it should not have
        self.hangs = False  # whether it was closed and its last step did not end
        self._numbers = count()
        self._closing = False

    def request(self, prompt: Any, **settings: Any) -> Request:
        """The checked request of a call, as `Pipeline.request` gives it.

        Raises:
            LdmError: as `Pipeline.request`; or the scheduler is an object, whose state jobs would share.
        """
        request = self.pipeline.request(prompt, **settings)
        if not isinstance(request.scheduler, (str, type(None))):
            raise LdmError("scheduler: an engine makes each image's own; name it")
        return request

    def check_open(self, more: int = 1) -> None:
        """Raise unless the engine takes jobs with so many more images.

        Raises:
            NotTakenError: too many images wait, or the engine is closing.
        """
        if self._closing or self.failure:
            raise NotTakenError(self.failure or "the engine is closing; it takes no more jobs")
        if len(self.waiting) + more > self.queue:
            raise NotTakenError(
                f"{len(self.waiting)} images wait, and at most {self.queue} may, with the {more} of this job: try "
                "again later"
            )

    @abstractmethod
    def submit(self, job: ServerJob) -> ServerJob:
        """Take a job, and return it.

        Raises:
            NotTakenError: too many images wait, or the engine is closing.
        """

    @abstractmethod
    def close(self, timeout: float | None = None) -> bool:
        """Take no more jobs, and wait until all are over; whether they are within `timeout` seconds.

        Those that are not fail.
        """

    def _pieces(self, job: ServerJob) -> Iterator[Piece]:
        """The parts of a job: batches if it says how many images are made together, else single images."""
        request, family = job.request, self.pipeline.model.family
        single = [range(row, row + 1) for row in range(len(request.prompts))]
        largest = largest_request(request, family)
        pixels = (largest.height // family.autoencoder.factor) * (largest.width // family.autoencoder.factor)
        for rows in self.pipeline.batches(request) if request.batch else single:
            if rows.start not in job.rows:
                continue
            mix = request.mixes[rows.start] if request.mixes else ()
            yield Piece(job, rows, next(self._numbers), pixels * len(rows), mix)


class Engine(JobTaker):
    """Owns a pipeline's networks, and makes images of jobs. All public methods may be called from any thread."""

    def __init__(
        self, pipeline: Pipeline, *, most: int | None = None, queue: int = Limits.queue, overtaken: int = OVERTAKEN
    ) -> None:
        """Start the thread of an engine; the pipeline stays as it is.

        Args:
            pipeline: whose models are used.
            most: pixels of latents that are worked on at a time; by default what keeps the device busy.
            queue: images that may wait; of more, jobs are not taken.
            overtaken: later images that may begin before one that waits, because of their priority or size.
        """
        self.one_by_one = room_of(pipeline.model) is not None  # the networks of an offloaded model take turns
        own = pipeline if self.one_by_one else with_networks(pipeline, waiting)
        super().__init__(own, most or BUSY.get(pipeline.model.device.type, 1), queue)
        self.overtaken = overtaken
        self._joints = Joints()
        self._fitting: dict[Hashable, int] = {}  # most calls of a size that memory sufficed for, if it once did not
        self._gave_back = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="ldm-engine", daemon=True)
        self._thread.start()

    # --- for other threads --------------------------------------------------------------------------------------------

    def submit(self, job: ServerJob) -> ServerJob:
        """Take a job, and return it.

        Raises:
            NotTakenError: too many images wait, or the engine is closing.
        """
        pieces = list(self._pieces(job))
        with self._changed:
            self.check_open(len(pieces))
            self.waiting += pieces
            self._changed.notify_all()
        return job

    def close(self, timeout: float | None = None, last: float = LAST_SECONDS) -> bool:
        """Take no more jobs, and wait until all are over; whether they are within `timeout` seconds.

        Those that are not fail, and the present step has `last` seconds more: a call that hangs is left alone.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        in_time = not self._thread.is_alive()
        for piece in [*self.waiting, *self.running]:
            piece.job.end(FAILED, "the engine was closed", 503)
        self._thread.join(last)
        self.hangs = self._thread.is_alive()
        if self.hangs:
            log.error("a step has not ended %g seconds after the engine was closed; it is left alone", last)
        return in_time

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with torch.inference_mode(), cpu_by_default():
                while self._something_to_do():
                    self._give_back_memory()
                    begun = time.monotonic()
                    self._stop_those_over()
                    self._admit()
                    self._step()
                    self.counts.busy += time.monotonic() - begun
        except BaseException as error:
            log.exception("the engine has stopped")
            with self._changed:  # so that nobody submits a job after the last look
                self.failure = f"the engine has stopped: {type(error).__name__}"
                for piece in [*self.waiting, *self.running]:
                    piece.job.end(FAILED, self.failure)

    def _something_to_do(self) -> bool:
        """Wait until there are jobs; False if there are none and there will be none."""
        with self._changed:
            while not self.waiting and not self.running and not self._closing:
                self._joints = Joints()  # frees their memory
                self._changed.wait(GIVE_BACK_SECONDS)
                self._give_back_memory()
            return bool(self.waiting or self.running)

    def _give_back_memory(self) -> None:
        """Give freed memory back to the system from time to time: requests that differ scatter it ever more."""
        if time.monotonic() - self._gave_back >= GIVE_BACK_SECONDS:
            give_back()
            self._gave_back = time.monotonic()

    def _stop_those_over(self) -> None:
        """Leave out jobs that were cancelled or have failed, or whose time is up."""
        now = time.monotonic()
        for piece in [*self.running, *self.waiting]:
            job = piece.job
            if job.deadline is not None and now > job.deadline:
                job.end(FAILED, f"not done within {job.deadline - job.created:g} seconds", 503)
        with self._changed:
            self.waiting = [piece for piece in self.waiting if not piece.job.over.is_set()]
        for piece in [piece for piece in self.running if piece.job.over.is_set()]:
            assert piece.run is not None
            self._advance(piece, piece.run.throw, GreenletExit)

    def _admit(self) -> None:
        """Begin with those that wait, as far as they fit beside those that run."""
        while True:
            with self._changed:
                piece = self._next()
                if piece is None:
                    return
                self.waiting.remove(piece)
                self.running.append(piece)
            piece.job.begin()
            piece.run = Run(self._making(piece), getcurrent())
            self._advance(piece, piece.run.switch)

    def _next(self) -> Piece | None:
        """The piece that begins next: of those that fit and are not over the most important one, of these the first.

        If one has been overtaken by as many later ones as may, nothing begins before it.
        """
        taken = sum(piece.pixels for piece in self.running)
        mixes = {piece.mix for piece in self.running}

        def fits(piece: Piece) -> bool:
            small = taken + piece.pixels <= self.most and len({piece.mix, *mixes} - {()}) <= KEPT
            room = not self.running or (small and not self.one_by_one)
            return room and not piece.job.over.is_set()

        overdue = next((piece for piece in self.waiting if piece.overtaken >= self.overtaken), None)
        order = [overdue] if overdue else sorted(self.waiting, key=lambda piece: (-piece.job.priority, piece.number))
        found = next(filter(fits, order), None)
        if found is not None:
            for piece in self.waiting:
                piece.overtaken += piece.number < found.number
        return found

    def _making(self, piece: Piece) -> Callable[[], list[Result]]:
        """The function of a piece's coroutine: the pipeline's ordinary code."""
        job = piece.job

        def note(step: Step) -> None:
            if job.over.is_set():
                raise GreenletExit
            previews = tuple(self.pipeline.preview(step)) if job.previews else ()
            job.tell(Event("step", piece.rows, step.index + 1, step.count, previews))

        def make() -> list[Result]:
            NOTES.set(job.notes)
            return list(self.pipeline.make(job.request, only=[piece.rows], on_step=note))

        return make

    def _advance(self, piece: Piece, switch: Callable[..., Any], *arguments: Any) -> None:
        """Let a coroutine go on to its next call or its end; what it raises is the failure of its job alone."""
        piece.call = found = None
        try:
            found = switch(*arguments)
        except LdmError as error:
            piece.job.end(FAILED, str(error), 503 if isinstance(error, TooManyError) else 422)
        except Exception as error:
            if not piece.job.over.is_set():  # one that is over may have lost its images before it began
                log.exception("a job has failed")
            piece.job.end(FAILED, f"a defect of this program: {type(error).__name__}")
        if isinstance(found, NetworkCall):
            piece.call = found
            return
        self.running.remove(piece)
        for result in found if isinstance(found, list) else ():
            made = zip(result.images, result.settings, result.latents, strict=True)
            self.counts.images += len(result.images)
            piece.job.add(result.rows, [MadeImage(*one) for one in made])

    def _step(self) -> None:
        """Make all calls that coroutines wait for, those with the same key together, and let them go on."""
        groups: defaultdict[Hashable, list[Piece]] = defaultdict(list)
        for piece in self.running:
            if piece.call is not None:
                groups[piece.call.key].append(piece)
        for group in groups.values():
            for pieces in self._packed(group):
                calls = [piece.call for piece in pieces if piece.call is not None]
                for piece, outcome in zip(pieces, self._outcomes(calls), strict=True):
                    assert piece.run is not None
                    proceed = piece.run.throw if isinstance(outcome, Exception) else piece.run.switch
                    self._advance(piece, proceed, outcome)
        self._joints.next_step()

    def _packed(self, group: list[Piece]) -> Iterator[list[Piece]]:
        """A group in parts that can be made together."""
        call = group[0].call
        assert call is not None
        most = min(call.most, self._fitting.get(call.size, len(group)))
        yield from (group[start : start + most] for start in range(0, len(group), most))

    def _outcomes(self, calls: list[NetworkCall]) -> list[Any]:
        """The results of calls with the same key; in place of one that fails, its exception.

        If a joint call fails, its halves are made, until those at fault are alone.
        """
        first = calls[0]
        try:
            made = [first.alone()] if len(calls) == 1 else type(first).together(calls, self._joints)
        except Exception as error:
            if len(calls) == 1:
                return [error]
            too_many = out_of_memory(error)
        else:
            if isinstance(first, UNetCall):
                self.counts.calls += 1
                self.counts.steps += len(calls)
            return made
        # outside of the handler, which would keep the tensors of the failed attempt alive
        fewer = len(calls) // 2
        made = self._outcomes(calls[:fewer]) + self._outcomes(calls[fewer:])
        if too_many and not any(isinstance(outcome, Exception) for outcome in made):
            self._fitting[first.size] = min(fewer, self._fitting.get(first.size, fewer))
        return made


def loaded(loading: Mapping[str, Any]) -> Pipeline:
    """The pipeline of settings of loading, for an engine.

    It is loaded in a thread of its own, whose OpenMP team ends with it: beside one that stays, the engine's would wait
    badly. Its memory is of the heap that the engine gives back from time to time.

    Raises:
        LdmError: as `Pipeline`.
    """
    share_heap()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(Pipeline, **typed(loading)).result()
