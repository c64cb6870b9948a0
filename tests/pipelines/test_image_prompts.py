"""Image prompts in a pipeline, against diffusers' runs with the same IP-Adapters, and from the shell."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import image_prompts
import numpy as np
import pytest
import tiny
import torch
from commands import run
from PIL import Image
from rounding import RUN, near
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ldm.errors import LdmError
from ldm.images import read_settings
from ldm.models.image_prompt import ImagePromptAdapter, ImagePromptConfig
from ldm.sampling.loop import Step
from ldm.weights.image_prompt import OpenedImagePrompt
from pipelines import Pipeline
from pipelines.image_prompts import _encoder_for

SIZE = image_prompts.encoder().config.image_size
KINDS = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
SETTINGS: dict[str, Any] = {"steps": 4, "scheduler": "euler", "guidance": 5.0, "seed": 3, "rng": "diffusers"}
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, IP-Adapters for each, an image encoder and images."""
    root = tmp_path_factory.mktemp("files")
    for name in KINDS:
        tiny.model(name, shallow=True).save_pretrained(root / name)
        for seed, kind in enumerate(("base", "plus", "full")):
            image_prompts.saved(root / f"{name}-{kind}.safetensors", tiny.family(name, shallow=True), kind, seed)
    image_prompts.encoder().save_pretrained(root / "image_encoder")
    for number, size in enumerate(((50, 40), (33, 64))):
        noise_image(number, size).save(root / f"{number}.png")
    return root


def noise_image(seed: int, size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def loaded(files: Path, name: str, kinds: tuple[str, ...]) -> Pipeline:
    adapters = [files / f"{name}-{kind}.safetensors" for kind in kinds]
    return Pipeline(files / name, dtype=torch.float32, device="cpu", quick=False, ip_adapter=adapters)


@cache
def reference(files: Path, name: str) -> Any:
    """diffusers' pipeline, without an adapter."""
    processor = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)
    pipe = getattr(diffusers, KINDS[name]).from_pretrained(
        files / name, image_encoder=image_prompts.encoder(), feature_extractor=processor
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def ours(files: Path, name: str, kinds: tuple[str, ...], **settings: Any) -> Tensor:
    pipeline = loaded(files, name, kinds)
    return torch.stack(pipeline("a cat", output="latents", **{**SETTINGS, **settings}).latents)


def theirs(files: Path, name: str, kinds: tuple[str, ...], images: Any, scale: Any, **settings: Any) -> Tensor:
    pipe = reference(files, name)
    states = [image_prompts.groups(image_prompts.tensors(_adapter(name, kind))) for kind in kinds]
    pipe.unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(scale)
    return pipe(
        "a cat", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3),
        output_type="latent", ip_adapter_image=images, **settings,
    ).images  # fmt: skip


def _adapter(name: str, kind: str) -> Any:
    return image_prompts.adapter(tiny.family(name, shallow=True), kind, ("base", "plus", "full").index(kind))


def opened(files: Path) -> list[Image.Image]:
    return [Image.open(files / f"{number}.png") for number in (0, 1)]


def mask(left: bool) -> Image.Image:
    """White on one half of the image."""
    half = np.zeros((64, 64), np.uint8)
    half[:, slice(0, 32) if left else slice(32, 64)] = 255
    return Image.fromarray(half)


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_one_image(files: Path, name: str, kind: str) -> None:
    image = opened(files)[0]
    wanted = theirs(files, name, (kind,), [image], 0.6)
    near(ours(files, name, (kind,), image_prompt=f"{files / '0.png'}:0.6"), wanted, RUN)
    assert not torch.allclose(ours(files, name, (kind,)), wanted, atol=1e-2)


def test_images_that_are_read_together(files: Path) -> None:
    images = opened(files)
    wanted = theirs(files, "sd15", ("plus",), [images], 0.8)
    near(ours(files, "sd15", ("plus",), image_prompt=[(images, 0.8)]), wanted, RUN)


def test_two_adapters(files: Path) -> None:
    images = opened(files)
    wanted = theirs(files, "sdxl", ("base", "plus"), images, [0.7, 0.4])
    near(ours(files, "sdxl", ("base", "plus"), image_prompt=images, ip_adapter_scale=(0.7, 0.4)), wanted, RUN)


@pytest.mark.parametrize("name", KINDS)
def test_masks(files: Path, name: str) -> None:
    """Two images of one adapter, each in its half."""
    images, masks = opened(files), [mask(True), mask(False)]
    processed = diffusers.image_processor.IPAdapterMaskProcessor().preprocess(masks, height=64, width=64)
    regions = [processed.reshape(1, 2, 64, 64)]
    wanted = theirs(
        files, name, ("plus",), [images], [[0.7, 0.4]], cross_attention_kwargs={"ip_adapter_masks": regions}
    )
    prompts = [(images[0], 0.7), (images[1], 0.4)]
    near(ours(files, name, ("plus",), image_prompt=prompts, image_prompt_mask=masks), wanted, RUN)


