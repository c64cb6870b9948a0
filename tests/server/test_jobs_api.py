"""The HTTP interface: jobs from request to image, limits, refusals, events; and a process that starts and drains."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import adapter_files
import httpx2
import pytest
import tiny
import torch
from images import UPPER, difference, from_base64, in_base64
from launched import PATIENCE
from PIL import Image, PngImagePlugin
from servers import LIMITS, SMALL, noting, over
from starlette.requests import Request
from starlette.testclient import TestClient

from ldm.errors import LdmError
from ldm.images import read_settings
from ldm.server import events, receiving
from ldm.server.api import make_app
from ldm.server.engine import NotTakenError
from ldm.server.events import EventReader, EventStream, messages
from ldm.server.guard import HEADERS
from ldm.server.jobs import CANCELLED, Event, ServerJob
from ldm.server.reading import read_json, settings_of
from ldm.server.receiving import RefusedError, read_body
from ldm.server.service import Service, without_paths
from ldm.server.serving import in_thread, listening
from ldm.server.uploads import RequestUploads, Uploads
from ldm.weights.builtin import adapters_of
from pipelines import Pipeline
from pipelines.settings import SETTINGS, at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(root / "model")
    adapter_files.saved(adapter_files.adapter(model, "kohya"), root / "loras" / "inner" / "style.safetensors")
    adapter_files.saved(adapter_files.adapter(model, "kohya"), root / "secret.safetensors")
    return root


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    loading = {"source": str(folder / "model"), "lora_dir": str(folder / "loras"), "dtype": "fp32"}
    pipeline = Pipeline(**{**loading, "dtype": torch.float32})
    made = Service(pipeline, loading, LIMITS)
    yield made
    made.engine.close(0)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url="http://127.0.0.1:7860", raise_server_exceptions=False) as found:
        yield found


def test_from_request_to_image(client: TestClient, folder: Path, tmp_path: Path) -> None:
    """The image is the pipeline's, and its record makes it again; no place on the server's disk is in it."""
    settings = {**SMALL, "n": 2, "adapters": {"style": 0.5}, "negative_prompt": "red", "scheduler": "DPM++ 2M Karras"}
    found = over(client, client.post("/v1/jobs", json=settings))
    assert (found["state"], found["error"]) == ("done", "")
    pipeline = Pipeline(folder / "model", lora_dir=folder / "loras", dtype=torch.float32)
    wanted = pipeline(**settings, batch=1).images
    for number, one in enumerate(found["images"]):
        answer = client.get(one["url"])
        assert answer.headers["content-type"] == "image/png" and one["seed"] == 1 + number
        (tmp_path / "made.png").write_bytes(answer.content)
        with Image.open(tmp_path / "made.png") as made:
            assert made.mode == wanted[number].mode and difference(made, wanted[number]) <= 1
        record, parameters = read_settings(tmp_path / "made.png")
        assert record is not None and record["seed"] == 1 + number and record["scheduler"] == "dpm++2m"
        assert record["model_hash"] == pipeline.model.fingerprint() and "DPM++ 2M" in parameters
        assert str(folder) not in answer.content.decode("latin-1")
    assert client.get(f"/v1/jobs/{found['id']}/images/2").status_code == 404
    assert client.get(f"/v1/jobs/{found['id']}/images/-1").status_code == 404
    odd = client.get(f"/v1/jobs/{found['id']}/images/first")
    assert odd.status_code == 404 and "whole number" in odd.json()["error"]["message"]


def test_an_uploaded_image_and_mask(client: TestClient) -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    settings = {**SMALL, "image": f"data:image/jpeg;base64,{in_base64(image, 'JPEG')}", "mask": in_base64(UPPER)}
    found = over(client, client.post("/v1/jobs", json=settings))
    assert found["state"] == "done", found
    made = Image.open(io.BytesIO(client.get(found["images"][0]["url"]).content))
    jpeg = from_base64(in_base64(image, "JPEG"))
    assert made.crop((0, 32, 64, 64)).tobytes() == jpeg.crop((0, 32, 64, 64)).tobytes()


def test_margins(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image on its canvas, with a mask of its own; canvases above the limits are refused before they are made."""
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    plain = {"prompt": "a fox", "steps": 2, "seed": 1, "image": in_base64(image)}
    for settings, size in (
        ({"margins": 8}, (80, 80)),
        ({"outpaint": [0, 0, 20, 0], "mask": in_base64(UPPER)}, (88, 64)),
    ):
        with noting():
            found = over(client, client.post("/v1/jobs", json={**plain, **settings}))
        assert found["state"] == "done", found
        assert any("are enlarged to 0,0,24,0" in note for note in found["notes"]) == ("outpaint" in settings)
        made = Image.open(io.BytesIO(client.get(found["images"][0]["url"]).content))
        (left, top), wanted = ((8, 8) if size == (80, 80) else (0, 0)), image.crop((16, 32, 48, 48))
        assert made.size == size and made.crop((left + 16, top + 32, left + 48, top + 48)).tobytes() == wanted.tobytes()
    assert service.uploads.pixels == 0
    monkeypatch.setattr("pipelines.request.extended", lambda *_: pytest.fail("it is made"))
    for settings, message in (
        ({"margins": 24}, "12,544 pixels: this server makes at most 9,216"),
        ({"margins": 8, "hires": 2}, "25,600 pixels"),
        ({"margins": 24, "size": "64"}, "12,544 pixels of an image with its margins: this server makes at most 10,000"),
        ({"margins": [16384, 16384, 16384, 16384]}, "pixels: this server makes at most 9,216"),
        ({"margins": 8, "image": None}, "margins without an image"),
        ({"margins": 8.0}, "margins 8.0: a whole number"),
        ({"margins": [8, 8]}, "margins (8, 8): a whole number"),
        ({"margins": {"left": 8}}, "not a JSON object"),
    ):
        answer = client.post("/v1/jobs", json={**plain, **settings})
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    assert service.uploads.pixels == 0


