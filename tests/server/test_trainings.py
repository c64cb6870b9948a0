"""Adapters trained for visitors: a real one from upload to use; one at a time, stopped, refused; a server killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import tiny
import torch
from images import in_base64
from launched import PATIENCE, aged, killed
from PIL import Image
from servers import options
from starlette.testclient import TestClient

from ldm.cli.serve import trainer_of, training_command
from ldm.errors import LdmError
from ldm.server import trainings
from ldm.server.api import make_app
from ldm.server.engine import NotTakenError
from ldm.server.limits import Limits
from ldm.server.runs import LOG, RunFolder, Runs
from ldm.server.service import Service
from ldm.server.serving import Listening, serve
from ldm.server.training_process import FILE, left_behind
from ldm.server.trainings import Trainer, TrainingOrder
from ldm.server.uploads import RequestUploads, Uploads
from pipelines import Pipeline

QUICK = """
import ldm.cli.train_adapter as door
from ldm.cli.main import main

door.WEIGHTS = (1.0,)  # of the sheet
main()
"""
SLOW = "import time; print('begins', flush=True); time.sleep(600)"


class StandIn:
    """In place of `ldm train-adapter`: a program of a few words, which notes what it was asked for."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.orders: list[TrainingOrder] = []

    def __call__(self, order: TrainingOrder, images: Path, output: Path) -> Sequence[str]:
        self.orders.append(order)
        return [sys.executable, "-c", self.code, str(output)]


def image(size: tuple[int, int] = (32, 32), kind: str = "PNG", **more: Any) -> str:
    return in_base64(Image.new("RGB", size, "red"), kind, **more)


def order(count: int = 2, **more: Any) -> dict[str, Any]:
    return {"images": [{"image": image(), "caption": ""} for _ in range(count)], "trigger": "sks", **more}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("loras")
    return Pipeline(tiny.model("sd15", shallow=True), lora_dir=folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def service(pipeline: Pipeline) -> Iterator[Service]:
    made = Service(pipeline, {}, Limits(upload=30_000))
    yield made
    made.engine.close(0)


@pytest.fixture
def trainer(service: Service, tmp_path: Path) -> Iterator[Trainer]:
    (tmp_path / "runs").mkdir()
    service.runs = Runs.at(tmp_path / "runs")
    service.trainer = made = Trainer(service.runs, StandIn("print('nothing')"), service.folder)
    yield made
    made.close()
    service.runs = service.trainer = None


@pytest.fixture
def client(service: Service, trainer: Trainer) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url="http://127.0.0.1") as found:
        yield found


