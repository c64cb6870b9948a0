"""Runs of training as a server shows them: a real one, one that goes on, damaged ones, and ways out of the folder."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tiny
import torch
from PIL import Image
from runs import config, first_run, interrupted, noting
from starlette.testclient import TestClient

from ldm.errors import LdmError
from ldm.evaluation.metrics.comparison import Comparison
from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.pages.page import write_page
from ldm.evaluation.report import Report, Row, Side, Table, save_report
from ldm.server import run_log
from ldm.server.api import make_app
from ldm.server.limits import Limits
from ldm.server.run_log import POINTS, curves, last_lines, thinned
from ldm.server.runs import CONFIG_BYTES, Runs
from ldm.server.service import Service
from ldm.training.run import train
from pipelines import Pipeline

LONG_AGO = 10_000.0  # seconds
FEW = ("base.preview_every=3", "base.validate_every=3")
REPORT = Report(
    sides=(Side("A", "/home/somebody/models/fox", "abc", 20, {"steps": 5}), Side("B", "emoji", "abd", 20)),
    reference=None,
    tables=(
        Table(
            None,
            (
                Row(
                    "psnr", "PSNR", "higher",
                    (Estimate(29.03, 29.03, 0.5, 28.0, 30.0, 20), Estimate(25.0, None, None, None, None, 20, "odd")),
                    Comparison(4.0312, 0.5, 3.0, 5.0, 0.001, 20, None), "A better, p = 0.001",
                ),
            ),
        ),
    ),
    notes=("<script>alert(1)</script>",),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is done, one that was interrupted, and a report."""
    folder = tmp_path_factory.mktemp("runs")
    with first_run():
        train(config(shapes, folder / "done", *FEW), noting([]))
    with first_run():
        interrupted(config(shapes, folder / "half", *FEW), after=4)
    report_in(folder / "done" / "base" / "evaluation" / "step-00000003" / "ema")
    report_in(folder / "compared")
    return folder


def report_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_report(REPORT, folder / "report.json")
    write_page(REPORT, folder)
    return folder


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service(Pipeline(tiny.model("sd15", shallow=True), dtype=torch.float32), {}, Limits(upload=100_000))
    yield made
    made.engine.close(0)


@pytest.fixture
def folder(trained: Path, tmp_path: Path, service: Service) -> Path:
    """A copy of the runs, which the service shows."""
    found = Path(shutil.copytree(trained, tmp_path / "shown"))
    service.runs = Runs.at(found)
    return found


@pytest.fixture
def client(service: Service, folder: Path) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url="http://127.0.0.1") as found:
        yield found


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


def listed(client: TestClient) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in client.get("/v1/runs").json()["runs"]}


def address(client: TestClient, name: str) -> str:
    return f"/v1/runs/{listed(client)[name]['id']}"


def message(client: TestClient, path: str, status: int) -> str:
    answer = client.get(path)
    assert answer.status_code == status, (path, answer.text)
    return str(answer.json()["error"]["message"])


def test_a_run_that_is_done(client: TestClient, folder: Path) -> None:
    place = address(client, "done")
    state = client.get(place).json()
    (stage,) = state["stages"]
    assert (state["state"], stage["state"], stage["step"], stage["steps"]) == ("done", "done", 6, 6)
    assert stage["previews"] == [3, 6] and stage["checkpoint"] == 6 and stage["seconds_left"] is None
    assert stage["images_per_second"] > 0 and "loss/unet" in stage["figures"]
    assert any(name.startswith("validation/") for name in stage["figures"])
    answer = client.get(f"{place}/stages/base/curves").json()
    written = [json.loads(line) for line in (folder / "done" / "base" / "metrics.jsonl").read_text().splitlines()]
    losses = [[row["step"], row["loss/unet"]] for row in written if "loss/unet" in row]
    assert answer["curves"]["loss/unet"] == losses and len(losses) == 6
    assert (answer["damaged"], answer["sampled"]) == (0, False)
    image = client.get(f"{place}/stages/base/previews/3")
    assert image.headers["content-type"] == "image/png" and image.headers["x-content-type-options"] == "nosniff"
    with Image.open(folder / "done" / "base" / "previews" / "step-00000003.png") as wanted:
        assert Image.open(io.BytesIO(image.content)).convert("RGB").tobytes() == wanted.convert("RGB").tobytes()