def test_what_is_told_goes_to_the_client_alone(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with noting():
        found = over(client, client.post("/v1/jobs", json={**SMALL, "prompt": "fox [a:b:0.5]", "strength": 0.5}))
    assert [note.partition(":")[0] for note in found["notes"]] == [
        "settings without effect here", "prompt syntax of other programs, which is read as plain words here",
    ]  # fmt: skip


def test_events(client: TestClient) -> None:
    """A stream that is asked for with the job: state, steps with previews, images, state."""
    with client.stream(
        "POST", "/v1/jobs", json={**SMALL, "previews": True, "steps": 3}, headers={"accept": "text/event-stream"}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [message.split("\ndata: ") for message in "".join(answer.iter_text()).strip().split("\n\n")]
    kinds = [kind.removeprefix("event: ") for kind, _ in events]
    assert kinds[0] == "state" and kinds[-2:] == ["images", "state"] and kinds.count("step") == 3
    step = json.loads(next(data for kind, data in events if kind == "event: step"))
    assert (step["images"], step["step"], step["steps"]) == ([0], 1, 3)
    preview = step["previews"][0].removeprefix("data:image/png;base64,")
    assert from_base64(preview).size == (8, 8)
    last = json.loads(events[-1][1])
    assert last["state"] == "done" and last["images"][0]["seed"] == 1
    again = client.get(f"/v1/jobs/{last['id']}/events").text  # of a job that is over
    assert again.count("event: ") == 1 and '"done"' in again


@pytest.mark.parametrize("turns", range(4))
def test_a_reader_that_is_cancelled_as_an_event_comes(turns: int) -> None:
    async def cancelled() -> bool:
        reader = EventReader(asyncio.get_running_loop())
        reading = asyncio.create_task(reader.next())
        await asyncio.sleep(0)
        reader(Event("state"))
        for _ in range(turns):
            await asyncio.sleep(0)
        expected = not reading.done()
        reading.cancel()
        await asyncio.wait([reading])
        return reading.cancelled() == expected

    assert asyncio.run(cancelled())


def test_an_image_at_once(client: TestClient, service: Service) -> None:
    """The answer is the image of the job, or why there is none; nobody can ask for it again, so it is not kept."""
    wanted, before = {"accept": "image/png"}, set(service.jobs)
    answer = client.post("/v1/jobs", json=SMALL, headers=wanted)
    assert answer.headers["content-type"] == "image/png" and Image.open(io.BytesIO(answer.content)).size == (64, 64)
    late = client.post("/v1/jobs", json={**SMALL, "steps": 500, "seconds": 0.05}, headers=wanted)
    assert late.status_code == 503 and "not done within 0.05 seconds" in late.json()["error"]["message"]
    none = client.post("/v1/jobs", json={**SMALL, "clip_skip": 50}, headers=wanted)  # found as late as by the encoder
    assert none.status_code == 422 and "clip_skip 50" in none.json()["error"]["message"]
    assert set(service.jobs) <= before


def test_cancel(client: TestClient, service: Service) -> None:
    answer = client.post("/v1/jobs", json={**SMALL, "steps": 400})
    assert client.delete(answer.headers["location"]).json()["state"] == "cancelled"
    assert over(client, answer)["state"] == "cancelled"
    while service.engine.running:
        time.sleep(0.01)
    assert client.delete("/v1/jobs/nonsense").status_code == 404


PIXELS = in_base64(Image.new("L", (8, 8)))
WRONG: list[tuple[Any, int, str]] = [
    ({**SMALL, "stepps": 3}, 400, "did you mean steps"),
    ({**SMALL, "steps": "3"}, 400, "a whole number"),
    ({**SMALL, "steps": 501}, 400, "at most 500"),
    ({**SMALL, "n": 5}, 400, "at most 4"),
    ({**SMALL, "prompt": ["a"] * 5}, 400, "at most 4"),
    ({**SMALL, "batch": 5}, 400, "at most 4"),
    ({**SMALL, "width": 16384, "height": 16384}, 400, "at most 9,216"),
    ({**SMALL, "hires": 2}, 400, "at most 9,216"),
    ({"prompt": "a fox", "hires": 8}, 400, "at most 9,216"),
    ({**SMALL, "prompt": "a" * 301}, 400, "at most 300"),
    ({**SMALL, "negative": ["a" * 301]}, 400, "at most 300"),
    ({**SMALL, "prompt": "\ud800"}, 400, "half a character"),
    ({**SMALL, "tags": [{"\ud800": 1}]}, 400, "half a character"),
    ({"steps": 2}, 400, "no prompt"),
    ({**SMALL, "image": "photo.png"}, 400, "not in base64"),
    ({**SMALL, "image": "/etc/passwd0"}, 400, "none of these: PNG, JPEG, WEBP"),
    ({**SMALL, "image": {"path": "/etc/passwd"}}, 400, "in base64 is needed"),
    ({**SMALL, "image": base64.b64encode(b"P6 1 1 255 abc").decode()}, 400, "none of these"),
    ({**SMALL, "image": in_base64(Image.new("L", (101, 100)))}, 400, "at most 10,000"),
    ({**SMALL, "control": "canny=/etc/passwd"}, 400, "not in base64"),
    ({**SMALL, "control": [{"canny": "photo.png"}]}, 400, "not in base64"),
    ({**SMALL, "control": {"kind": "canny", "path": "/etc/passwd"}}, 400, "the kind 'kind' of condition images"),
    ({**SMALL, "control": {"kind": PIXELS, "path": PIXELS}}, 400, "the kind 'kind' of condition images"),
    ({**SMALL, "control": {"x" * 301: PIXELS}}, 400, "does not exist"),
    ({**SMALL, "control": 5, "control_image": 6}, 400, "control and control_image are one setting"),
    ({**SMALL, "adapters": 5, "loras": 6}, 400, "adapters and loras are one setting"),
    ({**SMALL, "adapters": 5}, 400, "an object of names"),
    ({**SMALL, "adapters": {"x" * 301: 1}}, 400, "at most 300"),
    ({**SMALL, "x" * 301: 1}, 400, "is not known"),
    ({**SMALL, "scheduler": "x" * 301}, 400, "at most 300"),
    ({**SMALL, "n": 3, "batch": 3}, 400, "12,288 pixels in a batch"),
    ({**SMALL, "prompt": "a BREAK " * 20}, 400, "chunks of a prompt"),
    ({**SMALL, "image_prompt": [[PIXELS] * 65]}, 400, "at most 64 images"),
    ({**SMALL, "control": {"depth": PIXELS}}, 400, "a network makes it"),
    ({**SMALL, "image_prompt": "photo.png:0.5"}, 400, "not in base64"),
    ({**SMALL, "adapters": "secret.safetensors"}, 400, "an object of names"),
    ({**SMALL, "adapters": {"secret": 1}}, 400, "no adapter is called 'secret'"),
    ({**SMALL, "adapters": {"../secret.safetensors": 1}}, 400, "no adapter is called"),
    ({**SMALL, "adapters": {"style": {"unet": 1, "text": 1, "path": "/etc/passwd"}}}, 400, "a weight, or an object"),
    ({**SMALL, "prompt": "a fox <lora:../secret.safetensors:1>"}, 400, "no adapter is called"),
    ({**SMALL, "scheduler": {"a": 1}}, 400, "not a JSON object"),
    ({**SMALL, "spacing": [3, "x"]}, 400, "noise levels"),
    ({**SMALL, "source": "other-model"}, 400, "source is not known"),
    ({**SMALL, "priority": 10}, 400, "priority is 10"),
    ({**SMALL, "seconds": 601}, 400, "at most 600"),
    ({**SMALL, "previews": 1}, 400, "true or false"),
    ({**SMALL, "keep": True}, 400, "keeps no history"),
    ([SMALL], 400, "an object with settings"),
    ("a fox", 400, "an object with settings"),
    (json.loads("[" * 60 + "]" * 60), 400, "an object with settings"),
    ({"prompt": json.loads("[" * 300 + "]" * 300)}, 400, "nested too deeply|a text"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_requests(body: Any, status: int, message: str, client: TestClient, service: Service) -> None:
    answer = client.post("/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"})
    said = answer.json()["error"]["message"]
    assert answer.status_code == status, said
    assert any(part in said for part in message.split("|")), said
    assert str(service.folder) not in said
    assert not service.engine.running and service.uploads.pixels == 0


NOT_JSON = [
    b"", b"{", b"\xff", b'{"steps": NaN}', b'{"seed": 1' + b"0" * 5000 + b"}", b'{"steps": 1, "steps": 2}',
    b'{"stop_at_clip_layer": ' + b"9" * 4300 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("body", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_no_json(body: bytes, client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "not valid JSON" in answer.json()["error"]["message"]


def test_large_requests(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/v1/jobs", content=b" " * 200_001, headers=headers).status_code == 413
    assert client.post("/v1/jobs", content=iter([b" " * 150_000] * 2), headers=headers).status_code == 413
    answer = client.post("/v1/jobs", content=b'{"prompt": [' + b"[]," * 60_000, headers=headers)
    assert answer.status_code == 400 and "120,002 brackets and commas" in answer.json()["error"]["message"]


def test_a_full_queue(client: TestClient, service: Service) -> None:
    answers = [client.post("/v1/jobs", json={**SMALL, "steps": 300, "n": 4}) for _ in range(20)]
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {202, 503}
    refused = answers[codes.index(503)]
    assert 1 <= int(refused.headers["retry-after"]) <= 60 and "try again" in refused.json()["error"]["message"]
    for answer in answers:
        if answer.status_code == 202:
            client.delete(answer.headers["location"])
    while service.engine.running or service.engine.waiting:
        time.sleep(0.01)


def test_time_is_up(client: TestClient) -> None:
    found = over(client, client.post("/v1/jobs", json={**SMALL, "steps": 500, "seconds": 0.05}))
    assert (found["state"], found["error"]) == ("failed", "not done within 0.05 seconds")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:7860"}, 202),
        ({"host": "192.168.0.7:7860"}, 202),
        ({"host": "[::1]:7860"}, 202),
        ({"origin": "http://127.0.0.1:7860"}, 202),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8080"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 202),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 202),
    ],
)
def test_pages_of_other_sites(headers: dict[str, str], status: int, client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=json.dumps(SMALL), headers={"content-type": "application/json", **headers})
    assert answer.status_code == status, answer.text
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    if status == 202:
        over(client, answer)


def test_a_key(service: Service) -> None:
    with TestClient(make_app(service, "hunter-22", ["studio.lan"]), base_url="http://studio.lan") as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        for wrong in ({}, {"authorization": "Bearer hunter-2"}, {"authorization": "hunter-22"}, {"authorization": "é"}):
            for path in ("/v1/settings", "/metrics", "/openapi.json", "/nowhere"):
                values = {name: value.encode("latin-1") for name, value in wrong.items()}
                assert client.get(path, headers=values).status_code == 401  # type: ignore[arg-type]
        assert client.get("/v1/settings", headers={"authorization": "Bearer hunter-22"}).status_code == 200


def test_the_schema_is_that_of_the_settings(client: TestClient) -> None:
    schema = client.get("/v1/settings").json()
    rows = at("http")
    assert set(schema["properties"]) == {*rows, "priority", "seconds", "previews", "keep"}
    assert {row.name for row in SETTINGS} == set(rows)  # all of them
    assert schema["properties"]["steps"]["maximum"] == 500
    for name, row in rows.items():
        assert row.kind.schema, name
        own = schema["properties"][name]
        if "enum" in own:
            assert all(row.kind.allowed(value) for value in own["enum"])
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in own and name not in ("steps", "n", "batch"):
                assert row.kind.allowed(own[bound]) and not row.kind.allowed(own[bound] + step)
    body = client.get("/openapi.json").json()["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["properties"].keys() == schema["properties"].keys()


def test_adapters_health_and_metrics(client: TestClient) -> None:
    assert client.get("/v1/adapters").json() == ["inner/style"]
    assert adapters_of("emoji") == ["contrast", "edges", "ink"] and not adapters_of("emoji-refiner")
    over(client, client.post("/v1/jobs", json=SMALL))
    assert client.get("/healthz").json() == {"problem": ""} and client.get("/readyz").json() == {"waiting": 0}
    text = client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["ldm_steps_total"]) >= float(figures["ldm_unet_calls_total"]) > 0
    assert float(figures["ldm_waiting_images"]) == float(figures["ldm_running_images"]) == 0
    assert float(figures['ldm_jobs_total{state="done"}']) > 0
    assert client.get("/v1/jobs").headers["allow"] == "POST" and client.get("/docs").status_code == 404


def test_metadata_of_uploads_is_left_out(client: TestClient) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a secret")
    image = Image.new("RGB", (64, 64), "red")
    exif = image.getexif()
    exif[0x010E] = "a secret"
    found = over(client, client.post("/v1/jobs", json={**SMALL, "image": in_base64(image, pnginfo=info, exif=exif)}))
    assert b"a secret" not in client.get(found["images"][0]["url"]).content


def test_jobs_are_forgotten(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "jobs", {})
    monkeypatch.setattr(service, "limits", replace(LIMITS, kept=3 * 64 * 64))
    jobs = [service.accept({**SMALL, "n": 2}) for _ in range(2)]
    running = service.accept({**SMALL, "steps": 400})
    for job in jobs:
        job.result(60)
    assert service.job(jobs[0].id) is None and service.job(jobs[1].id) is jobs[1]
    monkeypatch.setattr(service, "limits", replace(LIMITS, keep_seconds=0))
    assert service.job(jobs[1].id) is None and service.job(running.id) is running
    monkeypatch.setattr(service, "limits", replace(LIMITS, kept_jobs=1))
    last = service.accept({**SMALL, "steps": 400})
    last.cancel()
    running.cancel()  # which came first and ends last
    assert service.job(running.id) is running and service.job(last.id) is None


def test_uploads_of_all_jobs_are_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "jobs", {})
    monkeypatch.setattr(service, "limits", replace(LIMITS, uploads=2 * 64 * 64))
    given = {**SMALL, "steps": 400, "image": in_base64(Image.new("RGB", (64, 64)))}
    jobs = [service.accept(given) for _ in range(2)]
    with pytest.raises(NotTakenError, match="12,288 pixels in all"):
        service.accept(given)
    for job in jobs:
        job.cancel()
        assert job.request.image is None
    with pytest.raises(LdmError, match="the request's images have 12,288 pixels"):
        service.accept({**SMALL, "image_prompt": [[given["image"]] * 3]})
    service.accept(given).cancel()
    assert service.uploads.pixels == 0


def test_settings_by_other_names() -> None:
    given = {"prompt": "x", "num_inference_steps": 4, "cfg_scale": 3, "size": "64x96"}
    found = settings_of(given, RequestUploads(Uploads(), LIMITS))
    assert found == {"prompt": "x", "steps": 4, "guidance": 3, "width": 64, "height": 96}
    with pytest.raises(LdmError, match="not valid JSON"):
        read_json(b'{"a": Infinity}')


def test_a_client_that_is_gone_before_its_events(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or that takes none of them: its job is cancelled, and nobody listens any more."""
    monkeypatch.setattr(events, "SEND_SECONDS", 0.01)

    async def stream(gone: bool) -> tuple[ServerJob, EventReader]:
        reader = EventReader(asyncio.get_running_loop())
        job = service.accept({**SMALL, "steps": 400}, reader)

        async def receive() -> Any:
            return {"type": "http.disconnect"} if gone else await asyncio.Event().wait()

        async def send(_: Any) -> None:
            await asyncio.Event().wait()

        await EventStream(job, reader, messages(job, reader), own=True)({"type": "http"}, receive, send)
        return job, reader

    for gone in (True, False):
        job, reader = asyncio.run(stream(gone))
        assert job.state == CANCELLED and reader not in job.listeners


def test_an_answer_before_the_end_of_a_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client has it, whether it sends the rest or not, though the connection is closed then."""
    service = Service(Pipeline(folder / "model", dtype=torch.float32), {}, LIMITS)
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\ncontent-length: 4000000\r\n\r\n"
    with in_thread(service) as url:
        for body, seconds in ((b"a" * 4_000_000, PATIENCE), (b"a", 0.5)):
            monkeypatch.setattr(receiving, "LINGER_SECONDS", seconds)
            with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), PATIENCE) as connection:
                connection.sendall(head)
                time.sleep(0.2)  # the answer is sent meanwhile
                connection.sendall(body)
                answer = b"".join(iter(lambda: connection.recv(2**16), b""))
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b"this host name is not served" in answer


def test_a_client_that_leaves_during_its_request() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(RefusedError, match="the client was gone"):
        asyncio.run(read_body(Request({"type": "http", "headers": []}, receive), 10))


def test_places_of_adapters_are_left_out() -> None:
    own = {"path": "/loras/a/style.safetensors", "unet": 1.0}
    record = without_paths({"adapters": {"/loras/a/style.safetensors": own, "other": own}}, Path("/loras"))
    assert record["adapters"] == {name: {"path": "", "unet": 1.0} for name in ("a/style.safetensors", "other")}


# --- a process --------------------------------------------------------------------------------------------------------


def test_connections_wait_for_the_server() -> None:
    with listening("127.0.0.1", 0) as opened:
        socket.create_connection(opened.getsockname(), timeout=5).close()


def test_a_process_starts_serves_and_drains(folder: Path) -> None:
    command = [sys.executable, "-m", "ldm", "serve", str(folder / "model"), "--port", "0", "--dtype", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read() if process.stderr else ""
        with httpx2.Client(base_url=url, timeout=PATIENCE) as client:
            job = client.post("/v1/jobs", json={**SMALL, "prompt": "a secret", "steps": 40}).json()
            process.send_signal(signal.SIGTERM)
            while client.get("/readyz").status_code != 503:
                time.sleep(0.01)
            assert client.post("/v1/jobs", json=SMALL).status_code == 503
            while client.get(f"/v1/jobs/{job['id']}").json()["state"] != "done":
                time.sleep(0.05)
            assert client.get(f"/v1/jobs/{job['id']}/images/0").content.startswith(b"\x89PNG")
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert '"state": "done"' in log and "secret" not in log, log
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "ldm: --host 0.0.0.0 opens the server to others: set a key"),
        (["--host", "0.0.0.0", "--api-key", "short"], "ldm: --api-key: at least 8 letters"),
    ],
)
def test_a_server_for_others_needs_a_key(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands import run

    monkeypatch.delenv("LDM_API_KEY", raising=False)
    code, _, err = run(capsys, monkeypatch, "serve", *arguments)
    assert code == 1 and message in err


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.cli import serve

    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_package"))
    with pytest.raises(LdmError, match=r"ldm serve needs no_such_package: pip install 'ldm\[serve\]'"):
        serve.check_packages()
