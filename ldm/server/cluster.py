"""Many machines: a service whose jobs are made by replicas of an engine, which Ray Serve places, watches and scales.

The door, the process that answers HTTP, has the whole interface and knows all jobs; it holds no weights and makes no
images. Each job is one streamed call of a replica, from its request to its end, so that the calls in progress are the
queue, by which Ray Serve chooses a replica and starts and stops them. A call whose replica has died is made again by
another one, for the images that are missing: they depend on the job's settings and seeds alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.limits import cores, free_memory, quota
from ldm.server.engine import Counts, JobTaker, Piece, loaded
from ldm.server.guard import RAY_TOKEN
from ldm.server.jobs import DONE, FAILED, RUNNING, WAITING, Event, ServerJob
from ldm.server.limits import Limits
from ldm.server.replica import AboutReplica, EngineReplica, ReplicaReport, order_of
from ldm.server.service import Service
from ldm.weights.builtin import builtin
from pipelines import Pipeline

log = logging.getLogger(__name__)
NAME = "ldm"  # of the application in Ray Serve
TRIES = 3  # replicas that may end while they work on a job
PAUSE_SECONDS = 0.2  # before a job is sent again
LOOK_SECONDS = 2.0  # between looks at the replicas
STOP_SECONDS = 10.0  # in which replicas are told that jobs are over when the engine is closed
MISSED = 5  # looks that fail until Ray counts as gone
STORE = (80 * 2**20, 2**30)  # bytes of Ray's store, through which images come: at least, at most
EVERYWHERE = {  # of Ray's environment, which it reads when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "GRPC_VERBOSITY": "ERROR",
}
HERE = {  # for one that is for this server alone
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of its ports are on 127.0.0.1
    "RAY_AUTH_MODE": "token",  # and those who do not know the token cannot use them
    "RAY_agent_register_timeout_ms": "300000",  # for a busy machine
}
STARTS = 3  # of Ray here, which on a busy machine may not be ready in the time that it gives itself
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # of Ray Serve
UNTUNED: dict[str, Any] = {  # settings of loading for a pipeline that checks requests and makes no images
    "device": "cpu", "attention": "sdpa", "quick": False, "compile": False, "quantize": None, "offload": "none",
}  # fmt: skip
DOOR = ("c2pa",)  # settings of loading of the door alone: it writes images' files, and so no replica needs its key


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas there are, and where."""

    least: int  # replicas
    most: int  # replicas
    jobs: int  # of each replica, above which another one is started
    address: str | None  # of a Ray cluster; None: one on this machine, for as long as the server runs