def test_a_run_goes_on_while_its_files_change(client: TestClient, folder: Path) -> None:
    run = listed(client)["half"]
    (stage,) = run["stages"]
    assert (run["state"], stage["step"], stage["steps"]) == ("running", 4, 6)
    assert stage["seconds_left"] == pytest.approx(2 * 8 / stage["images_per_second"])
    age(folder / "half", LONG_AGO)
    stopped = listed(client)["half"]
    assert stopped["state"] == stopped["stages"][0]["state"] == "stopped" and stopped["quiet"] > LONG_AGO - 1
    assert [*listed(client)][-1] == "half"  # the others changed later
    (folder / "half" / "base" / "evaluation" / "step-00000004" / "ema" / "images").mkdir(parents=True)
    assert listed(client)["half"]["state"] == "running"  # an evaluation makes images, and the log waits
    log = folder / "half" / "base" / "metrics.jsonl"
    age(folder / "half", 400.0)
    assert listed(client)["half"]["state"] == "stopped"
    with log.open("a") as file:
        file.write('{"step": 5, "loss/unet": 1.0, "images_per_s": 0.001}\n')
    age(folder / "half", 400.0)
    assert listed(client)["half"]["state"] == "running"  # of one so slow, nothing was to be expected yet


def test_several_stages(client: TestClient, folder: Path) -> None:
    path = folder / "half" / "config.yaml"
    path.write_text(path.read_text().replace("stages:\n- base", "stages:\n- base\n- refiner"))
    states = [(one["name"], one["state"]) for one in listed(client)["half"]["stages"]]
    assert states == [("base", "running"), ("refiner", "waiting")]


def test_reports(client: TestClient) -> None:
    own, of_run = (client.get(address(client, name)).json()["reports"] for name in ("compared", "done"))
    assert [one["name"] for one in own + of_run] == ["ldm eval", "base, step 3, ema"]
    for name, (report,) in (("compared", own), ("done", of_run)):
        place = f"{address(client, name)}/reports/{report['id']}"
        found = client.get(place).json()
        assert "somebody" not in json.dumps(found) and found["sides"][0]["source"] == "fox"
        (row,) = found["tables"][0]["rows"]
        assert [line["value"] for line in row["lines"]] == ["29.03", "25.00", "4.03"]
        assert row["verdict"] == "A better, p = 0.001" and row["notes"] == ["odd"]
        page = client.get(f"{place}/page")
        (policy,) = page.headers.get_list("content-security-policy")
        assert policy.startswith("sandbox; default-src 'none'") and "script" not in policy.replace("x-script", "")
        assert page.headers["x-content-type-options"] == "nosniff" and "PSNR" in page.text


def test_names_of_requests_are_no_paths(client: TestClient, folder: Path) -> None:
    place = address(client, "done")
    report = client.get(place).json()["reports"][0]["id"]
    (folder.parent / "config.yaml").write_text("stages: [base]")
    for odd in ("%2e%2e", "done", str(folder), "../shown/done", "%00", "\0", "x" * 5000):
        name = odd if odd.startswith("%") else quote(odd, safe="")
        paths = (
            f"/v1/runs/{name}", f"/v1/runs/{name}/stages/base/curves", f"{place}/stages/{name}/curves",
            f"{place}/stages/{name}/previews/3", f"{place}/stages/base/previews/{name}", f"{place}/reports/{name}",
            f"{place}/reports/{name}/page", f"/v1/runs/{name}/reports/{report}/page",
        )  # fmt: skip
        for path in paths:
            assert client.get(path).status_code == 404, path
    for step in ("-3", "4", "x", str(10**40)):
        assert client.get(f"{place}/stages/base/previews/{step}").status_code == 404
    assert "no such image" in message(client, f"{place}/stages/base/sheet", 404)