def test_a_part_of_the_steps(files: Path) -> None:
    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.6 if step + 1 < 2 else 0.0)
        return tensors

    image = opened(files)[0]
    wanted = theirs(files, "sd15", ("base",), [image], 0.6, callback_on_step_end=stop)
    near(ours(files, "sd15", ("base",), image_prompt=(image, 0.6), image_prompt_end=0.5), wanted, RUN)


def test_tasks_and_batches(files: Path) -> None:
    """Image to image, inpainting and a second pass read the image; batches do not change it."""
    pipeline = Pipeline(tiny.model("sd15", shallow=True), ip_adapter=files / "sd15-base.safetensors")
    start = noise_image(7, (64, 64))
    common = {"steps": 4, "seed": 1, "output": "latents"}
    read = {"image_prompt": files / "0.png", "image_prompt_mask": mask(True)}
    for task in ({}, {"image": start}, {"image": start, "mask": mask(False)}, {"hires": 1.5}):
        plain, made = (torch.stack(pipeline("a cat", **common, **task, **more).latents) for more in ({}, read))
        assert not torch.allclose(plain, made, atol=1e-3)
    alone, both = (pipeline(["a cat", "a dog"], batch=batch, **common, **read).latents for batch in (1, 2))
    near(torch.stack(both), torch.stack(alone), RUN)
    plain, none = (pipeline("a cat", **common, **more).latents[0] for more in ({}, {**read, "ip_adapter_scale": 0.0}))
    assert torch.equal(plain, none)


