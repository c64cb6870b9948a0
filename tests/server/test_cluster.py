"""Jobs that replicas make: the images of one engine, whichever replica makes them and whichever ends meanwhile."""

from __future__ import annotations

import asyncio
import io
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapter_files
import httpx2
import psutil
import pytest
import safety
import tiny
import torch
import yaml
from certificates import certificate
from commands import run
from images import difference, from_base64, in_base64
from launched import PATIENCE
from modules import ROOT
from PIL import Image
from servers import SMALL, options, over

from ldm.cli import serve
from ldm.cli.serve import history_of, replicas_of, trainer_of
from ldm.errors import LdmError
from ldm.images import read_settings
from ldm.server import cluster, replica
from ldm.server.cluster import ClusterEngine, absolute, let_go, of_replicas, share
from ldm.server.engine import NotTakenError
from ldm.server.guard import OPEN
from ldm.server.jobs import CANCELLED, DONE, FAILED, Event, ServerJob
from ldm.server.limits import Limits
from ldm.server.replica import EngineReplica, ReplicaOrder
from ldm.server.runs import Runs
from ldm.server.service import Service
from ldm.server.serving import FETCH_SECONDS, in_thread
from ldm.signing import read_manifest
from ldm.watermark import LEAST, matching_bits
from pipelines import Pipeline

FLAGGED: dict[str, Any] = {**SMALL, "image": in_base64(Image.new("RGB", (64, 64), "white")), "strength": 0.6}
CHECKER: dict[str, Any] = {"threshold": 0.335, "seed": 30}  # it finds 0.37 in the image of `FLAGGED`, 0.3 in others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster")
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(root / "model")
    adapter_files.saved(adapter_files.adapter(model, "kohya"), root / "loras" / "style.safetensors")
    safety.saved(root / "checker", **CHECKER)
    certificate(root)
    (root / "runs").mkdir()
    return root


@pytest.fixture(scope="module")
def loading(folder: Path) -> dict[str, Any]:
    return {"source": str(folder / "model"), "lora_dir": str(folder / "loras"), "dtype": "fp32"}


@pytest.fixture(scope="module")
def pipeline(loading: dict[str, Any]) -> Pipeline:
    return Pipeline(**{**loading, "dtype": torch.float32})


