"""AUTOMATIC1111's API, asked by the client webuiapi: images, inpainting, progress, interruption, lists, refusals."""

from __future__ import annotations

import base64
import inspect
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_files
import controls
import httpx2
import numpy as np
import pytest
import servers
import tiny
import torch
import webuiapi
from images import UPPER, difference, from_base64, in_base64
from PIL import Image, PngImagePlugin

from ldm.errors import LdmError
from ldm.images import lossy_bytes, read_settings
from ldm.server.a1111 import ApiClient, ApiTask, WebuiApi, echo_of
from ldm.server.a1111_fields import HARMLESS, OF_IMAGES, OF_TEXT, TAKEN, WITHOUT_EFFECT, image_request
from ldm.server.a1111_masks import MaskSettings, filled, inpainting, region, resized
from ldm.server.api import JobsApi
from ldm.server.jobs import Event
from ldm.server.service import Service
from ldm.server.serving import in_thread
from ldm.server.uploads import RequestUploads
from pipelines import Pipeline
from pipelines.a1111 import fields_of, from_parameters

KEY = "hunter-22"
LIMITS = replace(servers.LIMITS, body=400_000, pixels=128 * 128, steps=900)
SMALL: dict[str, Any] = {"prompt": "a fox", "width": 64, "height": 64, "steps": 3, "seed": 1, "sampler_name": "Euler"}
OURS: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "seed": 1, "scheduler": "euler", "guidance": 7.0}
NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("loras")
    model = tiny.model("sd15", shallow=True)
    adapter_files.saved(adapter_files.adapter(model, "kohya"), folder / "style.safetensors")
    return Pipeline(model, dtype=torch.float32, lora_dir=folder)


@pytest.fixture(scope="module")
def service(pipeline: Pipeline) -> Service:
    return Service(pipeline, {"source": "models/tiny.safetensors"}, LIMITS)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with in_thread(service, KEY) as found:
        yield found


def webui(address: str, user: str = "me") -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1", username=user, password=KEY)


@pytest.fixture(scope="module")
def api(address: str) -> webuiapi.WebUIApi:
    return webui(address)