def test_links_out_of_the_folder_are_not_followed(client: TestClient, folder: Path, tmp_path: Path) -> None:
    secret = Path(shutil.copytree(folder / "done", tmp_path / "secret"))
    report_in(secret)
    (folder / "link").symlink_to(secret)
    assert "link" not in listed(client)
    inner = folder / "done" / "base"
    place = address(client, "done")
    (report,) = client.get(place).json()["reports"]
    for name in ("metrics.jsonl", "previews", "evaluation", "done.json", "checkpoints"):
        place_of = inner / name
        shutil.rmtree(place_of) if place_of.is_dir() else place_of.unlink()
        place_of.symlink_to(secret / "base" / name)
    (inner / "sheet.png").symlink_to(secret / "base" / "previews" / "step-00000003.png")
    state = client.get(place).json()
    (stage,) = state["stages"]
    assert (stage["state"], stage["step"], stage["previews"], stage["checkpoint"]) == ("running", 0, [], None)
    assert state["reports"] == [] and not stage["sheet"] and stage["log"] == 0
    assert client.get(f"{place}/stages/base/curves").json()["curves"] == {}
    for path in ("stages/base/previews/3", "stages/base/sheet", f"reports/{report['id']}/page"):
        assert client.get(f"{place}/{path}").status_code == 404
    (folder / "done" / "config.yaml").unlink()
    (folder / "done" / "config.yaml").symlink_to(secret / "config.yaml")
    assert "done" not in listed(client)


def test_what_is_no_file_is_not_opened(client: TestClient, folder: Path) -> None:
    """A pipe would wait for a writer for ever."""
    log = folder / "half" / "base" / "metrics.jsonl"
    log.unlink()
    os.mkfifo(log)
    os.mkfifo(folder / "half" / "base" / "sheet.png")
    assert listed(client)["half"]["stages"][0]["step"] == 0
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "config.yaml")
    assert "pipe" not in listed(client)


def test_damaged_lines_are_counted(client: TestClient, folder: Path) -> None:
    log = folder / "half" / "base" / "metrics.jsonl"
    before = len(log.read_text().splitlines())
    with log.open("ab") as file:
        for line in (
            b"\xff\xfe", b"{", b"[" * 10_000, b"[]", b'{"step": "1"}', b'{"step": true, "a": 1}', b'{"step": -1}',
            b'{"step": 1e99}', b"x" * 100_000, b"",
        ):  # fmt: skip
            file.write(line + b"\n")
        file.write(
            b'{"step": 5, "loss/unet": NaN, "kl": Infinity, "a b": 1, "s": "x", "big": %s, "ok": 2}\n' % (b"9" * 400)
        )
        file.write(b'{"step": 6, "loss/unet": 0.')  # is being written
    place = address(client, "half")
    found = client.get(f"{place}/stages/base/curves").json()
    assert found["damaged"] == 10 and found["curves"]["ok"] == [[5, 2.0]]
    assert not {"kl", "a b", "s", "big"} & found["curves"].keys() and found["curves"]["loss/unet"][-1][0] == 4
    assert client.get(place).json()["stages"][0]["step"] == 5 and before == 5