@pytest.fixture(scope="module")
def finished(loading: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of loading with all that happens to finished images."""
    signing = (str(folder / "chain.pem"), str(folder / "key.pem"))
    return {**loading, "watermark": True, "safety": str(folder / "checker"), "c2pa": signing}


# --- without Ray ------------------------------------------------------------------------------------------------------


class LocalReplicas:
    """Replicas in this process, in turn, in place of a handle of Ray Serve; some end after a few reports."""

    def __init__(self, replicas: list[EngineReplica], ends: list[int]) -> None:
        """`ends` are numbers of reports after which the replica of a call ends, one for each of the first calls."""
        self.replicas, self.ends = replicas, ends
        self.orders: list[ReplicaOrder] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.make = self

    def options(self, **_: Any) -> LocalReplicas:
        return self

    def remote(self, order: ReplicaOrder) -> LocalStream:
        self.orders.append(order)
        end = self.ends.pop(0) if self.ends else 10**9
        return LocalStream(self.replicas[len(self.orders) % len(self.replicas)], order, end)


class LocalStream:
    """A call of a replica, what it gives and takes pickled."""

    def __init__(self, replica: EngineReplica, order: ReplicaOrder, end: int) -> None:
        self.replica, self.order, self.end = replica, order, end
        self.reading: asyncio.Task[Any] | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        self.reading = asyncio.current_task()
        reports = self.replica.make(pickle.loads(pickle.dumps(self.order)))
        try:
            async for report in reports:
                if not self.end:
                    raise ConnectionError("the replica has ended")
                self.end -= 1
                yield pickle.loads(pickle.dumps(report))
        finally:
            await reports.aclose()  # type: ignore[attr-defined]

    def cancel(self) -> None:
        if self.reading is not None:
            self.reading.cancel()


@pytest.fixture(scope="module")
def replicas(loading: dict[str, Any]) -> Iterator[list[EngineReplica]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "log_to_stderr", lambda: None)  # the log is that of the tests
        made = [EngineReplica(loading, None, None) for _ in range(2)]
    yield made
    for one in made:
        one.engine.close(0)


@pytest.fixture
def clusters(replicas: list[EngineReplica], loading: dict[str, Any]) -> Iterator[Any]:
    """Makes engines for replicas of which some end."""
    made: list[ClusterEngine] = []
    checking = Pipeline(**{**loading, "dtype": torch.float32, "quick": False, "attention": "sdpa"})
    let_go(checking)

    def make(*ends: int) -> tuple[ClusterEngine, LocalReplicas]:
        handle = LocalReplicas(replicas, list(ends))
        made.append(ClusterEngine(checking, handle, 1, 8))
        return made[-1], handle

    yield make
    for one in made:
        one.close(0)
    for one in replicas:
        assert one.engine.failure == ""


def test_images_of_replicas_are_those_of_the_pipeline(clusters: Any, pipeline: Pipeline) -> None:
    """With adapters, images to start from, previews; the pipeline that checks requests has no weights."""
    engine, _ = clusters()
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    wanted = [
        {**SMALL, "n": 2, "adapters": {"style": 0.5}, "negative": "red"},
        {**SMALL, "image": image, "strength": 0.8, "steps": 4},
        {**SMALL, "n": 3, "batch": 2},
    ]
    told: list[Event] = []
    jobs = [engine.submit(ServerJob(engine.request(**one), previews=True, listener=told.append)) for one in wanted]
    for job, one in zip(jobs, wanted, strict=True):
        made = job.result(PATIENCE)
        alone = pipeline(**({"batch": 1} | one))
        assert max(map(difference, made.images, alone.images)) <= 1
        assert [record["seed"] for record in made.settings] == [record["seed"] for record in alone.settings]
    assert any(event.previews for event in told) and sum(event.last for event in told) == 3
    assert engine.counts.images == 6 and not engine.waiting and not engine.running


def test_a_replica_that_ends(clusters: Any, pipeline: Pipeline) -> None:
    """Another one makes the images that are missing, with the same seeds, also random ones."""
    engine, handle = clusters(0, 8)
    job = engine.submit(ServerJob(engine.request(**{**SMALL, "n": 3, "seed": None})))
    made = job.result(PATIENCE)
    first, second, third = handle.orders
    assert first.rows == second.rows == (0, 1, 2) and 0 < len(third.rows) < 3
    seed = job.request.seeds[0]
    assert max(map(difference, made.images, pipeline(**{**SMALL, "n": 3, "seed": seed, "batch": 1}).images)) <= 1


def test_a_job_that_ends_every_replica_is_given_up(clusters: Any) -> None:
    engine, handle = clusters(1, 1, 1)
    job = engine.submit(ServerJob(engine.request(**SMALL)))
    with pytest.raises(LdmError, match="3 replicas have ended while they worked on this job"):
        job.result(PATIENCE)
    assert job.status == 503 and len(handle.orders) == 3
    engine.submit(ServerJob(engine.request(**SMALL))).result(PATIENCE)


def test_cancel_time_and_failure(clusters: Any, replicas: list[EngineReplica]) -> None:
    """What ends a job here ends it in its replica, and the other way round."""
    engine, handle = clusters()
    cancelled = engine.submit(ServerJob(engine.request(**{**SMALL, "steps": 900})))
    late = engine.submit(ServerJob(engine.request(**{**SMALL, "steps": 900}), seconds=0.3))
    wrong = engine.submit(ServerJob(engine.request(**{**SMALL, "clip_skip": 50})))
    while cancelled.state == "waiting":
        time.sleep(0.01)
    assert len(engine.running) + len(engine.waiting) == 3 - late.over.is_set() - wrong.over.is_set()
    cancelled.cancel()
    with pytest.raises(LdmError, match=r"not done within 0\.3 seconds"):
        late.result(PATIENCE)
    with pytest.raises(LdmError, match="clip_skip 50"):
        wrong.result(PATIENCE)
    assert (cancelled.state, late.state, wrong.state) == (CANCELLED, FAILED, FAILED)
    assert (late.status, wrong.status, len(handle.orders)) == (503, 422, 3)
    while any(one.engine.running or one.engine.waiting for one in replicas):
        time.sleep(0.01)


def test_an_adapter_that_differs(clusters: Any, folder: Path, replicas: list[EngineReplica]) -> None:
    engine, _ = clusters()
    request = engine.request(**SMALL, adapters={"style": 0.5})
    file = folder / "loras" / "style.safetensors"
    before = file.read_bytes()
    try:
        adapter_files.saved(adapter_files.adapter(tiny.model("sd15", shallow=True), "kohya"), file, {"another": "file"})
        with pytest.raises(LdmError, match="not the same on all machines") as told:
            engine.submit(ServerJob(request)).result(PATIENCE)
        assert str(folder) not in str(told.value)
    finally:
        file.write_bytes(before)


def test_a_refused_image(loading: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica looks at it, and the door, which has no weights of the checker, says why there is none."""
    monkeypatch.setattr(replica, "log_to_stderr", lambda: None)
    own = {**loading, "safety": str(safety.saved(folder / "all", -2.0)), "safety_action": "refuse"}
    checking = Pipeline(**{**own, "dtype": torch.float32})
    let_go(checking)
    assert checking.finishing.checker is not None
    assert {one.device.type for one in checking.finishing.checker.tower.parameters()} == {"meta"}
    made = EngineReplica(own, None, None)
    engine = ClusterEngine(checking, LocalReplicas([made], []), 1, 8)
    job = engine.submit(ServerJob(engine.request(**SMALL)))
    with pytest.raises(LdmError, match="the safety checker flagged the image of seed 1: refused"):
        job.result(PATIENCE)
    assert job.status == 422
    engine.close(0)
    made.engine.close(0)


def test_no_replica_has_the_key(finished: dict[str, Any], loading: dict[str, Any]) -> None:
    assert of_replicas(finished) == {**loading, "watermark": True, "safety": finished["safety"]}


def test_the_queue_is_bounded_and_closes(clusters: Any) -> None:
    engine, _ = clusters()
    jobs = [engine.submit(ServerJob(engine.request(**{**SMALL, "steps": 900, "n": 4}))) for _ in range(2)]
    with pytest.raises(NotTakenError, match="at most 8 may"):
        while True:
            jobs.append(engine.submit(ServerJob(engine.request(**{**SMALL, "steps": 900, "n": 4}))))
    assert not engine.close(0)
    assert {job.state for job in jobs} == {FAILED}
    with pytest.raises(NotTakenError, match="the engine is closing"):
        engine.check_open()


def test_replicas_are_watched(clusters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is known; if Ray does not know them any more, the engine says so and takes no jobs."""
    engine, _ = clusters()
    counts = iter([3, 2])
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(cluster, "running_replicas", lambda: next(counts))
    watching = threading.Thread(target=engine.watch, args=[stop := threading.Event()])
    watching.start()
    while not engine.failure:
        time.sleep(0.01)
    stop.set()
    watching.join()
    assert (engine.replicas, engine.most) == (2, 2)
    with pytest.raises(NotTakenError, match="the Ray cluster does not answer"):
        engine.check_open()


def test_shares_of_cpus() -> None:
    assert share([16, 16, 16, 16], 3) == 16 and share([16, 16, 16, 16], 6) == 8
    assert share([2], 2) == 1 and share([0], 3) == 1 and share([4, 12], 2) == 6


def test_paths_do_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    found = absolute({"source": "model", "embeddings": ["model", "owner/name"], "components": {"vae": "model"}, "n": 1})
    place = str(tmp_path / "model")
    assert found == {"source": place, "embeddings": [place, "owner/name"], "components": {"vae": place}, "n": 1}


@pytest.mark.parametrize(
    ("replicas", "address", "found"),
    [
        (None, None, None), ("2", None, (2, 2)), ("1-8", None, (1, 8)), (None, "auto", "needs --replicas"),
        ("0", None, "'0': a number"), ("3-2", None, "'3-2': a number"), ("two", None, "'two': a number"),
        ("1-", None, "'1-': a number"),
    ],
)  # fmt: skip
def test_numbers_of_replicas(
    replicas: str | None, address: str | None, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", {"ray": True}.get)
    given = options({}, replicas=replicas, ray_address=address)
    if isinstance(found, str):
        with pytest.raises(LdmError, match=found):
            replicas_of(given)
        return
    assert replicas_of(given) == found
    monkeypatch.setattr(serve, "find_spec", {}.get)
    if found is not None:
        with pytest.raises(LdmError, match=r"--replicas needs ray: pip install 'ldm\[cluster\]'"):
            replicas_of(given)


def test_the_deployment_in_the_documentation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options and probes are there, and it waits longer than the server takes to finish."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), flags=re.S)
    deployment, service = yaml.safe_load_all(block)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    code, told, _ = run(capsys, monkeypatch, "serve", "--help")
    assert code == 0 and all(word in told for word in container["args"] if word.startswith("--"))
    probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert probes == set(OPEN)
    seconds = float(container["args"][container["args"].index("--drain-seconds") + 1])
    assert pod["terminationGracePeriodSeconds"] >= seconds + FETCH_SECONDS + 5
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]


# --- with Ray ---------------------------------------------------------------------------------------------------------


@dataclass
class RunningCommand:
    """`ldm serve --replicas 2` in processes of its own, with all that a server can have."""

    process: subprocess.Popen[str]
    url: str
    log: list[str]  # lines of stderr

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        return [one for one in self.children() if "EngineReplica" in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def command(finished: dict[str, Any], folder: Path) -> Iterator[RunningCommand]:
    pytest.importorskip("ray")
    arguments = [finished["source"], "--lora-dir", finished["lora_dir"], "--dtype", "fp32", "--port", "0"]
    arguments += ["--watermark", "--safety", finished["safety"], "--c2pa", ",".join(finished["c2pa"])]
    arguments += ["--history", str(folder / "kept"), "--runs", str(folder / "runs"), "--train"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm", "serve", *arguments, "--replicas", "2"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    reading = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reading.start()
    running = RunningCommand(process, process.stdout.readline().strip(), log)
    try:
        if not running.url:
            reading.join()
            if "Ray does not start on this machine" in "".join(log):
                pytest.skip(f"this machine is too busy: {log[-1].strip()}")
        assert running.url.startswith("http://127.0.0.1:"), "".join(log)
        yield running
    finally:
        left = running.children() if process.poll() is None else []
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(left, timeout=30)
        for one in alive:
            one.kill()


@pytest.fixture
def client(command: RunningCommand) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=command.url, timeout=PATIENCE) as found:
        yield found


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def unmarked(image: Image.Image) -> Image.Image:
    """What a watermark does not change of an image: its red."""
    return image.getchannel("R")


def kept(client: httpx2.Client, count: int) -> list[dict[str, Any]]:
    """The images in the history, when there are so many."""
    end = time.monotonic() + PATIENCE
    while (found := client.get("/v1/history", params={"count": 100}).json())["total"] < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    return list(found["images"])


def test_the_interface_is_that_of_one_engine(client: httpx2.Client, finished: dict[str, Any], folder: Path) -> None:
    """The same answers to the same requests, right ones and wrong ones, whatever the interface."""
    wrong = [{**SMALL, "stepps": 3}, {**SMALL, "steps": 999}, {"steps": 2}, {**SMALL, "image": "/etc/passwd0"}, [1]]
    wrong += [{**SMALL, "adapters": {"secret": 1}}, {**SMALL, "clip_skip": 50}, {**SMALL, "width": 65}]
    headers = {"accept": "image/png"}
    prompts = {"prompt": "a fox", "size": "64x64", "steps": 2, "seed": 1, "scheduler": "euler"}
    given = options(finished, history=str(folder / "other"), train=True)
    runs = Runs.at(folder / "runs")
    service = Service(
        Pipeline(**{**finished, "dtype": torch.float32}), finished, Limits(), history=history_of(given), runs=runs,
        trainer=trainer_of(given, runs),
    )  # fmt: skip
    with in_thread(service) as url, httpx2.Client(base_url=url, timeout=PATIENCE) as one:
        for body in wrong:
            answers = [each.post("/v1/jobs", json=body, headers=headers) for each in (one, client)]
            assert answers[0].status_code == answers[1].status_code >= 400
            assert answers[0].json() == answers[1].json()
        for path in ("/v1/settings", "/v1/adapters", "/v1/about", "/v1/models", "/healthz", "/readyz"):
            ours, theirs = one.get(path), client.get(path)
            assert ours.status_code == theirs.status_code == 200, path
            assert path == "/v1/models" or ours.json() == theirs.json()
        for host in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            assert client.post("/v1/jobs", json=SMALL, headers=host).status_code == 403
        found = [each.post("/v1/images/generations", json=prompts).json()["data"][0] for each in (one, client)]
        images = [from_base64(each["b64_json"]) for each in found]
        assert difference(*map(unmarked, images)) <= 1
        assert images[0].info["ldm"] == images[1].info["ldm"]


def test_images_are_finished_once(client: httpx2.Client) -> None:
    """Checked and marked by a replica, signed and kept by the door."""
    flagged = over(client, client.post("/v1/jobs", json={**FLAGGED, "keep": True, "previews": True}))
    assert flagged["state"] == DONE
    assert [note for note in flagged["notes"] if "blurred" in note] == [
        "the safety checker flagged the image of seed 1: blurred"
    ]
    assert sum("watermark" in note for note in flagged["notes"]) == 1
    passed = over(client, client.post("/v1/jobs", json={**SMALL, "keep": True}))
    assert not [note for note in passed["notes"] if "blurred" in note]
    urls = [one["images"][0]["url"] for one in (passed, flagged)]
    for url, said in zip([*urls, *(one["url"] for one in kept(client, 2))], ["passed", "blurred"] * 2, strict=True):
        data = client.get(url).content
        report, (record, _) = read_manifest(data), read_settings(io.BytesIO(data))
        assert report is not None and report.valid and matching_bits(opened(data)) >= LEAST
        assert record is not None and record["safety"] == said and "safety_model" not in record


def test_a_training_beside_replicas(client: httpx2.Client, command: RunningCommand, folder: Path) -> None:
    """It knows no secret of the server's; and a finished adapter is one of those that replicas find."""
    given = {"images": [{"image": in_base64(Image.new("RGB", (32, 32), "red"))}], "trigger": "sks"}
    name = client.post("/v1/runs", json=given).json()["id"]
    end = time.monotonic() + PATIENCE
    while not (trains := [one for one in command.children() if "train-adapter" in one.cmdline()]):
        assert time.monotonic() < end
        time.sleep(0.01)  # a process that has just begun has no command line yet
    assert "PATH" in trains[0].environ() and "RAY_AUTH_TOKEN" not in trains[0].environ()
    assert over(client, client.post("/v1/jobs", json=SMALL))["state"] == DONE
    assert client.get(f"/v1/runs/{name}").json()["state"] == "running"
    assert client.post(f"/v1/runs/{name}/stop").is_success
    while client.get(f"/v1/runs/{name}").json()["state"] == "running":
        time.sleep(0.05)
    stage = folder / "runs" / "made" / "adapter"
    stage.mkdir(parents=True)
    (stage.parent / "config.yaml").write_text("stages: [adapter]\nadapter: {steps: 2}\n")
    (stage / "done.json").write_text('{"steps": 2}')
    shutil.copy(folder / "loras" / "style.safetensors", stage / "adapter.safetensors")
    (made,) = (one["id"] for one in client.get("/v1/runs").json()["runs"] if one["name"] == "made")
    assert client.post(f"/v1/runs/{made}/keep", json={"name": "mine"}).json() == {"name": "mine"}
    wanted = [{**SMALL, "adapters": {one: 0.5}} for one in ("mine", "style")]
    made = [over(client, client.post("/v1/jobs", json=one))["images"][0]["url"] for one in wanted]
    assert difference(*(unmarked(opened(client.get(url).content)) for url in made)) <= 1


def test_jobs_by_name(client: httpx2.Client) -> None:
    """State, events, images and cancellation reach the job, whichever replica makes it."""
    long = [client.post("/v1/jobs", json={**SMALL, "steps": 150, "n": 16}) for _ in range(2)]
    job = client.post("/v1/jobs", json={**SMALL, "n": 2, "previews": True})
    events = client.get(f"{job.headers['location']}/events").text
    assert '"state": "done"' in events.strip().rpartition("\n\n")[2]
    state = client.get(job.headers["location"]).json()
    assert [one["seed"] for one in state["images"]] == [1, 2]
    assert all(client.get(one["url"]).is_success for one in state["images"])
    assert [client.delete(one.headers["location"]).json()["state"] for one in long] == ["cancelled"] * 2
    figures = client.get("/metrics").text
    assert "\nldm_replicas 2.0\n" in figures and "\nldm_running_images 0.0\n" in figures


def test_a_replica_is_killed_under_load(client: httpx2.Client, command: RunningCommand, pipeline: Pipeline) -> None:
    """No request is lost, whether its client waits for the image, reads events, or asks for the state.

    An image that was to be kept is kept once.
    """
    before = len(kept(client, 0))

    def image(seed: int) -> Image.Image:
        settings = {**SMALL, "seed": seed, "steps": 40, "keep": True}
        if seed % 3 == 0:
            return opened(client.post("/v1/jobs", json=settings, headers={"accept": "image/png"}).content)
        answer = client.post("/v1/jobs", json=settings)
        if seed % 3 == 1:
            assert '"state": "done"' in client.get(f"{answer.headers['location']}/events").text
        return opened(client.get(over(client, answer)["images"][0]["url"]).content)

    with ThreadPoolExecutor(18) as threads:
        coming = [threads.submit(image, seed) for seed in range(18)]
        while "\nldm_running_images 0.0\n" in client.get("/metrics").text:
            time.sleep(0.01)
        command.replicas()[0].kill()
        made = [one.result(PATIENCE) for one in coming]
    assert any("it is sent again" in line for line in command.log)
    alone = pipeline(**{**SMALL, "seed": 0, "n": 18, "steps": 40, "batch": 1}).images
    assert max(map(difference, map(unmarked, made), map(unmarked, alone))) <= 2
    found = kept(client, before + 18)
    assert sorted(one["settings"]["seed"] for one in found[:18]) == list(range(18)) and len(found) == before + 18


def test_it_finishes_its_jobs_and_leaves_nothing(client: httpx2.Client, command: RunningCommand) -> None:
    job = client.post("/v1/jobs", json={**SMALL, "steps": 150}).json()
    children = command.children()
    command.process.send_signal(signal.SIGTERM)
    while client.get(f"/v1/jobs/{job['id']}").json()["state"] != DONE:
        time.sleep(0.05)
    assert client.get(f"/v1/jobs/{job['id']}/images/0").content.startswith(b"\x89PNG")
    assert command.process.wait(PATIENCE) == 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