@pytest.fixture(scope="module")
def plain(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{address}/sdapi/v1", auth=("me", KEY), timeout=60) as found:
        yield found


def same(one: Image.Image, other: Image.Image) -> None:
    assert difference(one, other) <= 1


def test_images_of_a_prompt(api: webuiapi.WebUIApi, pipeline: Pipeline, tmp_path: Path) -> None:
    """The images are the pipeline's, and the settings in them are read back, here and by the client."""
    made = api.txt2img(**SMALL, negative_prompt="red", n_iter=2, batch_size=2, override_settings={
        "CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "tiny"})  # fmt: skip
    wanted = pipeline("a fox", **OURS, negative="red", n=4, clip_skip=1, batch=1)
    for one, other in zip(made.images, wanted.images, strict=True):
        same(one, other)
    assert made.info["all_seeds"] == [1, 2, 3, 4] and made.info["batch_size"] == 2
    assert made.info["sampler_name"] == "Euler" and made.info["clip_skip"] == 2
    made.images[1].save(tmp_path / "a.png")
    text = made.info["infotexts"][1]
    read = from_parameters(text)
    assert read == from_parameters(made.images[1].info["parameters"])
    assert (read["prompt"], read["seed"], read["steps"], read["clip_skip"]) == ("a fox", 2, 3, 1)
    info = api.png_info(made.images[1])
    assert info.info == text and info.parameters["Seed"] == "2" and info.parameters["Size-1"] == "64"
    assert info.parameters["Prompt"] == "a fox" and info.parameters["Negative prompt"] == "red"
    assert made.parameters["n_iter"] == 2
    file = base64.b64decode(made.json["images"][1])
    (tmp_path / "b.png").write_bytes(file)
    record, _ = read_settings(tmp_path / "b.png")
    assert record is not None and record["seed"] == 2 and record["model_hash"] == pipeline.model.fingerprint()


def test_samplers_and_schedule_types(api: webuiapi.WebUIApi, pipeline: Pipeline, plain: httpx2.Client) -> None:
    """A schedule type goes by its label or its name; without one a sampler has the one that it has there."""
    samplers, schedulers = api.util_get_sampler_names(), api.util_get_scheduler_names()
    assert {"Euler", "Euler a", "DPM++ 2M", "DDIM", "dpm++2s"} <= set(samplers)
    assert {"automatic", "karras", "sgm_uniform", "align_your_steps"} <= set(schedulers)
    for sampler, schedule, ours in (
        ("DPM++ 2M", None, ("dpm++2m", "karras")), ("DPM++ 2M", "uniform", ("dpm++2m", "default")),
        ("DPM++ 2M Karras", "automatic", ("dpm++2m", "karras")), ("Euler", "SGM Uniform", ("euler", "trailing")),
    ):  # fmt: skip
        made = api.txt2img(**{**SMALL, "sampler_name": sampler, "scheduler": schedule})
        settings = {**OURS, "scheduler": ours[0], "spacing": ours[1]}
        same(made.image, pipeline("a fox", **settings).images[0])
    ddim = plain.post("/txt2img", json={**SMALL, "sampler_name": "DDIM", "eta": 0.5, "cfg_scale": 7}).json()
    same(from_base64(ddim["images"][0]), pipeline("a fox", **{**OURS, "scheduler": "ddim", "eta": 0.5}).images[0])


def test_a_second_pass(api: webuiapi.WebUIApi, pipeline: Pipeline) -> None:
    more = {"hires": 1.5, "hires_strength": 0.7}
    made = api.txt2img(**SMALL, enable_hr=True, hr_scale=1.5)
    same(made.image, pipeline("a fox", **OURS, **more, hires_latents=True).images[0])
    made = api.txt2img(**SMALL, enable_hr=True, hr_resize_x=96, hr_upscaler="Lanczos")
    same(made.image, pipeline("a fox", **OURS, **more).images[0])


def test_adapters_in_prompts(api: webuiapi.WebUIApi, pipeline: Pipeline) -> None:
    assert [one["name"] for one in api.get_loras()] == ["style"]
    made = api.txt2img(**{**SMALL, "prompt": "a fox <lora:style:0.5>"})
    same(made.image, pipeline("a fox", **OURS, adapters={"style": 0.5}).images[0])
    assert "<lora:style:0.5>" in made.info["infotexts"][0]


def test_image_to_image(api: webuiapi.WebUIApi, pipeline: Pipeline) -> None:
    wide = NOISE.resize((96, 64))
    for mode, start in ((0, wide.resize((64, 64), Image.Resampling.LANCZOS)), (1, wide.crop((16, 0, 80, 64)))):
        made = api.img2img([wide], **SMALL, resize_mode=mode, denoising_strength=0.7)
        same(made.image, pipeline("a fox", **OURS, image=start, strength=0.7).images[0])
    assert made.parameters["init_images"] is None
    assert api.img2img([wide], **SMALL, resize_mode=2).image.size == (64, 64)


def test_what_an_answer_repeats_of_its_request(service: Service) -> None:
    """Until then it is held: long texts are not, and images only if they are asked for, and counted."""
    share = RequestUploads(service.uploads, LIMITS)
    given = {"prompt": "a fox", "init_images": ["x" * 4000], "script_args": [{"a": "y" * 400, "b": 1, "z" * 400: 2}]}
    rest = {"prompt": "a fox", "script_args": [{"a": None, "b": 1}]}
    assert echo_of(given, share) == {**rest, "init_images": None}
    assert service.uploads.pixels == 0
    asking = {**given, "include_init_images": True}
    assert echo_of(asking, share) == {**rest, "init_images": given["init_images"], "include_init_images": True}
    assert service.uploads.pixels == 1000
    share.give_back()


def test_texts_of_other_formats(api: webuiapi.WebUIApi, plain: httpx2.Client) -> None:
    photo = lossy_bytes(NOISE, "jpeg", 90, "a fox\nSteps: 3, Seed: 2")
    found = plain.post("/png-info", json={"image": base64.b64encode(photo).decode()}).json()
    assert found["info"] == "a fox\nSteps: 3, Seed: 2" and found["parameters"]["Seed"] == "2"
    said = fields_of("a Negative prompt: of it\nNegative prompt: red\nSteps: 3")
    assert (said["Prompt"], said["Negative prompt"]) == ("a Negative prompt: of it", "red")
    large = PngImagePlugin.PngInfo()
    for number in range(3):
        large.add_itxt(f"text{number}", "x" * 2**19, zip=True)
    answer = plain.post("/png-info", json={"image": in_base64(NOISE, pnginfo=large)})
    assert answer.status_code == 400 and "1,572,864 characters" in answer.json()["detail"]


def test_inpainting(api: webuiapi.WebUIApi, pipeline: Pipeline, plain: httpx2.Client, service: Service) -> None:
    """Without a soft edge it is the pipeline's; with one, what is far from the mask stays and the edge is blended."""
    hard = {"mask_image": UPPER, "inpaint_full_res": False, "denoising_strength": 0.7}
    made = api.img2img([NOISE], **SMALL, **hard, mask_blur=0, inpainting_fill=1)
    same(made.image, pipeline("a fox", **OURS, image=NOISE, mask=UPPER, strength=0.7).images[0])
    below = made.image.crop((0, 32, 64, 64)).tobytes()
    assert below == NOISE.crop((0, 32, 64, 64)).tobytes()
    soft = api.img2img([NOISE], **SMALL, **hard, mask_blur=2)
    assert soft.image.crop((0, 48, 64, 64)).tobytes() == NOISE.crop((0, 48, 64, 64)).tobytes()
    assert soft.image.crop((0, 32, 64, 34)).tobytes() != NOISE.crop((0, 32, 64, 34)).tobytes()
    odd = {"prompt": "a fox", "steps": 2, "init_images": [in_base64(NOISE.resize((65, 64)))], "inpaint_full_res": False}
    answer = plain.post("/img2img", json={**odd, "mask": in_base64(UPPER.resize((65, 64)))}).json()
    assert from_base64(answer["images"][0]).size == (65, 64)
    turned = api.img2img([NOISE], **SMALL, **hard, mask_blur=0, inpainting_mask_invert=1)
    assert turned.image.crop((0, 0, 64, 32)).tobytes() == NOISE.crop((0, 0, 64, 32)).tobytes()
    assert service.uploads.pixels == 0  # what was held for blending is not counted any more


def test_the_masked_part_alone(api: webuiapi.WebUIApi) -> None:
    """It is made at the request's size, and put back at its own."""
    large = NOISE.resize((96, 96))
    mask = Image.new("L", (96, 96))
    mask.paste(255, (40, 40, 56, 56))
    made = api.img2img([large], **SMALL, mask_image=mask, mask_blur=0, inpaint_full_res_padding=8)
    changed = np.abs(np.asarray(made.image, np.int32) - np.asarray(large, np.int32)).max(2) > 0
    rows, columns = np.nonzero(changed)
    assert made.image.size == (96, 96) and made.info["width"] == 64
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 55, 40, 55)


def test_a_wide_blur_of_a_small_mask() -> None:
    """The blur is black all over, and what is under the mask is made anew nevertheless."""
    mask = Image.new("L", NOISE.size)
    mask.putpixel((32, 32), 255)
    for padding in (None, 8):
        _, hidden, part = inpainting(NOISE, mask, MaskSettings((64.0, 64.0), padding=padding), NOISE.size)
        assert hidden.getextrema() == (0, 255) and part.mask.getbbox() == (32, 32, 33, 33)


def test_regions_fills_and_sizes() -> None:
    mask = Image.new("L", (100, 60))
    mask.paste(255, (90, 10, 100, 20))
    assert region(mask, 5, 64, 64) == (80, 5, 100, 25)  # within the image, of the shape that is asked for
    assert region(mask, 0, 128, 64) == (80, 10, 100, 20)
    image = Image.new("RGB", (100, 60), "red")
    image.paste((0, 0, 0), (90, 10, 100, 20))
    around = np.asarray(filled(image, mask))
    assert np.abs(around.astype(int) - (255, 0, 0)).max() <= 3
    assert np.asarray(filled(image, Image.new("L", (100, 60), 255))).std() < 1
    assert resized(Image.new("RGB", (1000, 1)), (64, 64), 2).size == (64, 64)
    tall = resized(image, (100, 100), 2)
    assert tall.size == (100, 100) and tall.getpixel((50, 0)) == (255, 0, 0)


def test_progress_is_the_clients_own(address: str, api: webuiapi.WebUIApi, plain: httpx2.Client) -> None:
    """With a preview while it runs, by the same credentials; interruption, too."""
    answers: list[Any] = []
    body = {**SMALL, "steps": 800, "force_task_id": "task-of-mine"}
    thread = threading.Thread(target=lambda: answers.append(plain.post("/txt2img", json=body)))
    thread.start()
    end, found = time.monotonic() + 60, {"current_image": None}
    while not found["current_image"] and time.monotonic() < end:
        found = api.get_progress()
    assert 0 < found["progress"] < 1 and found["state"]["job"] == "task-of-mine"
    assert found["state"]["sampling_steps"] == 800 and found["eta_relative"] > 0
    assert from_base64(found["current_image"]).size == (8, 8)
    other = webui(address, "somebody")
    assert other.get_progress()["progress"] == 0
    other.interrupt()
    with httpx2.Client(base_url=f"{address}/sdapi/v1", auth=("somebody", KEY)) as stranger:
        assert stranger.get("/progress", params={"id_task": "task-of-mine"}).json()["current_image"] is None
    named = plain.get("/progress", params={"id_task": "task-of-mine", "skip_current_image": "true"}).json()
    assert named["progress"] > 0 and named["current_image"] is None
    assert plain.get("/progress", params={"id_task": "another"}).json()["progress"] == 0
    assert plain.post("/txt2img", json=body).status_code == 409
    assert api.interrupt() == {}
    thread.join(60)
    assert answers[0].status_code == 200 and answers[0].json()["images"] == []
    assert json.loads(answers[0].json()["info"])["interrupted"] is True
    assert api.get_progress()["progress"] == 0 and api.skip() is None


def test_skip_is_for_a_single_image(service: Service) -> None:
    """A task is found by its client, or by its name and credentials from elsewhere; passes add up."""
    job = service.accept({"prompt": "a fox", "steps": 900, "width": 64, "height": 64, "n": 2})
    task, webui = ApiTask(ApiClient("a", "x"), "name", job, 2), WebuiApi(service, JobsApi(service).answering)
    webui.tasks.append(task)
    assert webui._task(ApiClient("a", "x")) is task and webui._task(ApiClient("b", "x")) is None
    assert webui._task(ApiClient("b", "x"), "name") is task and webui._task(ApiClient("a", "y"), "name") is None
    job.cancel()
    assert webui._task(ApiClient("a", "x")) is None
    job.latest.clear()
    for step, part in ((2, 0.125), (4, 0.25), (2, 0.375)):  # of four steps, of the first of two images
        event = Event("step", range(1), step, 4)
        job.latest[0] = event
        task.note(event)
        assert task.progress() == part


def test_lists(api: webuiapi.WebUIApi, plain: httpx2.Client) -> None:
    title = api.util_get_model_names()[0]
    assert title.startswith("tiny [") and api.util_get_current_model() == title
    api.util_set_model("tiny")
    assert api.set_options({"samples_format": "png"}) is None
    refused = plain.post("/options", json={"CLIP_stop_at_last_layers": 2})
    assert refused.status_code == 400 and "override_settings" in refused.json()["detail"]
    assert [one["name"] for one in api.get_latent_upscale_modes()] == ["Latent", "Latent (bicubic antialiased)"]
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos"]
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_memory()["ram"]["total"] > 0 and api.get_cmd_flags()["api"] is True
    for found in (api.get_sd_vae(), api.get_hypernetworks(), api.get_face_restorers(), api.get_prompt_styles()):
        assert found == []
    assert api.refresh_checkpoints() is None and api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.controlnet_model_list() == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stepps": 3}, "field stepps is not known; did you mean steps?"),
    ({"styles": ["anime"]}, "write their words"),
    ({"tiling": True}, "tiling True is not possible here"),
    ({"restore_faces": True}, "restore_faces True"),
    ({"subseed_strength": 0.5}, "variations of a seed"),
    ({"s_churn": 5}, "s_churn 5"),
    ({"script_name": "x/y"}, "scripts do not run here"),
    ({"save_images": True}, "keeps no images"),
    ({"sampler_name": "DPM fast"}, "the nearest: dpm++2s"),
    ({"sampler_name": "nonsense"}, "nonsense"),
    ({"scheduler": "nonsense"}, "scheduler 'nonsense'"),
    ({"sampler_name": "DPM++ 2M Karras", "scheduler": "beta"}, "two schedule types"),
    ({"sampler_name": "Euler a", "eta": 0.5}, "the noise of Euler a is not scaled"),
    ({"override_settings": {"sd_model_checkpoint": "other"}}, "this server has one model, tiny ["),
    ({"override_settings": {"sd_vae": "other.vae"}}, "it stays 'Automatic'"),
    ({"override_settings": {"nonsense": 1}}, "option nonsense"),
    ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "script 'ADetailer' does not run here"),
    ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, "the server has no control model"),
    ({"refiner_checkpoint": "other"}, "the server has none"),
    ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler 'R-ESRGAN 4x+' does not exist"),
    ({"enable_hr": True, "hr_second_pass_steps": 9}, "the second pass is made like the first"),
    ({"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 64}, "the shape must be"),
    ({"enable_hr": True, "hr_scale": 4}, "at most 16,384"),
    ({"init_images": ["x"]}, "it belongs to img2img"),
    ({"width": 100_000, "height": 100_000}, "at most 16,384"),
    ({"n_iter": 5}, "at most 4"),
    ({"n_iter": 0}, "n_iter 0"),
    ({"prompt": ["a", "b"]}, "a request for each prompt"),
    ({"force_task_id": 5}, "force_task_id"),
]
WRONG_IMAGES: list[tuple[dict[str, Any], str]] = [
    ({}, "init_images: a list of one image"),
    ({"init_images": [in_base64(NOISE)] * 2}, "a request for each image"),
    ({"init_images": ["http://127.0.0.1/a.png"]}, "not in base64"),
    ({"init_images": [in_base64(NOISE)], "resize_mode": 3}, "resize_mode 3"),
    ({"init_images": [in_base64(NOISE)], "mask": in_base64(UPPER.resize((32, 32)))}, "their sizes must be equal"),
    ({"init_images": [in_base64(NOISE)], "mask": in_base64(Image.new("L", (64, 64)))}, "nothing would be made anew"),
    ({"init_images": [in_base64(NOISE)], "mask": in_base64(UPPER), "inpainting_fill": 2}, "inpainting_fill 2"),
    ({"init_images": [in_base64(NOISE)], "mask": in_base64(UPPER), "mask_blur": 1e9}, "mask_blur"),
    ({"init_images": [in_base64(NOISE)], "mask": in_base64(UPPER), "width": 10**5, "height": 10**5}, "at most 16,384"),
    ({"init_images": [in_base64(NOISE)], "denoising_strength": 0}, "strength 0"),
    ({"init_images": [in_base64(NOISE)], "enable_hr": True}, "it belongs to txt2img"),
]


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [("txt2img", *one) for one in WRONG] + [("img2img", *one) for one in WRONG_IMAGES],
    ids=range(len(WRONG) + len(WRONG_IMAGES)),
)
def test_what_is_refused(path: str, more: dict[str, Any], message: str, plain: httpx2.Client, service: Service) -> None:
    answer = plain.post(f"/{path}", json={**SMALL, **more})
    found = answer.json()
    assert answer.status_code == 400 and message in found["detail"], found
    assert found["errors"] == found["detail"] and found["error"] == "invalid_request_error"
    assert service.uploads.pixels == 0


