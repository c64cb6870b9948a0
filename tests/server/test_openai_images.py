"""OpenAI's API for images, asked by OpenAI's client: images, edits, variations, streams, models, errors, the key."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import tiny
import torch
from images import CLEAR, UPPER, difference, from_base64, png
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from servers import LIMITS

from ldm.images import read_settings
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline

KEY = "hunter-22"
EXTRA: dict[str, Any] = {"steps": 2, "seed": 1, "scheduler": "euler"}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny.model("sd15", shallow=True), dtype=torch.float32)


@pytest.fixture(scope="module")
def service(pipeline: Pipeline) -> Service:
    return Service(pipeline, {"source": "models/tiny.safetensors"}, LIMITS)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with in_thread(service, KEY) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def file(image: Image.Image) -> tuple[str, bytes]:
    return "a.png", png(image)


def image_of(text: str | None) -> Image.Image:
    assert text is not None
    return from_base64(text)


def same(one: Image.Image, other: Image.Image) -> None:
    assert difference(one, other) <= 1


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


def test_generate(client: OpenAI, pipeline: Pipeline, service: Service, tmp_path: Path) -> None:
    """The images are the pipeline's, with their records; what is ignored is said."""
    more = {"negative_prompt": "red", "guidance": 3.0, "scheduler": "DPM++ 2M Karras"}
    raw = client.images.with_raw_response.generate(
        prompt="a fox", n=2, size="64x64", quality="high", style="vivid", user="me", extra_body={**EXTRA, **more}
    )
    answer = raw.parse()
    assert raw.headers["x-ignored"] == "quality, style, user" and not service.jobs
    assert answer.notes == ["without effect here: quality, style, user"]  # type: ignore[attr-defined]
    assert answer.data is not None and (answer.size, answer.output_format) == ("64x64", "png")
    assert answer.usage is not None and answer.usage.total_tokens == 0 and answer.background == "opaque"
    wanted = pipeline("a fox", n=2, size="64x64", batch=1, **{**EXTRA, **more}).images
    for number, one in enumerate(answer.data):
        same(image_of(one.b64_json), wanted[number])
        (tmp_path / "a.png").write_bytes(base64.b64decode(one.b64_json or ""))
        record, _ = read_settings(tmp_path / "a.png")
        assert record is not None and record["seed"] == 1 + number == one.seed  # type: ignore[attr-defined]
    plain = client.images.with_raw_response.generate(prompt="a fox", size="64x64", extra_body=EXTRA)
    assert "x-ignored" not in plain.headers and plain.parse().notes == []  # type: ignore[attr-defined]


def test_formats(client: OpenAI, tmp_path: Path) -> None:
    sizes = []
    for kind, compression in (("jpeg", 90), ("jpeg", 0), ("webp", 50)):
        answer = client.images.generate(
            prompt="a fox", size="64x64", output_format=kind, output_compression=compression, extra_body=EXTRA
        )  # type: ignore[call-overload]
        data = base64.b64decode(answer.data[0].b64_json)
        (tmp_path / "image").write_bytes(data)
        assert Image.open(tmp_path / "image").format == kind.upper() == answer.output_format.upper()
        assert "a fox\nSteps: 2" in read_settings(tmp_path / "image")[1]
        sizes.append(len(data))
    assert sizes[0] > sizes[1]


def test_edit(client: OpenAI, pipeline: Pipeline) -> None:
    """A mask's transparent parts are made anew; without a mask the image's; without both all of it."""
    settings: dict[str, Any] = {"prompt": "a fox", **EXTRA}
    inpainted = pipeline(**settings, image=NOISE, mask=UPPER).images[0]
    answer = client.images.edit(image=file(NOISE), mask=file(CLEAR), prompt="a fox", size="auto", extra_body=EXTRA)
    made = image_of(answer.data[0].b64_json)  # type: ignore[index]
    same(made, inpainted)
    assert made.crop((0, 32, 64, 64)).tobytes() == NOISE.crop((0, 32, 64, 64)).tobytes()
    own = NOISE.copy()
    own.putalpha(CLEAR.getchannel("A"))
    answer = client.images.edit(image=[file(own)], prompt="a fox", extra_body=EXTRA)
    made = image_of(answer.data[0].b64_json)  # type: ignore[index]
    assert made.crop((0, 32, 64, 64)).tobytes() == NOISE.crop((0, 32, 64, 64)).tobytes()
    answer = client.images.edit(image=file(NOISE), prompt="a fox", extra_body={**EXTRA, "strength": 0.5, "n": 2})
    whole = pipeline(**settings, image=NOISE, strength=0.5, n=2, batch=1).images
    for one, wanted in zip(answer.data or (), whole, strict=True):
        same(image_of(one.b64_json), wanted)


