"""What the page needs of the server: its files, settings read back from images, condition images; and the package."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import adapter_files
import pytest
import tiny
import torch
from images import in_base64
from modules import ROOT
from PIL import Image, PngImagePlugin
from servers import SMALL, noting
from setuptools import Distribution
from starlette.testclient import TestClient

from ldm.server.api import make_app
from ldm.server.limits import Limits
from ldm.server.page_files import FOLDER, page_files
from ldm.server.service import Service
from pipelines import Pipeline


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("loras")
    model = tiny.model("sd15", shallow=True)
    adapter_files.saved(adapter_files.adapter(model, "kohya"), folder / "inner" / "style.safetensors")
    made = Service(Pipeline(model, lora_dir=folder, dtype=torch.float32), {}, Limits(upload=10_000))
    with noting():
        yield made
    made.engine.close(0)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url="http://127.0.0.1:7860") as found:
        yield found


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(image: Image.Image, **texts: str) -> str:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    return in_base64(image, pnginfo=info)


def read_back(client: TestClient, image: str) -> dict[str, Any]:
    answer = client.post("/v1/info", json={"image": image})
    return {"status": answer.status_code, **answer.json()}


def test_files_need_no_key_and_load_nothing_from_elsewhere(service: Service) -> None:
    with TestClient(make_app(service, "hunter-22"), base_url="http://127.0.0.1") as client:
        assert client.get("/v1/about").status_code == 401
        assert client.get("/page/").status_code == client.get("/page/../api.py").status_code == 401
        for path in page_files():
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers.get_list("content-security-policy")
            assert len(policy) == 1 and "default-src 'self'" in policy[0] and "unsafe" not in policy[0]
            assert answer.headers.get_list("cache-control") == ["no-cache"]
            again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert again.status_code == 304 and not again.content
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
            assert client.post(path, json={}).status_code == 405


def test_scripts_import_what_is_there() -> None:
    for path in FOLDER.glob("*.js"):
        names = re.findall(r'^import .* from "\./(.*)";$', path.read_text(), flags=re.M)
        assert all((FOLDER / name).is_file() for name in names), path


def test_the_page_is_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lists of the build, and in the package that is installed, unless it is the checkout itself."""
    monkeypatch.chdir(ROOT)
    package = Distribution({"script_name": "setup.py"})
    package.parse_config_files(["pyproject.toml"], ignore_option_errors=True)
    package.include_package_data = False
    build = package.get_command_obj("build_py")
    build.ensure_finalized()
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ldm/server/page").iterdir()}
    outputs = {Path(path).relative_to(build.build_lib).as_posix() for path in build.get_outputs(False)}
    assert wanted <= outputs
    try:
        installed = distribution("ldm")
    except PackageNotFoundError:
        return
    files = {path.as_posix() for path in installed.files or ()}
    if "ldm/server/api.py" in files and Path(str(installed.locate_file(""))).resolve() != ROOT:
        assert wanted <= files


def test_about(client: TestClient) -> None:
    found = client.get("/v1/about").json()
    assert found["family"] == "custom" and found["defaults"]["steps"] == 30
    assert (found["control"], found["image_prompts"], found["history"]) == ([], False, False)
    assert "no history" in client.get("/v1/history").json()["error"]["message"]
    assert "euler" in client.get("/v1/settings").json()["properties"]["scheduler"]["examples"]


def test_settings_of_our_own_image(client: TestClient, service: Service) -> None:
    """What a job of them gives is the image."""
    given = {**SMALL, "adapters": {"style": 0.5}, "negative": "red", "guidance": 3, "rescale": 0.5, "spacing": "karras"}
    job = service.accept(given)
    job.result(60)
    image = client.get(f"/v1/jobs/{job.id}/images/0").content
    found = read_back(client, encoded(image))
    assert found["status"] == 200 and found["notes"] == []
    assert given.items() <= found["settings"].items()
    again = client.get(f"/v1/jobs/{job.id}/images/0/settings").json()
    assert again["settings"] == found["settings"]
    repeated = service.accept(found["settings"])
    repeated.result(60)
    assert client.get(f"/v1/jobs/{repeated.id}/images/0").content == image
    assert client.get(f"/v1/jobs/{job.id}/images/1/settings").status_code == 404
    assert client.get("/v1/jobs/nonsense/images/0/settings").status_code == 404