def state(client: TestClient, name: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/runs/{name}").json())


def over(client: TestClient, name: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    while (found := state(client, name))["stops"]:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def begun(client: TestClient, given: dict[str, Any]) -> str:
    answer = client.post("/v1/runs", json=given)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_a_training_from_upload_to_use(client: TestClient, trainer: Trainer, models: Path, service: Service) -> None:
    few = ["data.upscale=4", "data.workers=0", "data.crops=1"]

    def command(order: TrainingOrder, images: Path, output: Path) -> list[str]:
        own = training_command({"source": str(models / "sd15")}, order, images, output)
        return [own[0], "-c", QUICK, *own[3:], *few]

    trainer.command = command
    name = begun(client, order(steps=2, rank=2))
    found = over(client, name)
    said = "\n".join(found["said"])
    assert found["state"] == "done" and found["adapter"], said
    assert "2 images: ldm train" in said and str(models) not in said and str(trainer.runs.folder) not in said
    (stage,) = found["stages"]
    assert (stage["name"], stage["step"], stage["steps"], stage["sheet"]) == ("adapter", 2, 2, True)
    place = f"/v1/runs/{name}"
    assert client.get(f"{place}/stages/adapter/sheet").headers["content-type"] == "image/png"
    file = client.get(f"{place}/adapter")
    assert int(file.headers["content-length"]) == len(file.content) > 1000
    assert client.post(f"{place}/keep", json={"name": "mine"}).json() == {"name": "mine"}
    assert service.folder is not None and (service.folder / "mine.safetensors").read_bytes() == file.content
    assert "mine" in client.get("/v1/adapters").json()
    job = service.accept({"prompt": "sks <lora:mine:1>", "size": "64", "steps": 2})
    job.result(60)
    assert job.state == "done"
    again = client.post(f"{place}/keep", json={"name": "mine"})
    assert again.status_code == 422 and "already" in again.text
    for odd in ("../mine", "a/b", "", ".hidden", "a" * 65, "a\n", "a.", None, 5, "a\0b", "/etc/a"):
        assert client.post(f"{place}/keep", json={"name": odd}).status_code == 422, odd
    assert [path.name for path in service.folder.iterdir()] == ["mine.safetensors"]


def test_images_are_written_anew(client: TestClient, trainer: Trainer) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"  # to be turned; a description
    given = order(1, trigger="")
    given["images"] = [{"image": image((40, 20), kind="JPEG", exif=exif), "caption": "a red thing"}]
    name = begun(client, given)
    over(client, name)
    (folder,) = trainer.runs.folder.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["001.png", "001.txt"]
    data = (folder / "images" / "001.png").read_bytes()
    assert Image.open(io.BytesIO(data)).size == (20, 40) and b"where I live" not in data
    assert (folder / "images" / "001.txt").read_text() == "a red thing"
    assert trainer.command.orders == [TrainingOrder("lora", "", "", None, None)]  # type: ignore[attr-defined]


def test_one_at_a_time_until_it_is_stopped(
    client: TestClient, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LDM_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "hunter-22")
    trainer.command = StandIn(
        "import os; assert 'hunter-22' not in os.environ.values(); assert os.getsid(0) == os.getpid();" + SLOW
    )
    name = begun(client, order())
    end = time.monotonic() + PATIENCE
    while not (found := state(client, name))["said"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert found["state"] == "running" and found["stops"] and found["said"] == ["begins"]
    assert client.get("/v1/runs").json()["runs"][0]["state"] == "running"
    busy = client.post("/v1/runs", json=order())
    assert busy.status_code == 503 and "another adapter is being trained" in busy.text
    assert client.post(f"/v1/runs/{name}/stop").status_code == 204
    assert over(client, name)["state"] == "stopped"
    assert client.post(f"/v1/runs/{name}/stop").status_code == 409
    trainer.command = StandIn("print('\\x1b[1mldm: /home/me/loras/a: a wrong line'); raise SystemExit(1)")
    failed = over(client, begun(client, order()))
    assert failed["state"] == "failed" and failed["said"] == ["[1mldm: …/a: a wrong line"] and not failed["adapter"]
    keep = client.post(f"/v1/runs/{failed['id']}/keep", json={"name": "x"})
    assert keep.status_code == 422 and "no finished adapter" in keep.text
    assert client.get(f"/v1/runs/{failed['id']}/adapter").status_code == 404


def test_a_server_that_ends_ends_its_training(client: TestClient, trainer: Trainer) -> None:
    trainer.command = StandIn(SLOW)
    name = begun(client, order())
    trainer.close()
    assert state(client, name)["state"] == "stopped"


def serving(pipeline: Pipeline, runs: Runs, said: Path) -> None:
    """A server that trains, which says its address in a file."""
    sys.stdout = said.open("w")
    service = Service(pipeline, {}, Limits(), runs=runs, trainer=Trainer(runs, StandIn(SLOW), None))
    serve(service, Listening("127.0.0.1", 0, "", (), 1.0, False))


def test_a_server_that_is_killed_leaves_its_training_to_the_next(pipeline: Pipeline, tmp_path: Path) -> None:
    """Which shows it, trains no other one beside it, and stops it."""
    (tmp_path / "runs").mkdir()
    runs, said, end = Runs.at(tmp_path / "runs"), tmp_path / "said", time.monotonic() + PATIENCE
    server = multiprocessing.get_context("fork").Process(target=serving, args=(pipeline, runs, said))
    server.start()
    try:
        while not said.exists() or not said.read_text().endswith("\n"):
            assert time.monotonic() < end and server.is_alive()
            time.sleep(0.01)
        with httpx2.Client(base_url=said.read_text().strip(), timeout=PATIENCE) as client:
            name = client.post("/v1/runs", json=order()).json()["id"]
            run = runs.run(name)
            while not client.get(f"/v1/runs/{name}").json()["said"]:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert run is not None and left_behind(run) is None  # it has a server
    finally:
        server.kill()
        server.join()
    found = Trainer(runs, StandIn(SLOW), None)
    assert found.state(run) == "running"
    other = Trainer(runs, StandIn(SLOW), None)
    assert other.state(run) is None and not other.stop(run)
    other.close()
    with pytest.raises(NotTakenError, match="another adapter is being trained"):
        found.begin(order(), RequestUploads(Uploads(), Limits()))
    assert found.stop(run)
    while found.state(run) == "running":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert found.state(run) == "stopped" and not found.stop(run)
    assert Trainer(runs, StandIn(SLOW), None).state(run) is None


def test_images_of_a_server_that_is_killed_before_it_trains_are_removed(tmp_path: Path) -> None:
    runs = Runs.at(tmp_path)

    def begin() -> None:
        trainings.claimed = lambda folder: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]
        Trainer(runs, StandIn(SLOW), None).begin(order(), RequestUploads(Uploads(), Limits()))

    killed(begin)
    (left,) = tmp_path.iterdir()
    assert len(list(left.rglob("*.png"))) == 2 and not runs.all()
    Trainer(runs, StandIn(SLOW), None)
    assert left.exists()  # another server may be about to train with them
    aged(left)
    Trainer(runs, StandIn(SLOW), None)
    assert not left.exists()


def test_a_server_that_ends_ends_what_it_took_up(trainer: Trainer, service: Service) -> None:
    trainer.command = StandIn("import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));" + SLOW)
    with service.uploading() as share:
        run = trainer.begin(order(), share)
    number = json.loads((run.path / FILE).read_text())["pid"]
    while not run.said():
        time.sleep(0.01)
    trainer._processes[run].release()  # as the end of a server does
    again = Trainer(trainer.runs, trainer.command, None)
    assert again.state(run) == trainer.state(run) == "running"
    again.close()
    assert again.state(run) == "stopped" and trainer.state(run) == "done" and not psutil.pid_exists(number)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "1"}', '{"pid": -5}', '{"pid": null}', "here", "gone"])
def test_what_names_no_training_is_none(content: str, tmp_path: Path) -> None:
    """A damaged file, or the number of a process that came later."""
    run = RunFolder(tmp_path, tmp_path / "run")
    run.path.mkdir()
    numbers = {"here": os.getpid(), "gone": 2**22 + 1}
    text = json.dumps({"pid": numbers[content]}) if content in numbers else content
    (run.path / FILE).write_text(text)
    assert left_behind(run) is None
    (run.path / FILE).unlink()
    os.mkfifo(run.path / FILE)
    assert left_behind(run) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "1 to 64 is needed"),
        ({"images": [{"image": "x"}] * 65}, "1 to 64 is needed"),
        ({"images": ["x"]}, "image 1: an object"),
        ({"images": [{"image": "no image"}]}, "not in base64"),
        ({"images": [{"image": image((300, 200))}]}, "at most 30,000"),
        ({"images": [{"image": image(kind="GIF")}]}, "none of these"),
        ({"images": [{"image": image(), "caption": "a\nb"}]}, "caption: a text of one line"),
        ({"trigger": ""}, "a word for what is learned"),
        ({"trigger": "x" * 201}, "trigger: a text"),
        ({"trigger": 5}, "trigger: a text"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"rank": 10**9}, "rank is 1000000000"),
        ({"output": "/tmp/x"}, "output is not known"),
        ({"kind": "../x"}, "is not known"),
        ({"kind": "textual-inversion", "class_prompt": "a dog"}, "is for a LoRA"),
        ({"kind": "textual-inversion", "rank": 4}, "is for a LoRA"),
    ],
)
def test_what_is_refused_leaves_nothing(
    change: dict[str, Any], message: str, client: TestClient, trainer: Trainer, service: Service
) -> None:
    trainer.command = lambda *given: training_command({}, *given)
    answer = client.post("/v1/runs", json={**order(), **change})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    assert list(trainer.runs.folder.iterdir()) == [] and service.uploads.pixels == 0