def test_every_field_of_the_client_is_known() -> None:
    fields = {*inspect.signature(webuiapi.WebUIApi.txt2img).parameters}
    fields |= {*inspect.signature(webuiapi.WebUIApi.img2img).parameters}
    own = {
        "self", "images", "mask_image", "controlnet_units", "adetailer", "animatediff", "roop", "reactor", "sag",
        "use_deprecated_controlnet", "use_async",
    }  # fmt: skip
    assert fields - own <= {*TAKEN, *OF_TEXT, *OF_IMAGES, *HARMLESS, *WITHOUT_EFFECT}


def test_errors_and_the_key(address: str, plain: httpx2.Client) -> None:
    with httpx2.Client(base_url=f"{address}/sdapi/v1") as stranger:
        for wrong in (None, ("me", "hunter-2"), (KEY, "")):
            answer = stranger.get("/samplers", auth=wrong)
            assert answer.status_code == 401 and answer.json()["detail"].startswith("a key is needed")
        for header in ("Basic", "Basic %", f"Basic {KEY}", "Basic bWU="):
            assert stranger.get("/samplers", headers={"authorization": header}).status_code == 401
        assert stranger.get("/samplers", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    answer = plain.post("/interrogate", json={})
    assert answer.status_code == 404 and answer.json()["detail"] == "/sdapi/v1/interrogate does not exist here"
    assert plain.post("/txt2img", content=b"prompt=a", headers={"content-type": "text/plain"}).status_code == 415
    assert plain.post("/txt2img").status_code == 400
    late = plain.post("/png-info", json={"image": "nonsense"})
    assert late.status_code == 400 and "it is no image" in late.json()["detail"]


def test_control_models(pipeline: Pipeline) -> None:
    """A unit's image, weight and interval are the settings of `control`; each unit has the model that it names."""
    family = pipeline.model.family
    networks = [controls.controlnet(family, seed) for seed in (0, 1)]
    steered = Pipeline(pipeline.model, control_models=networks)
    service = Service(steered, {"source": "tiny", "control_models": ("edges.safetensors", "depth.safetensors")}, LIMITS)
    first = {"image": in_base64(NOISE), "model": "edges", "weight": 0.5, "guidance_end": 0.7}
    first |= {"control_mode": "Balanced"}
    second = {"image": in_base64(NOISE.rotate(90)), "model": "depth", "resize_mode": "Just Resize"}

    def settings_of(*units: dict[str, Any]) -> dict[str, Any]:
        given = {**SMALL, "cfg_scale": 7, "alwayson_scripts": {"ControlNet": {"args": list(units)}}}
        return image_request(given, service, RequestUploads(service.uploads, LIMITS), images=False).settings

    try:
        made = service.accept(settings_of(second, first, {"enabled": False})).result(60)
        wanted = steered(
            "a fox", **OURS, control=[{"image": NOISE}, {"image": NOISE.rotate(90)}], control_scale=[0.5, 1.0],
            control_begin=[0.0, 0.0], control_end=[0.7, 1.0],
        )  # fmt: skip
        same(made.images[0], wanted.images[0])
        for wrong, message in (
            ({"model": "pose"}, "there are edges, depth"), ({"module": "canny"}, "give the condition image itself"),
            ({"control_mode": 1}, "Balanced"), ({"image": None}, "no image"), ({"model": "depth"}, "from the first"),
            ({"hr_option": "High res only"}, "both passes"),
        ):  # fmt: skip
            with pytest.raises(LdmError, match=message):
                settings_of({**first, **wrong})
    finally:
        service.engine.close(0)
