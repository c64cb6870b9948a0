"""What happens to finished images: watermark, safety checker and signature, by pipeline, command and server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safety
import tiny
import torch
from certificates import certificate
from commands import run
from PIL import Image
from servers import noting
from starlette.testclient import TestClient

from ldm.errors import LdmError
from ldm.images import read_settings
from ldm.server.api import make_app
from ldm.server.history import History
from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.signing import read_manifest
from ldm.watermark import LEAST, matching_bits
from ldm.weights.safety_checker import SafetyChecker
from pipelines import Pipeline
from pipelines.finishing import FlaggedError

CALL: dict[str, Any] = {"steps": 2, "seed": 1, "size": "64", "scheduler": "euler"}
OPTIONS = ["--device", "cpu", "--dtype", "fp32", "--steps", "2", "--size", "64", "--seed", "1", "--scheduler", "euler"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a checker that passes all images, one that flags all, and a certificate."""
    root = tmp_path_factory.mktemp("finishing")
    tiny.model("sd15", shallow=True).save_pretrained(root / "model")
    safety.saved(root / "passes", 2.0)
    safety.saved(root / "flags", -2.0)
    certificate(root)
    return root


def loaded(folder: Path, **more: Any) -> Pipeline:
    return Pipeline(folder / "model", dtype=torch.float32, **more)


def detail(image: Image.Image) -> float:
    """The mean difference of neighbouring pixels."""
    return float(np.abs(np.diff(np.asarray(image, float), axis=1)).mean())


