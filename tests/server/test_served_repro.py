"""Images served by each API are made again by `ldm repro`, from their records and the files that these do not name."""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapter_files
import controls
import httpx2
import image_prompts
import pytest
import tiny
import torch
from commands import run
from images import CLEAR, UPPER, in_base64, png
from PIL import Image
from safetensors.torch import save_file
from servers import over

from ldm.images import read_settings
from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline
from pipelines.tuning import typed

LIMITS = Limits(queue=64)
SMALL: dict[str, Any] = {"prompt": "a fox", "width": 64, "height": 64, "steps": 3, "seed": 1}
NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and everything that is used beside it; and images to start from."""
    root, family = tmp_path_factory.mktemp("served"), tiny.family("sd15", shallow=True)
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(root / "model")
    for name in ("a/style", "b/style", "b/brush"):
        adapter_files.saved(adapter_files.adapter(model, "kohya"), root / "loras" / f"{name}.safetensors")
    controls.folder(controls.controlnet(family), root / "net")
    image_prompts.saved(root / "ip.safetensors", family)
    image_prompts.encoder().save_pretrained(root / "image_encoder")
    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, root / "toy.safetensors")
    for name, image in (("start", NOISE), ("mask", UPPER), ("line", NOISE.rotate(90))):
        image.save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def service(root: Path) -> Service:
    loading = {
        "source": str(root / "model"), "lora_dir": str(root / "loras"), "dtype": "fp32", "device": "cpu",
        "control_models": (str(root / "net"),), "ip_adapter": (str(root / "ip.safetensors"),),
        "embeddings": (str(root / "toy.safetensors"),),
    }  # fmt: skip
    return Service(Pipeline(**typed(loading)), loading, LIMITS)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx2.Client]:
    with in_thread(service) as address, httpx2.Client(base_url=address, timeout=60) as found:
        yield found


@pytest.fixture
def again(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`ldm repro` of an image's file: the largest difference of its pixels, or what it says against it."""

    def call(data: bytes, *files: object) -> int | str:
        assert str(root) not in str(read_settings(io.BytesIO(data), "the image"))  # no place of the server's
        (tmp_path / "served.png").write_bytes(data)
        fixed = ["--model", root / "model", "--device", "cpu"]
        code, out, err = run(capsys, monkeypatch, "repro", tmp_path / "served.png", *fixed, *files)
        if code:
            return err
        return int(re.search(r"largest difference (\d+)", out)[1])  # type: ignore[index]

    return call


def mixed(draw: random.Random, root: Path) -> tuple[dict[str, Any], list[Any]]:
    """The settings of a random job, and the files that `ldm repro` needs beside its image."""
    settings: dict[str, Any] = {
        "prompt": draw.choice(["a fox", "a (red:1.3) dog", "a fox, toy"]), "seed": draw.randrange(1000),
        "steps": draw.randint(2, 5), "width": draw.choice([64, 96]), "height": 64, "n": draw.choice([1, 1, 2]),
        "scheduler": draw.choice(["euler", "ddim", "DPM++ 2M Karras", "heun", "unipc", "euler-a"]),
        "guidance": draw.choice([1, 3, 7.5]),
    }  # fmt: skip
    settings |= draw.choice([{}, {"rescale": 0.7}, {"threshold": 0.9}, {"negative": "red"}, {"clip_skip": 1}])
    settings |= draw.choice([{}, {}, {"perturbed": 2.0}, {"reuse": 2}, {"merge": 0.5}])
    files: list[Any] = ["--embedding", root / "toy.safetensors"] if "toy" in settings["prompt"] else []
    if draw.random() < 0.4:
        settings["adapters"] = draw.choice([{"brush": 0.5}, {"a/style": 0.5, "b/style": {"unet": 1, "text": 0.5}}])
        files += ["--lora-dir", root / "loras"]
    image, start = {"image": in_base64(NOISE), "strength": 0.8}, ["--image", root / "start.png"]
    tasks: list[tuple[dict[str, Any], list[Any]]] = [
        ({}, []), ({"hires": 1.5, "hires_strength": 0.6}, []), (image, start),
        (image | {"mask": in_base64(UPPER)}, [*start, "--mask", root / "mask.png"]),
    ]  # fmt: skip
    more, needed = draw.choice(tasks)
    if draw.random() < 0.3:
        more |= {"control": {"image": in_base64(NOISE.rotate(90))}, "control_scale": 0.7}
        needed += ["--control", root / "line.png", "--control-model", root / "net"]
    if draw.random() < 0.3:
        more |= {"image_prompt": in_base64(NOISE.rotate(90)), "image_prompt_end": 0.9}
        needed += ["--image-prompt", root / "line.png", "--ip-adapter", root / "ip.safetensors"]
        if draw.random() < 0.5:
            more["image_prompt_mask"] = in_base64(UPPER)
            needed += ["--image-prompt-mask", root / "mask.png"]
    return settings | more, files + needed