def test_the_program(tmp_path: Path) -> None:
    wanted = TrainingOrder("lora", "--model=x $(true)", "a dog", 5, 4)
    argv = training_command({"source": "m.safetensors", "family": "sd2"}, wanted, tmp_path / "images", tmp_path)
    assert argv[1:4] == ["-m", "ldm", "train-adapter"] and "--trigger=--model=x $(true)" in argv
    own = argv[argv.index("--") + 1 :]
    assert own == [str(tmp_path / "images"), "trackers=[]", "adapter.steps=5", "adapter.rank=4", "model.family=sd2"]


def test_only_servers_that_were_asked_to(
    client: TestClient, service: Service, tmp_path: Path, trainer: Trainer
) -> None:
    assert {"trains": True, "keeps": True}.items() <= client.get("/v1/about").json().items()
    with TestClient(make_app(service, "hunter-22"), base_url="http://127.0.0.1") as strange:
        assert strange.post("/v1/runs", json=order()).status_code == 401
    service.trainer = None
    answer = client.post("/v1/runs", json=order())
    assert answer.status_code == 404 and "--train" in answer.text
    runs = Runs.at(tmp_path)
    with pytest.raises(LdmError, match="name the folder for them"):
        trainer_of(options({}, train=True), None)
    with pytest.raises(LdmError, match="serve it without components"):
        trainer_of(options({"components": {"vae": "x"}}, train=True), runs)
    made = trainer_of(options({"lora_dir": str(tmp_path)}, train=True), runs)
    assert made is not None and made.adapters == tmp_path
    assert trainer_of(options({}), runs) is None
    assert json.dumps(client.get("/v1/about").json()["trains"]) == "false" and LOG == "train.log"