class Counted(io.BytesIO):
    """A file that counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.count += len(found)
        return found


def test_a_huge_log_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"step": %d, "loss/unet": 0.%05d, "more": "                "}\n'
    data = b"".join(line % (step, step % 99_999) for step in range(100_000))
    monkeypatch.setattr(run_log, "WHOLE", 2**20)
    monkeypatch.setattr(run_log, "PIECE", 2**10)
    monkeypatch.setattr(run_log, "TAIL", 2**14)
    file = Counted(data)
    found = curves(file)
    points = found.points["loss/unet"]
    assert found.sampled and found.damaged == 0 and file.count < len(data) / 6
    assert points[0][0] < 100 and points[-1][0] == 99_999 and len(points) <= POINTS
    steps = [step for step, _ in points]
    assert steps == sorted(steps) and max(b - a for a, b in itertools.pairwise(steps)) < 1000
    assert [one.step for one in last_lines(file)][-2:] == [99_998, 99_999]
    assert last_lines(io.BytesIO(b"")) == [] and curves(io.BytesIO(b"no line")).damaged == 0


@pytest.mark.parametrize("count", [1, 2, POINTS, POINTS + 1, POINTS + 2, 20_000])
def test_thinned_curves_keep_their_extremes(count: int) -> None:
    points = [(step, float(step * 7919 % 1009)) for step in range(count)]
    found = thinned(points)
    values = [value for _, value in points[1:-1]] or [0.0]
    assert len(found) <= POINTS and found[0] == points[0] and found[-1] == points[-1] and found == sorted(set(found))
    assert {min(values), max(values)} <= {value for _, value in found} | {0.0}


def test_images_that_cannot_be_shown(client: TestClient, folder: Path) -> None:
    previews = folder / "half" / "base" / "previews"
    previews.mkdir(exist_ok=True)
    whole = (folder / "done" / "base" / "previews" / "step-00000003.png").read_bytes()
    (previews / "step-00000007.png").write_bytes(whole[:100])
    Image.new("RGB", (1000, 500)).save(previews / "step-00000008.png")
    Image.new("RGB", (400, 300)).save(previews / "step-00000010.png")
    Image.new("RGB", (8, 8)).save(previews / "step-00000009.png", "GIF")
    (previews / "other.png").write_bytes(whole)
    place = f"{address(client, 'half')}/stages/base/previews"
    assert "damaged" in message(client, f"{place}/7", 422)
    assert "1000×500 pixels" in message(client, f"{place}/8", 422)
    width, height = Image.open(io.BytesIO(client.get(f"{place}/10").content)).size
    assert 98_000 < width * height <= 100_000 and width / height == pytest.approx(4 / 3, rel=0.01)
    assert "damaged" in message(client, f"{place}/9", 422)


def test_files_of_other_versions(client: TestClient, folder: Path) -> None:
    path, stage = folder / "half" / "config.yaml", folder / "half" / "base"
    later = path.read_text().replace("base:\n", "base:\n  sparkle: 5\n").replace("stages:", "glitter: {}\nstages:")
    path.write_text(later)
    assert [(one["steps"], one["step"]) for one in listed(client)["half"]["stages"]] == [(6, 4)]
    for text in (
        "", "[]", "stages: 5", "stages: [5]", "a: [", "\ud800".encode("utf-8", "surrogatepass"), "a: &a [*a]",
        "[" * 5000, "#" * (CONFIG_BYTES + 1), "!!python/object/apply:os.system ['true']",
    ):  # fmt: skip
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        (found,) = listed(client)["half"]["stages"]
        assert (found["name"], found["steps"], found["seconds_left"]) == ("base", None, None), text
    path.write_text("stages: [base, '../..', /etc, base]\nbase: {steps: many}")
    assert [one["name"] for one in listed(client)["half"]["stages"]] == ["base"]
    for text in ("{", "[]", '{"steps": []}', '{"steps": "x"}', "{}"):
        (stage / "done.json").write_text(text)
        assert listed(client)["half"]["state"] == "running"
    (stage / "done.json").write_text('{"steps": 6, "sparkle": 1}')
    assert listed(client)["half"]["state"] == "done"


@pytest.mark.parametrize(
    "change",
    [
        {"tables": 5}, {"sides": [{}]}, {"sides": None}, {"tables": [{"rows": [{"metric": "psnr"}]}]}, {"notes": 5},
        {"tables": [{"extractor": 5, "rows": []}]}, {"reference": []},
    ],
)  # fmt: skip
def test_reports_of_other_versions(change: dict[str, Any], client: TestClient, folder: Path) -> None:
    path = folder / "compared" / "report.json"
    (report,) = client.get(address(client, "compared")).json()["reports"]
    content = json.loads(path.read_text())
    place = f"{address(client, 'compared')}/reports/{report['id']}"
    content["tables"][0]["rows"][0]["estimates"][0]["sparkle"] = 5
    path.write_text(json.dumps({**content, "more": 1}))
    assert client.get(place).status_code == 200
    path.write_text(json.dumps({**content, **change}))
    assert "of another version" in message(client, place, 422)
    path.write_text("[" * 50_000)
    assert "not valid JSON" in message(client, place, 422)
    (folder / "compared" / "report.html").unlink()
    assert "no report.html" in message(client, f"{place}/page", 422)


def test_only_servers_that_were_asked_to(client: TestClient, service: Service, folder: Path, tmp_path: Path) -> None:
    assert client.get("/v1/about").json()["runs"] is True
    with TestClient(make_app(service, "hunter-22"), base_url="http://127.0.0.1") as strange:
        assert strange.get("/v1/runs").status_code == 401
    service.runs = None
    assert "--runs FOLDER" in message(client, "/v1/runs", 404) and client.get("/v1/about").json()["runs"] is False
    with pytest.raises(LdmError, match="is no folder"):
        Runs.at(tmp_path / "nowhere")