def test_watermark(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    marked = loaded(folder, add_watermarker=True)
    result = marked("a fox", **CALL)
    assert matching_bits(result.images[0]) >= LEAST and result.settings[0]["watermark"] is True
    assert "other programs from 256×256 on" in caplog.text
    plain = loaded(folder)("a fox", **CALL)
    assert "watermark" not in plain.settings[0] and matching_bits(plain.images[0]) < LEAST
    with pytest.raises(LdmError, match="images of 40×64 pixels have no room for it"):
        loaded(folder, watermark=True)("a fox", **{**CALL, "size": "40x64"})
    with pytest.raises(LdmError, match="output 'latents': they would have no watermark"):
        marked("a fox", output="latents", **CALL)


def test_flagged_images_are_blurred(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = loaded(folder)("a fox", **CALL).images[0]
    passed = loaded(folder, safety=folder / "passes")("a fox", **CALL)
    assert passed.images[0].tobytes() == plain.tobytes() and passed.settings[0]["safety"] == "passed"
    assert not caplog.text
    checked = loaded(folder, safety_checker=folder / "flags")
    previews: list[Image.Image] = []
    made = checked("a fox", on_step=lambda step: previews.extend(checked.preview(step)), **CALL)
    assert made.settings[0]["safety"] == "blurred" and "the image of seed 1: blurred" in caplog.text
    assert detail(made.images[0]) < detail(plain) / 10
    assert len(previews) == 2 and all(detail(one) < detail(plain) / 2 for one in previews)
    with pytest.raises(LdmError, match="no safety checker looks at them"):
        checked("a fox", output="latents", **CALL)
    with pytest.raises(LdmError, match="safety_action 'hide': blur or refuse is needed"):
        loaded(folder, safety=folder / "flags", safety_action="hide")


def test_refused_images_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loaded(folder, safety=folder / "passes", safety_action="refuse")
    monkeypatch.setattr(SafetyChecker, "flagged", lambda _, images: [place == 1 for place in range(len(images))])
    made = []
    with pytest.raises(FlaggedError, match=r"flagged the image of seed 2: refused"):
        made.extend(pipeline.stream("a fox", n=3, batch=3, **CALL))
    assert [one.rows for one in made] == [range(1), range(2, 3)]
    assert [one.settings[0]["seed"] for one in made] == [1, 3] and all(len(one.images) == 1 for one in made)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = ["--model", folder / "model", *OPTIONS, "--watermark", "--c2pa", f"{folder}/chain.pem,{folder}/key.pem"]
    opened: list[Path] = []

    def read(path: Path) -> bytes:
        opened.append(Path(path))
        return Path(path).read_bytes()

    monkeypatch.setattr("ldm.signing._read", read)
    code, out, _ = run(capsys, monkeypatch, "generate", "a fox", *options, "--safety", folder / "flags", "--grid")
    assert code == 0 and "the image of seed 1: blurred" in caplog.text
    assert opened == [folder / "chain.pem", folder / "key.pem"]  # once, as they may be pipes
    file, sheet = out.split()
    for path in (file, sheet):
        said = json.loads(run(capsys, monkeypatch, "info", path, "--json")[1])
        assert said["watermark"].startswith("SDXL's, 4") and said["c2pa"].startswith("valid: signed by Signer, Studio")
    record, _ = read_settings(Path(file))
    assert record is not None and record["safety_model"] == str(folder / "flags") and record["safety"] == "blurred"
    assert run(capsys, monkeypatch, "info", file)[1].count("blurred") == 1
    assert run(capsys, monkeypatch, "repro", file, "--device", "cpu")[1].startswith("identical")
    plain = Path(tmp_path / "plain.png")
    code, _, _ = run(capsys, monkeypatch, "generate", "a fox", "--model", folder / "model", *OPTIONS, "--out", plain)
    said = json.loads(run(capsys, monkeypatch, "info", plain, "--json")[1])
    assert code == 0 and said["watermark"].startswith("none found (") and said["c2pa"] == "none"
    err = run(capsys, monkeypatch, "info", plain, "--verify")[2]
    assert err == f"ldm: {plain} is an image, not a model: leave the other options out\n"


def test_a_list_goes_on_after_a_refused_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SafetyChecker, "flagged", lambda _, images: [image.width == 64 for image in images])
    Path("p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "width": 72}\n')
    options = ["--model", folder / "model", *OPTIONS, "--safety", folder / "passes", "--safety-action", "refuse"]
    code, out, err = run(capsys, monkeypatch, "generate", "--prompts", "p.jsonl", *options)
    assert (code, err) == (1, "ldm: the safety checker flagged the image of seed 1: refused\n")
    assert [Image.open(path).width for path in out.split()] == [72]


def test_a_sheet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lacks the cell whose image is refused, and has a watermark and a signature of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SafetyChecker, "flagged", lambda _, images: [image.width == 64 for image in images])
    options = ["--model", folder / "model", *OPTIONS[:6], "--seed", "1", "--watermark", "--out", "s.png"]
    options += ["--c2pa", f"{folder}/chain.pem,{folder}/key.pem", "--safety", folder / "passes"]
    axes = ["--xy", "size=64,72", "safety-action=refuse,blur"]
    code, out, err = run(capsys, monkeypatch, "generate", "a fox", *options, *axes)
    assert (code, out) == (1, "s.png\n")
    assert err.splitlines()[-2:] == [
        "ldm: the sheet has 3 of 4 images",
        "ldm: the safety checker flagged the image of seed 1: refused",
    ]
    record, parameters = read_settings(Path("s.png"))
    assert record is not None and record["watermark"] and parameters == ""
    assert [one and one["safety"] for one in record["xy"]["cells"]] == [None, "passed", "blurred", "passed"]
    said = json.loads(run(capsys, monkeypatch, "info", "s.png", "--json")[1])
    assert said["watermark"].startswith("SDXL's, 4") and said["c2pa"].startswith("valid: signed by Signer, Studio")
    assert run(capsys, monkeypatch, "repro", "s.png", "--device", "cpu")[1].startswith("identical")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--xy", "c2pa=a,b"], "--xy c2pa is not taken here: a sheet and its images are signed by one"),
        (["--xy", "watermark=maybe"], "--xy watermark 'maybe': true or false is needed"),
        (["--c2pa", "a.pem,b.pem"], "c2pa a.pem cannot be read: No such file or directory"),
        (["--c2pa", "a.pem"], "--c2pa ('a.pem',): two files, a certificate chain and its private key, is needed"),
        (["--safety", "nowhere"], "nowhere does not exist; give a safety checker's folder or Hub name"),
        (["--safety-action", "refuse"], "safety_action without a safety checker"),
    ],
)
def test_what_is_missing_is_said_first(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.pipeline.Tuning.load", lambda *_: pytest.fail("the model was loaded"))
    code, out, err = run(capsys, monkeypatch, "generate", "a fox", *options)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(f"ldm: {message}")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    loading = {"source": str(folder / "model"), "watermark": True, "safety": str(folder / "flags")}
    signing = {"c2pa": (folder / "chain.pem", folder / "key.pem")}
    pipeline = Pipeline(**loading, **signing, dtype=torch.float32)
    made = Service(pipeline, loading, Limits(), history=History(folder / "kept"))
    yield made
    made.engine.close(0)


def check_served(data: bytes) -> None:
    report = read_manifest(data)
    assert report is not None and report.valid
    with Image.open(io.BytesIO(data)) as image:
        assert matching_bits(image) >= LEAST and detail(image.convert("RGB")) < 3


def test_a_server(service: Service) -> None:
    """Its answers to all clients, and what it keeps, are finished alike, and no request changes that."""
    with noting(), TestClient(make_app(service), base_url="http://127.0.0.1:7860") as client:
        job = client.post("/v1/jobs", json={"prompt": "a fox", **CALL, "keep": True}).json()
        service.jobs[job["id"]].over.wait(60)
        state = client.get(f"/v1/jobs/{job['id']}").json()
        assert state["state"] == "done" and any("blurred" in note for note in state["notes"])
        data = client.get(f"/v1/jobs/{job['id']}/images/0").content
        check_served(data)
        record, _ = read_settings(io.BytesIO(data))
        assert record is not None and record["safety"] == "blurred" and "safety_model" not in record
        theirs = client.post("/sdapi/v1/txt2img", json={"prompt": "a fox", "width": 64, "height": 64, "steps": 2})
        check_served(base64.b64decode(theirs.json()["images"][0]))
        assert any("blurred" in note for note in json.loads(theirs.json()["info"])["notes"])
        body = {"prompt": "a fox", "size": "64x64", "steps": 2}
        ours = client.post("/v1/images/generations", json=body).json()
        check_served(base64.b64decode(ours["data"][0]["b64_json"]))
        assert any("blurred" in note for note in ours["notes"])
        for kind in ("jpeg", "webp"):
            found = client.post("/v1/images/generations", json={**body, "output_format": kind}).json()
            report = read_manifest(base64.b64decode(found["data"][0]["b64_json"]))
            assert report is not None and report.valid
        for name, value in (("watermark", False), ("safety", ""), ("safety_action", "blur"), ("c2pa", "a,b")):
            answer = client.post("/v1/jobs", json={"prompt": "a fox", name: value})
            assert answer.status_code == 400 and name in answer.text
        assert service.history is not None
        service.history.close()
        (kept,), _ = service.history.find()
        check_served(service.history.image(kept.id) or b"")


def test_a_server_refuses(folder: Path) -> None:
    pipeline = loaded(folder, safety=folder / "flags", safety_action="refuse")
    service = Service(pipeline, {}, Limits())
    with TestClient(make_app(service), base_url="http://127.0.0.1:7860") as client:
        asked = {"prompt": "a fox", **CALL}
        answer = client.post("/v1/jobs", json=asked, headers={"Accept": "image/png"})
        assert answer.status_code == 422 and "flagged the image of seed 1: refused" in answer.text
    service.engine.close(0)