def test_variations(client: OpenAI, pipeline: Pipeline) -> None:
    with pytest.warns(DeprecationWarning):
        answer = client.images.create_variation(image=file(NOISE), n=1, extra_body={**EXTRA, "steps": 5})
    wanted = pipeline("", image=NOISE, strength=0.6, **{**EXTRA, "steps": 5}).images[0]
    same(image_of(answer.data[0].b64_json), wanted)  # type: ignore[index]


def test_values_of_forms(client: OpenAI, pipeline: Pipeline) -> None:
    """Numbers, lists and texts that look like numbers mean the same in a form as in JSON."""
    more = {
        "interval": [0.0, 0.6],
        "guidance": 2.5,
        "weights": False,
        "negative_prompt": "7",
        "seed": [4],
        "size": "64",
    }
    answer = client.images.edit(image=file(NOISE), prompt="12", extra_body={**EXTRA, **more})
    same(image_of(answer.data[0].b64_json), pipeline("12", image=NOISE, **{**EXTRA, **more}).images[0])  # type: ignore[index]


def test_streams(client: OpenAI, service: Service) -> None:
    events = list(
        client.images.generate(
            prompt="a fox", size="64x64", stream=True, partial_images=2, quality="low", extra_body={**EXTRA, "steps": 6}
        )
    )
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert {image_of(event.b64_json).size for event in events} == {(64, 64)}
    last = events[-1]
    assert last.usage.total_tokens == 0 and last.notes == ["without effect here: quality"]  # type: ignore[union-attr]
    edits = list(client.images.edit(image=file(NOISE), prompt="a fox", stream=True, extra_body=EXTRA))
    assert [event.type for event in edits] == ["image_edit.completed"] and not service.jobs
    with pytest.raises(openai.APIError, match="not done within"):
        late = client.images.generate(prompt="a", stream=True, size="64x64", extra_body={"steps": 500, "seconds": 0.05})
        list(late)