def test_settings_of_an_image_of_other_programs(client: TestClient) -> None:
    text = (
        "a fox <lora:style:0.7> <lora:other:1>\nNegative prompt: red\nSteps: 5, Sampler: DPM++ 2M Karras, "
        "CFG scale: 4, Seed: 7, Size: 64x96, Model hash: abc, Face restoration: GFPGAN"
    )
    found = read_back(client, f"data:image/png;base64,{png(Image.new('RGB', (8, 8)), parameters=text)}")
    settings = found["settings"]
    wanted = {"steps": 5, "scheduler": "dpm++2m", "spacing": "karras", "guidance": 4, "seed": 7, "width": 64}
    assert wanted.items() <= settings.items() and settings["adapters"] == {"style": 0.7}
    notes = "\n".join(found["notes"])
    assert "Face restoration" in notes and "the adapter 'other' is not here" in notes


def test_what_a_record_does_not_hold_is_said(client: TestClient, service: Service) -> None:
    image = png(Image.effect_noise((64, 64), 90).convert("RGB"))
    job = service.accept({**SMALL, "image": image, "strength": 0.5})
    job.result(60)
    found = client.get(f"/v1/jobs/{job.id}/images/0/settings").json()
    assert found["settings"]["strength"] == 0.5
    assert found["notes"] == ["left out: the image that it was made from is not in the file"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("photo.png", "not in base64"),
        (encoded(b"no image"), "none of these"),
        (png(Image.new("L", (101, 100))), "at most 10,000"),
        (png(Image.new("L", (8, 8))), "does not say how it was made"),
        (png(Image.new("L", (8, 8)), ldm="{"), "its settings are damaged"),
        (png(Image.new("L", (8, 8)), ldm='{"prompt": 5}'), "damaged"),
        (png(Image.new("L", (8, 8)), workflow="{}"), "a record of ComfyUI alone"),
        (png(Image.new("L", (8, 8)), ldm='{"prompt": "a", "xy": {}}'), "a sheet with labels (--xy), of many settings"),
        (5, "in base64 is needed"),
    ],
)
def test_images_without_settings(image: Any, message: str, client: TestClient, service: Service) -> None:
    found = read_back(client, image)
    assert found["status"] == 400 and message in found["error"]["message"], found
    assert service.uploads.pixels == 0


ODD: list[dict[str, Any]] = [
    {"adapters": 5}, {"adapters": {"a": 5}}, {"adapters": {"a": {}}}, {"adapters": {"a": {"unet": "x", "text": 1}}},
    {"adapters": [1]}, {"adapters": {"a": {"unet": 1, "text": 1, "path": 5, "sha256": []}}}, {"embeddings": 5},
    {"embeddings": [5, {"name": []}, {"name": "none"}]}, {"guidance": {"x": 1}}, {"guidance": {"scale": []}},
    {"seed": "x"}, {"seed": [1, 2]}, {"model": 5, "model_hash": 6}, {"task": []}, {"width": -1}, {"steps": 1e9},
    {"control": 5}, {"image": 5}, {"negative": {}}, {"crop": "x"}, {"interval": [5]}, {"prompt_2": 5},
    {"scheduler": {}}, {"model": float("nan"), "model_hash": "x"}, {"eta": float("nan")}, {"prompt": "\ud800"},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_records_do_no_harm(odd: dict[str, Any], client: TestClient) -> None:
    """They are refused, or what is odd in them is left out."""
    record = {"prompt": "a fox", "guidance": {"scale": 3}, **odd}
    found = read_back(client, png(Image.new("L", (8, 8)), ldm=json.dumps(record)))
    assert found["status"] in (200, 400), found
    assert found["status"] == 400 or odd.keys() & found["settings"].keys() <= {"seed", "prompt"}


def test_condition_images(client: TestClient, service: Service) -> None:
    image = png(Image.effect_noise((64, 48), 90))
    answer = client.post("/v1/conditions", json={"kind": "gray", "image": image})
    assert answer.headers["content-type"] == "image/png" and Image.open(io.BytesIO(answer.content)).size == (64, 48)
    for kind, message in (
        ("depth", "a network makes it"),
        ("nonsense", "does not exist"),
        ("inpaint", "no image file"),
    ):
        refused = client.post("/v1/conditions", json={"kind": kind, "image": image})
        assert refused.status_code == 400 and message in refused.json()["error"]["message"]
    assert service.uploads.pixels == 0