def test_from_the_shell_and_again_from_the_record(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = files / "sd15-plus.safetensors", tmp_path / "cat.png"
    options = ["--model", files / "sd15", "--device", "cpu", "--dtype", "fp32", "--steps", "2", "--out", out]
    prompts = [
        "--image-prompt", f"{files / '0.png'}:0.5", "--image-prompt", files / "1.png",
        "--image-prompt-end", "1,0.5", "--ip-adapter", adapter,
    ]  # fmt: skip
    code, _, err = run(capsys, monkeypatch, "generate", "a cat", *options, *prompts)
    assert (code, err) == (0, "")
    record, _ = read_settings(out)
    assert record is not None
    assert [(one["weight"], one["end"]) for one in record["image_prompt"]] == [(0.5, 1.0), (1.0, 0.5)]
    assert record["image_prompt"][0]["adapter"]["path"] == str(adapter)
    assert run(capsys, monkeypatch, "repro", out, "--device", "cpu")[1].startswith("identical")
    code, shown, _ = run(capsys, monkeypatch, "generate", "a cat", *options, *prompts, "--dry-run")
    assert code == 0 and '"left_to_make": 1' in shown
    (files / "1.png").rename(files / "moved.png")
    try:
        assert "1.png, that the image was made from, is gone" in run(capsys, monkeypatch, "repro", out)[2]
        moved = ["--image-prompt", files / "0.png", "--image-prompt", files / "moved.png", "--ip-adapter", adapter]
        again = run(
            capsys, monkeypatch, "repro", out, "--device", "cpu", *moved, "--image-encoder", files / "image_encoder"
        )
        assert again[1].startswith("identical")
        assert "made with 2; name all" in run(capsys, monkeypatch, "repro", out, *moved[:2])[2]
    finally:
        (files / "moved.png").rename(files / "1.png")
    other = image_prompts.encoder()
    other.visual_projection.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    code, shown, err = run(capsys, monkeypatch, "repro", out, "--device", "cpu", "--image-encoder", tmp_path / "other")
    assert (code, shown) == (1, "")
    assert "was made with another image encoder" in err and "name the right one (--image-encoder)" in err


def test_files_that_move_while_images_are_made(files: Path, tmp_path: Path) -> None:
    """Records have the digests of the checked files; a batch is not lost when they are gone after it."""
    names = {name: tmp_path / name for name in ("0.png", "sd15-base.safetensors")}
    for name, file in names.items():
        file.write_bytes((files / name).read_bytes())
    pipeline = Pipeline(
        tiny.model("sd15", shallow=True),
        ip_adapter=names["sd15-base.safetensors"],
        image_encoder=files / "image_encoder",
    )
    request = pipeline.request("a cat", steps=1, seed=1, image_prompt=names["0.png"], image_prompt_mask=names["0.png"])

    def gone(step: Step) -> None:
        for file in names.values():
            file.unlink()

    (result,) = pipeline.make(request, on_step=gone)
    (found,) = result.settings[0]["image_prompt"]
    digests = [hashlib.sha256((files / name).read_bytes()).hexdigest() for name in names]
    assert [found["images"][0]["sha256"], found["adapter"]["sha256"]] == digests
    assert found["mask"] == found["images"][0]


@pytest.mark.parametrize(
    ("name", "kind", "features", "place"),
    [
        ("sdxl_models/ip-adapter_sdxl", "base", 1280, "sdxl_models"),
        ("sdxl_models/ip-adapter_sdxl_vit-h", "base", 1024, "models"),
        ("sdxl_models/ip-adapter-plus_sdxl_vit-h", "plus", 1280, "models"),
        ("models/ip-adapter-plus_sd15", "plus", 1280, "models"),
        ("elsewhere/ip-adapter-plus_sdxl_vit-h", "plus", 1280, "elsewhere"),
    ],
)
def test_the_encoder_of_the_authors_files(tmp_path: Path, name: str, kind: str, features: int, place: str) -> None:
    """The folders of h94/IP-Adapter: ViT-bigG is in sdxl_models, and ViT-H in models."""
    shape = {"width": 32, "heads": 2, "depth": 1, "inner": 128} if kind == "plus" else {}
    adapter = ImagePromptAdapter(ImagePromptConfig(kind, features, 768, **shape), [])
    for own, root in ((f"h94/IP-Adapter/{name}.safetensors", "h94/IP-Adapter"), ("", str(tmp_path))):
        for folder in ("models", "sdxl_models", "elsewhere"):
            (tmp_path / folder / "image_encoder").mkdir(parents=True, exist_ok=True)
        opened = OpenedImagePrompt(tmp_path / f"{name}.safetensors", own, adapter, None, [])  # type: ignore[arg-type]
        assert str(_encoder_for(opened, None)) == f"{root}/{place}/image_encoder"


def test_what_does_not_fit(files: Path, tmp_path: Path) -> None:
    model = tiny.model("sd15", shallow=True)
    adapter = files / "sd15-base.safetensors"
    with pytest.raises(LdmError, match="image_prompt without an IP-Adapter"):
        Pipeline(model).request("a cat", image_prompt=files / "0.png")
    with pytest.raises(LdmError, match="image encoder without an IP-Adapter"):
        Pipeline(model, image_encoder=files / "image_encoder")
    with pytest.raises(LdmError, match="made for another model"):
        Pipeline(model, ip_adapter=files / "sdxl-base.safetensors")
    alone = tmp_path / "ip.safetensors"
    alone.write_bytes(adapter.read_bytes())
    with pytest.raises(LdmError, match="needs an image encoder: name its folder"):
        Pipeline(model, ip_adapter=alone)
    with pytest.raises(LdmError, match="is no image encoder's folder"):
        Pipeline(model, ip_adapter=alone, image_encoder=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LdmError, match="image encoder"):
        Pipeline(model, ip_adapter=alone, image_encoder=tmp_path)
    pipeline = Pipeline(model, ip_adapter=adapter)
    for given, message in (
        ({"image_prompt": 5}, "image_prompt 5: an image, or several of them"),
        ({"image_prompt": (files / "0.png", 11)}, "an image, or several of them"),
        ({"image_prompt_weight": 0.5}, "image_prompt_weight without an image prompt"),
        ({"image_prompt": files / "0.png", "image_prompt_end": (1.0, 0.5)}, "2 values for 1 image prompts"),
        ({"image_prompt": files / "0.png", "image_prompt_begin": 0.5, "image_prompt_end": 0.5}, "is not before"),
        ({"image_prompt": files / "0.png", "steps": 4, "image_prompt_end": 0.2}, "no whole step of 4 lies between"),
        ({"image_prompt": files / "none.png"}, "none.png"),
        ({"image_prompt": files / "0.png", "image_prompt_mask": files / "none.png"}, "none.png"),
        ({"ip_adapter_image_embeds": [1]}, "images are encoded here; give them as image_prompt"),
    ):
        with pytest.raises(LdmError) as caught:
            pipeline.request("a cat", **given)
        assert message in str(caught.value)
    with pytest.raises(LdmError, match="3 image prompts for 2 IP-Adapters"):
        Pipeline(model, ip_adapter=[adapter, adapter]).request("a cat", image_prompt=[files / "0.png"] * 3)
    with pytest.raises(LdmError, match="takes no image prompts"):
        edit = tiny.model("sd15-edit", shallow=True)
        Pipeline(edit, ip_adapter=adapter).request("x", image=noise_image(0, (64, 64)), image_prompt=files / "0.png")


def test_files_of_the_hub(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched by name, with the encoder in the folder beside; there is no network in tests."""
    asked = []

    def fetch(name: str, file: str) -> str:
        asked.append((name, file))
        if file != "models/sd15-base.safetensors":
            raise OSError("404: there is no such file")
        return str(files / "sd15-base.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    with pytest.raises(LdmError, match="image encoder someone/ip/models/image_encoder: "):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        Pipeline(tiny.model("sd15", shallow=True), ip_adapter="someone/ip/models/sd15-base.safetensors")
    encoder = files / "image_encoder"
    Pipeline(
        tiny.model("sd15", shallow=True), ip_adapter="someone/ip/models/sd15-base.safetensors", image_encoder=encoder
    )
    assert asked == [("someone/ip", "models/sd15-base.safetensors")] * 2
    with pytest.raises(LdmError, match="'someone/ip/x.bin' is neither a path here nor a file of the Hub: 404"):
        Pipeline(tiny.model("sd15", shallow=True), ip_adapter="someone/ip/x.bin")