class ClusterEngine(JobTaker):
    """Lets the replicas of a Ray Serve application make the images of jobs."""

    def __init__(self, pipeline: Pipeline, handle: Any, most: int, queue: int) -> None:
        """Start the thread that follows jobs.

        Args:
            pipeline: by which requests are checked; its weights may be absent.
            handle: a handle of a deployment of `EngineReplica`.
            most: pixels of latents that a replica works on at a time.
            queue: as for `Engine`.
        """
        super().__init__(pipeline, most, queue)
        self.handle, self.each = handle, most
        self.by_replica: dict[str, Counts] = {}  # what each has done so far, those that have ended, too
        self._changing = threading.Lock()
        self._idle = threading.Condition(self._changing)
        self._followed: set[Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ldm-cluster", daemon=True)
        self._thread.start()

    # --- for other threads --------------------------------------------------------------------------------------------

    def submit(self, job: ServerJob) -> ServerJob:
        pieces = list(self._pieces(job))
        with self._changing:
            self.check_open(len(pieces))
            self.waiting += pieces
        job.listeners.append(self._sort)
        following = asyncio.run_coroutine_threadsafe(self._follow(job), self._loop)
        self._followed.add(following)
        following.add_done_callback(self._followed.discard)
        return job

    def close(self, timeout: float | None = None) -> bool:
        with self._idle:
            self._closing = True
            in_time = self._idle.wait_for(lambda: not self.waiting and not self.running, timeout)
            left = [*self.waiting, *self.running]
        for piece in left:
            piece.job.end(FAILED, "the engine was closed", 503)
        wait(list(self._followed), STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        return in_time

    def watch(self, stop: threading.Event) -> None:
        """Look after the replicas until an event is set; if Ray itself does not answer any more, the engine fails."""
        missed = 0
        while not stop.wait(LOOK_SECONDS):
            try:
                self.replicas = running_replicas()
                missed = 0
            except Exception as error:  # Ray's own, of many kinds
                missed += 1
                log.warning("the replicas are not known: %s", type(error).__name__)
            self.most = self.each * self.replicas
            if missed == MISSED:
                self.failure = "the Ray cluster does not answer"

    # --- the thread that follows jobs ---------------------------------------------------------------------------------

    def _sort(self, event: Event) -> None:
        """Sort the images that are not made into those that wait and those that are worked on."""
        if event.kind == "step":
            return
        with self._idle:
            left: list[Piece] = [
                piece
                for piece in (*self.waiting, *self.running)
                if not piece.job.over.is_set() and piece.job.made[piece.rows.start] is None
            ]
            self.waiting = [piece for piece in left if piece.job.state == WAITING]
            self.running = [piece for piece in left if piece.job.state == RUNNING]
            self._idle.notify_all()

    async def _follow(self, job: ServerJob) -> None:
        """Have a job made, by another replica if one ends."""
        over = asyncio.Event()

        def listen(event: Event) -> None:
            if event.last:
                self._loop.call_soon_threadsafe(over.set)

        job.listeners.append(listen)
        try:
            for _ in range(TRIES):
                if job.over.is_set() or await self._tried(job, over):
                    return
                await asyncio.sleep(PAUSE_SECONDS)
            job.end(FAILED, f"{TRIES} replicas have ended while they worked on this job; it was given up", 503)
        except Exception as error:
            log.exception("a job was lost")
            job.end(FAILED, f"a defect of this program: {type(error).__name__}")

    async def _tried(self, job: ServerJob, over: asyncio.Event) -> bool:
        """Have a job made by a replica, until it is over here or there; whether it is."""
        stream = self.handle.options(stream=True).make.remote(order_of(job))
        reading = asyncio.create_task(self._read(stream, job))
        ending = asyncio.create_task(over.wait())
        left = None if job.deadline is None else max(job.deadline - time.monotonic(), 0)
        await asyncio.wait({reading, ending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not reading.done() and not job.over.is_set() and job.deadline is not None:
            job.end(FAILED, f"not done within {job.deadline - job.created:g} seconds", 503)
        if not reading.done() and job.state != DONE:
            stream.cancel()
        try:
            await reading
        except Exception as error:  # Ray's own, of many kinds, and what the replica raises if its engine has stopped
            if not job.over.is_set():
                log.warning("job %s: its replica has ended (%s); it is sent again", job.id, type(error).__name__)
        return job.over.is_set()

    async def _read(self, stream: Any, job: ServerJob) -> None:
        """Take the reports about a job."""
        async for report in stream:
            self._take(report, job)

    def _take(self, report: ReplicaReport, job: ServerJob) -> None:
        event = report.event
        job.notes += [note for note in report.notes if note not in job.notes]
        if event.kind == "step":
            job.tell(event)
            return
        self._count(report)
        if event.kind == "images":
            job.add(event.rows, list(report.made))
        elif not event.last:
            job.begin()
        elif report.state != DONE:  # which the last images have told
            job.end(report.state, report.error, report.status)

    def _count(self, report: ReplicaReport) -> None:
        """Note what a replica has done so far."""
        self.by_replica[report.replica] = report.counts
        every = list(self.by_replica.values())
        self.counts = Counts(**{one.name: sum(getattr(own, one.name) for own in every) for one in fields(Counts)})


# --- Ray --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clustered(
    loading: Mapping[str, Any],
    limits: Limits,
    most: int | None,
    options: ClusterOptions,
    **beside: Any,
) -> Iterator[Service]:
    """A service with replicas, which end with the context; the other arguments are as for `Service`.

    Raises:
        LdmError: the model cannot be loaded, or the replicas do not start.
    """
    loading = absolute(loading)
    pipeline = loaded({**loading, **UNTUNED})
    with tempfile.TemporaryDirectory(prefix="ldm-ray-", ignore_cleanup_errors=True) as folder, joined(options, folder):
        handle = deployed(loading, most, limits, options)
        about: AboutReplica = handle.about.remote().result()
        engine = ClusterEngine(pipeline, handle, about.most, limits.queue)
        service = Service(pipeline, loading, limits, most, engine=engine, **beside)
        service.about = about.model
        let_go(pipeline)
        stop = threading.Event()
        watcher = threading.Thread(target=engine.watch, args=[stop], name="ldm-replicas", daemon=True)
        engine.replicas, engine.most = (found := running_replicas()), about.most * found
        watcher.start()
        try:
            yield service
        finally:
            stop.set()
            engine.close(0)
            watcher.join()


def absolute(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of loading whose paths do not depend on the folder that a process stands in."""

    def found(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: found(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(found, value))
        is_path = isinstance(value, str) and os.path.lexists(value) and not builtin(value)
        return str(Path(value).absolute()) if is_path else value

    return {name: found(value) for name, value in loading.items()}


def of_replicas(loading: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of loading that replicas need."""
    return {name: value for name, value in loading.items() if name not in DOOR}


def let_go(pipeline: Pipeline) -> None:
    """Free the weights of a pipeline that checks requests."""
    networks = [*pipeline.model.networks.values(), *pipeline.control_models.values()]
    networks += pipeline.refiner.networks.values() if pipeline.refiner else ()
    networks += [pipeline.image_prompts.encoder.tower] if pipeline.image_prompts.encoder else ()
    networks += [pipeline.finishing.checker.tower] if pipeline.finishing.checker else ()
    for network in networks:
        network.to("meta")


@contextlib.contextmanager
def joined(options: ClusterOptions, folder: str) -> Iterator[None]:
    """A Ray cluster, or one for this server alone, which only this machine and its token reach, with files in a folder.

    Raises:
        LdmError: the cluster does not answer, or Ray does not start.
    """
    here = options.address is None
    for name, value in (EVERYWHERE | HERE | {RAY_TOKEN: secrets.token_hex(32)} if here else EVERYWHERE).items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    own = {
        "num_cpus": max(min(cores(), quota()), options.most), "include_dashboard": False, "_temp_dir": folder,
        "object_store_memory": min(max(free_memory() // 10, STORE[0]), STORE[1]),
    }  # fmt: skip
    for number in range(STARTS):
        try:
            ray.init(options.address or "local", logging_level="WARNING", **(own if here else {}))
            break
        except Exception as error:  # Ray's own, of many kinds
            ray.shutdown()
            said = str(error).strip().partition("\n")[0]
            if here and number + 1 == STARTS:
                raise LdmError(f"Ray does not start on this machine: {said}") from None
            if not here:
                raise LdmError(
                    f"--ray-address {options.address!r}: no Ray cluster answers there ({said}); start one (ray start "
                    "--head), or leave it out"
                ) from None
    try:
        yield
    finally:
        if not here:
            with contextlib.suppress(Exception):  # a cluster that is gone
                serve.delete(NAME)
        ray.shutdown()


def deployed(loading: Mapping[str, Any], most: int | None, limits: Limits, options: ClusterOptions) -> Any:
    """A handle of replicas that are ready, on a GPU each, or on a share of the CPUs.

    Raises:
        LdmError: there are not as many GPUs, or the replicas do not start.
    """
    import ray
    from ray import serve

    gpus = 0 if loading.get("device") == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if not gpus and str(loading.get("device")).startswith("cuda"):
        raise LdmError("--device cuda: Ray finds no GPU; leave it out")
    if options.address is None and 0 < gpus < options.least:
        raise LdmError(f"{options.least} replicas need a GPU each, and there are {gpus}; lower --replicas")
    threads = None if gpus else share([int(node["Resources"].get("CPU", 0)) for node in ray.nodes()], options.most)
    scaling: dict[str, Any] = {"num_replicas": options.least}
    if options.most > options.least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": options.least, "max_replicas": options.most, "target_ongoing_requests": options.jobs,
                "upscale_delay_s": 10.0,
            }
        }  # fmt: skip
    deployment = serve.deployment(EngineReplica).options(
        **scaling, max_ongoing_requests=4 * options.jobs, graceful_shutdown_timeout_s=limits.seconds,
        health_check_period_s=5.0, logging_config=QUIET,
        ray_actor_options={"num_gpus": min(gpus, 1), "num_cpus": threads or 1},
    )  # fmt: skip
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    try:
        return serve.run(deployment.bind(of_replicas(loading), most, threads), name=NAME, route_prefix=None)
    except RuntimeError as error:
        last = str(error).strip().rpartition("\n")[2]
        raise LdmError(f"the replicas do not start: {last}") from None


def share(cpus: Sequence[int], replicas: int) -> int:
    """The most CPUs that each of some replicas can have on machines with so many CPUs each; at least 1."""
    return next((one for one in range(max(cpus), 1, -1) if sum(have // one for have in cpus) >= replicas), 1)


def running_replicas() -> int:
    """The number of replicas that work."""
    from ray import serve

    application = serve.status().applications[NAME]
    return sum(int(one.replica_states.get("RUNNING", 0)) for one in application.deployments.values())