@pytest.mark.parametrize("seed", [0, 1])
def test_jobs(seed: int, client: httpx2.Client, root: Path, again: Any) -> None:
    """Of random mixes, made together."""
    draw = random.Random(seed)
    wanted = [mixed(draw, root) for _ in range(7)]
    answers = [client.post("/v1/jobs", json=settings) for settings, _ in wanted]
    for answer, (settings, files) in zip(answers, wanted, strict=True):
        found = over(client, answer)
        assert found["state"] == "done", (found, settings)
        for one in found["images"]:
            assert again(client.get(one["url"]).content, *files) in (0, 1), settings


def made(client: httpx2.Client, **settings: Any) -> bytes:
    """The image of a job."""
    answer = client.post("/v1/jobs", json={**SMALL, **settings}, headers={"accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_files_that_a_record_does_not_name(client: httpx2.Client, root: Path, again: Any) -> None:
    """Each is asked for by its option."""
    start, line = in_base64(NOISE), in_base64(NOISE.rotate(90))
    data = made(client, image=start, mask=in_base64(UPPER))
    assert "name it (--image)" in again(data)
    assert "name it (--mask)" in again(data, "--image", root / "start.png")
    assert "name it (--image)" in again(made(client, image=start))
    assert "--lora-dir" in again(made(client, adapters={"brush": 0.5}))
    assert "name it (--embedding)" in again(made(client, prompt="a fox, toy"))
    data = made(client, control={"image": line})
    assert "name it (control=, --control)" in again(data)
    assert "--control-model" in again(data, "--control", root / "line.png")
    data = made(client, image_prompt=line, image_prompt_mask=in_base64(UPPER))
    files = ["--image-prompt", root / "line.png", "--image-prompt-mask", root / "mask.png"]
    assert "name it (--image-prompt)" in again(data)
    assert "name it (--image-prompt-mask)" in again(data, *files[:2])
    assert "name it (--ip-adapter)" in again(data, *files)
    assert again(data, *files, "--ip-adapter", root / "ip.safetensors") in (0, 1)
    assert "2 masks of image prompts for" in again(data, *files, *files[2:])


def test_margins(client: httpx2.Client, root: Path, again: Any) -> None:
    """A record says whether there was a mask beside them."""
    start, files = in_base64(NOISE), ["--image", root / "start.png", "--mask", root / "mask.png"]
    data = made(client, image=start, margins=[0, 0, 32, 0], width=None, height=None)
    assert "name it (--image)" in again(data) and again(data, *files[:2]) in (0, 1)
    data = made(client, image=start, margins=[0, 0, 32, 0], mask=in_base64(UPPER), width=None, height=None)
    assert "name it (--mask)" in again(data, *files[:2]) and again(data, *files) in (0, 1)


def test_openai(client: httpx2.Client, root: Path, again: Any) -> None:
    more = {"steps": 3, "seed": 5, "size": "64x64", "prompt": "a fox"}
    answer = client.post("/v1/images/generations", json={**more, "n": 2, "negative": "red"})
    for one in answer.json()["data"]:
        assert again(base64.b64decode(one["b64_json"])) in (0, 1)
    start = ["--image", root / "start.png"]
    for masks, files in (({"mask": ("m.png", png(CLEAR))}, [*start, "--mask", root / "mask.png"]), ({}, start)):
        given = {"image": ("a.png", png(NOISE)), **masks}
        answer = client.post("/v1/images/edits", files=given, data={name: str(one) for name, one in more.items()})
        assert answer.status_code == 200, answer.text
        assert again(base64.b64decode(answer.json()["data"][0]["b64_json"]), *files) in (0, 1)
    answer = client.post("/v1/images/variations", files={"image": ("a.png", png(NOISE))}, data={"steps": "4"})
    assert again(base64.b64decode(answer.json()["data"][0]["b64_json"]), *start) in (0, 1)


def test_webui(client: httpx2.Client, root: Path, again: Any) -> None:
    """Of inpainting, what is sent whole and with sharp edges: otherwise the model has seen another image."""
    start, line = in_base64(NOISE), in_base64(NOISE.rotate(90))
    unit = {"image": line, "weight": 0.6, "guidance_end": 0.8}
    plain = {"init_images": [start], "denoising_strength": 0.7}
    hidden = {"mask": in_base64(UPPER), "mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
    for path, more, files in (
        ("txt2img", {"batch_size": 2, "sampler_name": "DPM++ 2M", "cfg_scale": 5}, []),
        ("txt2img", {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.7}, []),
        ("txt2img", {"override_settings": {"CLIP_stop_at_last_layers": 2}, "eta": 0.3, "sampler_name": "DDIM"}, []),
        ("txt2img", {"alwayson_scripts": {"ControlNet": {"args": [unit]}}},
         ["--control", root / "line.png", "--control-model", root / "net"]),
        ("txt2img", {"prompt": "a fox <lora:brush:0.5>"}, ["--lora-dir", root / "loras"]),
        ("img2img", plain, ["--image", root / "start.png"]),
        ("img2img", plain | hidden, ["--image", root / "start.png", "--mask", root / "mask.png"]),
    ):  # fmt: skip
        answer = client.post(f"/sdapi/v1/{path}", json={**SMALL, **more})
        assert answer.status_code == 200, answer.text
        for one in answer.json()["images"]:
            assert again(base64.b64decode(one), *files) in (0, 1), (path, more)