def test_an_asynchronous_client(address: str) -> None:
    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            stream = await client.images.generate(prompt="a fox", size="64x64", stream=True, extra_body=EXTRA)
            found: list[Any] = [event async for event in stream]
            edited = await client.images.edit(image=file(NOISE), prompt="a fox", extra_body=EXTRA)
            return [found[-1].type, len(edited.data or ())]

    assert asyncio.run(ask()) == ["image_generation.completed", 1]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("dall-e-3")
    assert found.value.code == "model_not_found" and found.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="'gpt-image-1' does not exist here; the model is 'tiny'"):
        client.images.generate(prompt="a fox", model="gpt-image-1")


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"response_format": "url"}, "are not kept at addresses", "response_format"),
    ({"output_format": "gif"}, "png or jpeg or webp", "output_format"),
    ({"output_compression": 50}, "a PNG has no such choice", "output_compression"),
    ({"output_compression": 101, "output_format": "webp"}, "from 0 to 100", "output_compression"),
    ({"background": "transparent"}, "auto or opaque is", "background"),
    ({"quality": "huge"}, "not possible here", "quality"),
    ({"user": 7}, "a text is", "user"),
    ({"partial_images": 2}, "stream true", "partial_images"),
    ({"partial_images": 4, "stream": True}, "from 0 to 3", "partial_images"),
    ({"stream": True, "n": 2}, "a stream is of one image", "n"),
    ({"stream": "yes"}, "true or false", "stream"),
    ({"prompt": ["a", "b"]}, "POST /v1/jobs", "prompt"),
    ({"extra_body": {"frame_count": 3}}, "no animations", "frame_count"),
    ({"n": 5}, "at most 4", None),
    ({"size": "big"}, "WIDTHxHEIGHT", None),
    ({"extra_body": {"stepps": 3}}, "did you mean steps", None),
    ({"extra_body": {"adapters": {"../x": 1}}}, "no adapter is called", None),
    ({"extra_body": {"previews": True}}, "partial_images in their place", "previews"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text", "param"), WRONG, ids=range(len(WRONG)))
def test_wrong_parameters(given: dict[str, Any], text: str, param: str | None, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=text) as found:
        client.images.generate(**{"prompt": "a fox", **given})
    assert (found.value.param, found.value.type) == (param, "invalid_request_error")


def test_wrong_files(client: OpenAI, service: Service) -> None:
    def refused(text: str, **given: Any) -> None:
        with pytest.raises(openai.BadRequestError, match=text):
            client.images.edit(**{"image": file(NOISE), "prompt": "a fox", **given})
        assert service.uploads.pixels == 0 and not service.engine.running

    refused("one image is needed", image=[file(NOISE), file(NOISE)])
    refused("nothing in it is transparent", mask=file(NOISE))
    refused("their sizes must be equal", mask=file(CLEAR.resize((32, 32))))
    refused("it is no image, or none of these", image=("a.png", b"no image"))
    refused("at most 10,000", image=file(Image.new("L", (101, 100))))
    refused("the files of this form are one image and one mask", extra_body={}, markup=file(CLEAR))
    refused("unknown is not known", extra_body={"unknown": 1})
    refused("whole number", extra_body={"steps": "many"})


FORM = "multipart/form-data; boundary=x"
HEAD = b'--x\r\ncontent-disposition: form-data; name="prompt"'
BODIES: list[tuple[bytes, str, int, str]] = [
    (b"", FORM, 400, "ends before"),
    (b"nonsense", FORM, 400, "damaged"),
    (HEAD + b"\r\n\r\na fox", FORM, 400, "ends before"),
    (HEAD + b"\r\n\r\n\xff\r\n--x--\r\n", FORM, 400, "not UTF-8"),
    (HEAD + b"\r\n\r\n" + b"a" * 70_000 + b"\r\n--x--\r\n", FORM, 400, "at most 65,536 bytes"),
    (b"--x\r\n\r\na\r\n--x--\r\n", FORM, 400, "no name"),
    ((HEAD + b"\r\n\r\na\r\n") * 300 + b"--x--\r\n", FORM, 400, "more than 256 parts"),
    (HEAD + b"\r\n\r\n" + b"\r\n--xq" * 9_000 + b"\r\n--x--\r\n", FORM, 400, "more than 256 parts"),
    ((HEAD + b"\r\n\r\na\r\n") * 2 + b"--x--\r\n", FORM, 400, "has it twice"),
    (HEAD.replace(b"prompt", b"a]b") + b"\r\n\r\na\r\n--x--\r\n", FORM, 400, "name, name[] or name[key]"),
    (HEAD + b"\r\n\r\na fox\r\n--x--\r\n", FORM, 400, "one file of that name"),
    (b"{}", "application/json", 400, "a form is needed"),
    (b"a", "text/plain", 415, "must be JSON"),
    (b"a", "multipart/form-data", 400, "with a boundary"),
    (b"a" * 200_001, FORM, 413, "more than"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kind", "status", "text"), BODIES, ids=range(len(BODIES)))
def test_damaged_forms(body: bytes, kind: str, status: int, text: str, address: str) -> None:
    headers = {"content-type": kind, "authorization": f"Bearer {KEY}"}
    answer = httpx2.post(f"{address}/v1/images/edits", content=body, headers=headers)
    assert answer.status_code == status and text in answer.json()["error"]["message"], answer.text


def test_forms_of_other_sites(address: str) -> None:
    """A page of another site cannot send a form, and there are no forms elsewhere."""
    files, headers = {"image": file(NOISE)}, {"authorization": f"Bearer {KEY}"}
    for more in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"host": "evil.example"}):
        url = f"{address}/v1/images/edits"
        assert httpx2.post(url, files=files, data={"prompt": "a"}, headers=headers | more).status_code == 403
    for path in ("/v1/jobs", "/v1/images/generations"):
        assert httpx2.post(address + path, files=files, data={"prompt": "a"}, headers=headers).status_code == 415


def test_a_wrong_key(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        client.with_options(api_key="another").images.generate(prompt="a fox")


def test_a_full_queue_and_a_job_that_fails(client: OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="clip_skip 50"):
        client.images.generate(prompt="a fox", size="64x64", extra_body={**EXTRA, "clip_skip": 50})
    with pytest.raises(openai.InternalServerError, match="not done within") as late:  # and not asked again
        client.with_options(max_retries=2).images.generate(
            prompt="a fox", size="64x64", extra_body={"steps": 500, "seconds": 0.05}
        )
    assert late.value.status_code == 503 and late.value.code == "job_failed"
    monkeypatch.setattr(service.engine, "queue", 0)
    with pytest.raises(openai.InternalServerError, match="try again later") as full:
        client.images.generate(prompt="a fox", size="64x64", extra_body=EXTRA)
    assert full.value.status_code == 503 and int(full.value.response.headers["retry-after"]) >= 1
