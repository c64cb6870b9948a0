"""Pipelines against diffusers' own on the same weights and numbers, for every task and scheduler."""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from images import image
from PIL import Image
from rounding import RUN, near

from ldm.errors import LdmError
from ldm.images import mask_to_tensor
from ldm.models.autoencoder import AutoencoderConfig, PointPosterior
from ldm.sampling import preview
from ldm.sampling.guidance import Guidance, thresholded
from ldm.sampling.loop import Step, Time
from ldm.sampling.schedulers import SCHEDULERS
from pipelines import Pipeline
from pipelines.request import records
from pipelines.run import decode

PROMPTS = ["a cat on a mat", "a dog"]
NEGATIVE = ["bad", ""]
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

# where ours mends diffusers' formula, the exact solution is compared with: test_schedulers.py
COMPARED = [name for name in SCHEDULERS if name not in ("dpm++3m-sde", "dpm++sde")]
# one of each kind: of scaled inputs or not, with memory of the steps before, with noise, of two passes a step; they are
# compared where a task or a family is like another one but for the conditioning
KINDS = ["ddim", "euler", "euler-a", "dpm++2m", "unipc", "heun"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = ("sd15", "sd2-v", "sdxl", "sdxl-refiner", "sd15-inpaint", "sdxl-inpaint", "sd15-edit", "sdxl-edit")
    for name in names:
        tiny.model(name, shallow=True).save_pretrained(root / name)
    return {name: root / name for name in names}


def square(size: int = 64) -> Image.Image:
    """A mask: white in the middle."""
    mask = np.zeros((size, size), np.uint8)
    mask[16:40, 24:56] = 255
    return Image.fromarray(mask)


def erased() -> Image.Image:
    """A mask as ComfyUI and Krita save it: opaque black, with a transparent part."""
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 16, 40, 40))
    return mask


@cache
def loaded(folder: Path, kind: str) -> Any:
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(folder: Path, kind: str, scheduler: str | None = None) -> Any:
    """diffusers' pipeline of a model, with its own scheduler or another; its networks are loaded once."""
    pipeline = copy.copy(loaded(folder, kind))
    if scheduler:
        name, options = SCHEDULERS[scheduler]
        options = {"clip_sample": False} | options  # diffusers clips where a model's configuration does not say
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    return pipeline


def opened(folder: Path, refiner: Path | None = None) -> Pipeline:
    """Our pipeline of a model, with plain layers."""
    return Pipeline(folder, refiner=refiner, dtype=torch.float32, device="cpu", quick=False)


once = cache(opened)


@cache
def usual(folder: Path, refiner: Path | None = None) -> Pipeline:
    """Our pipeline of a model as it comes, shared by tests."""
    return Pipeline(folder, refiner=refiner, dtype=torch.float32, device="cpu")


def ours(
    folder: Path,
    *prompts: Any,
    refiner: Path | None = None,
    open_: Callable[[Path, Path | None], Pipeline] = once,
    **settings: Any,
) -> torch.Tensor:
    """Latents of a model that is loaded once, with the noise of diffusers."""
    pipeline = open_(folder, refiner)
    settings = {"rng": "diffusers", "weights": False, "batch": 2, "seed": 3, "output": "latents"} | settings
    return torch.stack(pipeline(*prompts, **settings).latents)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def each(*cases: tuple[str, str, list[str]]) -> pytest.MarkDecorator:
    """Tests with these models, by diffusers' classes, and schedulers."""
    rows = [(name, kind, scheduler) for name, kind, schedulers in cases for scheduler in schedulers]
    return pytest.mark.parametrize(("name", "kind", "scheduler"), rows)


@each(
    ("sd15", "StableDiffusionPipeline", COMPARED),
    ("sd2-v", "StableDiffusionPipeline", COMPARED),
    ("sdxl", "StableDiffusionXLPipeline", KINDS),
)
def test_text_to_image(folders: dict[str, Path], name: str, kind: str, scheduler: str) -> None:
    if (name, scheduler) == ("sd2-v", "pndm"):
        pytest.skip("diffusers' PNDM is of the first order with v-prediction, ours is not")
    theirs = reference(folders[name], kind, scheduler)(
        PROMPTS, negative_prompt=NEGATIVE, num_inference_steps=6, guidance_scale=5.0, generator=generator(),
        output_type="latent", width=64, height=72,
    ).images  # fmt: skip
    made = ours(
        folders[name], PROMPTS, negative=NEGATIVE, steps=6, guidance=5.0, scheduler=scheduler, width=64, height=72
    )
    near(made, theirs, RUN)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_image_itself(folders: dict[str, Path], name: str) -> None:
    kind = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[name]
    theirs = reference(folders[name], kind)("a cat", num_inference_steps=4, generator=generator()).images[0]
    pipeline = usual(folders[name])
    result = pipeline("a cat", steps=4, seed=3, rng="diffusers")
    difference = np.asarray(result.images[0]).astype(int) - np.asarray(theirs).astype(int)
    assert result.images[0].size == (64, 64)
    assert np.abs(difference).max() <= 1


@each(
    ("sd15", "StableDiffusionImg2ImgPipeline", COMPARED),
    ("sdxl", "StableDiffusionXLImg2ImgPipeline", KINDS),
    ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", KINDS),
)
def test_image_to_image(folders: dict[str, Path], name: str, kind: str, scheduler: str) -> None:
    theirs = reference(folders[name], kind, scheduler)(
        "a cat", image=image(), strength=0.6, negative_prompt="bad", num_inference_steps=10, guidance_scale=5.0,
        generator=generator(), output_type="latent", eta=0.0,
    ).images  # fmt: skip
    made = ours(
        folders[name],
        "a cat",
        negative="bad",
        image=image(),
        strength=0.6,
        steps=10,
        guidance=5.0,
        scheduler=scheduler,
    )
    near(made, theirs, RUN)


@each(
    ("sd15-edit", "StableDiffusionInstructPix2PixPipeline", ["ddim", "pndm", "euler", "euler-a", "dpm++2m"]),
    ("sdxl-edit", "StableDiffusionXLInstructPix2PixPipeline", ["ddim", "euler"]),
)
def test_editing(folders: dict[str, Path], name: str, kind: str, scheduler: str) -> None:
    theirs = reference(folders[name], kind, scheduler)(
        "make it blue", image=image(), negative_prompt="bad", num_inference_steps=6, guidance_scale=5.0,
        image_guidance_scale=1.3, generator=generator(), output_type="latent",
        **({"height": 64, "width": 64} if "xl" in name else {}),
    ).images  # fmt: skip
    made = ours(
        folders[name], "make it blue", negative="bad", image=image(), steps=6,
        guidance=Guidance(5.0, image=1.3), scheduler=scheduler,
    )  # fmt: skip
    near(made, theirs, RUN)


@pytest.mark.parametrize("strength", [1.0, 0.7])
@each(
    ("sd15", "StableDiffusionInpaintPipeline", [*KINDS, "pndm"]),
    ("sd15-inpaint", "StableDiffusionInpaintPipeline", ["ddim", "euler-a", "heun"]),
    ("sdxl", "StableDiffusionXLInpaintPipeline", ["ddim", "euler-a", "heun"]),
    ("sdxl-inpaint", "StableDiffusionXLInpaintPipeline", ["ddim", "euler-a", "heun"]),
)
def test_inpainting(folders: dict[str, Path], name: str, kind: str, scheduler: str, strength: float) -> None:
    theirs = reference(folders[name], kind, scheduler)(
        "a cat", image=image(), mask_image=square(), strength=strength, negative_prompt="bad", num_inference_steps=8,
        guidance_scale=5.0, generator=generator(), output_type="latent", width=64, height=64,
    ).images  # fmt: skip
    made = ours(
        folders[name], "a cat", negative="bad", image=image(), mask=square(), strength=strength, steps=8,
        guidance=5.0, scheduler=scheduler,
    )  # fmt: skip
    near(made, theirs, RUN)


FIRST_ORDER = [name for name in COMPARED if name not in ("heun", "dpm2", "dpm2-a")]


@pytest.mark.parametrize("scheduler", FIRST_ORDER)
def test_base_and_refiner_share_a_run(folders: dict[str, Path], scheduler: str) -> None:
    """diffusers hands over in the middle of a step of second-order schedulers; see the test below for those."""
    random = generator()
    common = {"num_inference_steps": 10, "guidance_scale": 5.0, "negative_prompt": "bad", "output_type": "latent"}
    base = reference(folders["sdxl"], "StableDiffusionXLPipeline", scheduler)
    latents = base("a cat", denoising_end=0.7, generator=random, **common).images
    refiner = reference(folders["sdxl-refiner"], "StableDiffusionXLImg2ImgPipeline", scheduler)
    theirs = refiner("a cat", image=latents, denoising_start=0.7, generator=random, **common).images
    made = ours(
        folders["sdxl"], "a cat", refiner=folders["sdxl-refiner"], negative="bad", steps=10, guidance=5.0,
        scheduler=scheduler, refiner_at=0.7,
    )  # fmt: skip
    near(made, theirs, RUN)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "dpm2", "ddim", "euler-a", "dpm2-a", "ddpm", "lcm"])
def test_a_hand_over_to_the_same_model_changes_nothing(folders: dict[str, Path], scheduler: str) -> None:
    """For schedulers without memory, a run in two parts is the run in one: the noise goes on, too."""
    pipeline = usual(folders["sdxl-refiner"], folders["sdxl-refiner"])
    settings = {"steps": 9, "seed": 1, "scheduler": scheduler, "output": "latents"}
    alone = usual(folders["sdxl-refiner"])("a cat", **settings).latents[0]
    for part in (0.3, 0.5, 0.77):
        near(pipeline("a cat", refiner_at=part, **settings).latents[0], alone, RUN)


def test_the_refiner_shares_what_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    refiner = tiny.model("sdxl-refiner", seed=1, shallow=True)
    refiner.save_pretrained(tmp_path / "other")
    refiner.text_encoders.towers[0] = tiny.model("sdxl", shallow=True).text_encoders.towers[1]
    refiner.save_pretrained(tmp_path / "same")
    for name in ("same", "other"):
        pipeline = Pipeline(folders["sdxl"], refiner=tmp_path / name, dtype=torch.float32, device="cpu")
        assert pipeline.refiner is not None
        assert pipeline.refiner.autoencoder is pipeline.model.autoencoder
        shared = pipeline.refiner.text_encoders.towers[0] is pipeline.model.text_encoders.towers[1]
        assert shared == (name == "same")


def test_the_refiner_goes_on_with_the_scheduler_of_the_base(folders: dict[str, Path]) -> None:
    """Whatever it was published with itself: latents are not scaled alike in all of them."""
    base, refiner = (tiny.model("sdxl-refiner", shallow=True) for _ in range(2))
    base.family = replace(base.family, schedule=replace(base.family.schedule, scheduler="DDIMScheduler"))
    settings = {"steps": 6, "seed": 1, "output": "latents"}
    two = Pipeline(base, refiner=refiner)("a cat", refiner_at=0.5, **settings).latents[0]
    near(two, Pipeline(base)("a cat", **settings).latents[0], RUN)


def test_a_hand_over_outside_of_the_run_is_refused_at_once(folders: dict[str, Path]) -> None:
    pipeline = usual(folders["sdxl"], folders["sdxl-refiner"])
    for part, whose, spacing in ((0.01, "base", "leading"), (0.99, "refiner", "trailing")):
        with pytest.raises(LdmError, match=f"refiner_at {part}: of 4 steps, that leaves none for the {whose}"):
            pipeline.stream("a cat", steps=4, refiner_at=part, spacing=spacing)
    with pytest.raises(LdmError, match="refiner_strength 0.3 of 3 steps is less than one step"):
        pipeline.stream("a cat", steps=3)


@pytest.mark.parametrize(
    "scheduler", ["euler", "euler-a", "ddim", "dpm++2m-sde", "dpm++3m-sde", "dpm++sde", "lcm", "ddpm"]
)
def test_an_image_is_the_same_in_any_batch(folders: dict[str, Path], scheduler: str) -> None:
    pipeline = usual(folders["sdxl"])
    settings = {"steps": 5, "scheduler": scheduler, "output": "latents"}
    together = pipeline(["a cat", "a dog"], n=2, batch=4, seed=10, **settings)
    assert [row["seed"] for row in together.settings] == [10, 11, 12, 13]
    pairs = pipeline(["a cat", "a dog"], n=2, batch=3, seed=10, **settings).latents
    alone = pipeline("a dog", seed=12, **settings).latents[0]
    for a, b in zip(together.latents, pairs, strict=True):
        near(a, b, RUN)
    near(together.latents[2], alone, RUN)
    assert (together.latents[2] - together.latents[3]).abs().max() > 0.1


def test_unmasked_pixels_are_bit_identical(folders: dict[str, Path]) -> None:
    for name in ("sd15", "sdxl-inpaint"):
        pipeline = usual(folders[name])
        made = np.asarray(pipeline("a cat", image=image(), mask=square(), steps=3, seed=0).images[0])
        black = np.asarray(square()) == 0
        assert np.array_equal(made[black], np.asarray(image())[black])
        assert not np.array_equal(made[~black], np.asarray(image())[~black])


def test_a_latent_is_free_if_any_of_its_pixels_is_white(folders: dict[str, Path]) -> None:
    """A spot within 8×8 pixels, and a thin line: the same latents as of masks of whole latents."""
    pipeline = usual(folders["sd15"])
    for small, whole in ((np.s_[33:39, 33:39], np.s_[32:40, 32:40]), (np.s_[41:44, :], np.s_[40:48, :])):
        masks = np.zeros((2, 64, 64), np.uint8)
        masks[0][small], masks[1][whole] = 255, 255
        settings: dict[str, Any] = {"image": image(), "steps": 2, "seed": 0}
        made = [pipeline("a cat", mask=Image.fromarray(mask), **settings) for mask in masks]
        assert torch.equal(made[0].latents[0], made[1].latents[0])
        changed = np.asarray(made[0].images[0]) != np.asarray(image())
        assert changed[small].mean() > 0.9
        assert not changed[masks[0] == 0].any()


def test_a_mask_with_holes_gets_a_warning(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Not one that is painted in white on nothing."""
    pipeline = usual(folders["sd15"])
    erased_part, white = image().convert("RGBA"), Image.new("RGBA", (64, 64))
    erased_part.paste((0, 0, 0, 0), (16, 16, 40, 40))
    white.paste((255, 255, 255, 255), (16, 16, 40, 40))
    pipeline.request("a cat", image=image(), mask=white)
    pipeline.request("a cat", image=image(), mask=square())
    assert not caplog.records
    pipeline.request("a cat", image=image(), mask=erased_part)
    (record,) = caplog.records
    assert "the mask's transparent parts count as black" in record.getMessage()


def test_what_an_image_to_start_from_leaves_out_is_told(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(folders["sd15"])
    frames = [Image.new("RGBA", (64, 64), (255, 0, 0, alpha)) for alpha in (0, 255)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        pipeline.request("a cat", image=tmp_path / "a.png")
        pipeline.request("a cat", image=frames[1])  # opaque
    assert [record.getMessage() for record in caplog.records] == [
        "the image to start from: of an animation or of several pages the first alone is used",
        "the image to start from: transparent parts, by an alpha channel, become white",
    ]


def test_an_output_named_twice_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(LdmError, match="output 'latents' and output_type 'pil' are one setting; give one of them"):
        Pipeline(folders["sd15"])("a cat", output="latents", output_type="pil")


def test_a_thin_line_stays_in_a_smaller_mask() -> None:
    for width in (1, 2, 3):
        mask = np.zeros((200, 100), np.uint8)
        mask[:, 51 : 51 + width] = 255
        for size in ((48, 96), (99, 199), (32, 200)):
            small = mask_to_tensor(Image.fromarray(mask), *size)[0, 0]
            assert small.shape == size[::-1]
            assert (small.amax(dim=1) == 1).all() and small.mean() < 0.1
    assert mask_to_tensor(square(), 128, 128).mean() == mask_to_tensor(square(), 64, 64).mean()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_default_dtype_of_pytorch_changes_nothing(folders: dict[str, Path], scheduler: str) -> None:
    settings: dict[str, Any] = {"steps": 3, "seed": 1, "scheduler": scheduler, "eta": 0.5, "negative": "(bad:1.3)"}
    settings |= {"weights": True}
    for rng in ("ldm", "diffusers") if scheduler == "euler-a" else ("ldm",):
        expected = ours(folders["sdxl"], "a (cat:1.2)", rng=rng, **settings)
        torch.set_default_dtype(torch.float64)
        try:
            made = ours(folders["sdxl"], "a (cat:1.2)", open_=opened, rng=rng, **settings)
        finally:
            torch.set_default_dtype(torch.float32)
        assert made.dtype == torch.float32
        near(made, expected, RUN)


@pytest.mark.parametrize("spacing", ["default", "trailing", "ays"])
def test_the_default_device_of_pytorch_changes_nothing(folders: dict[str, Path], spacing: str) -> None:
    settings: dict[str, Any] = {"steps": 3, "seed": 1, "scheduler": "euler-a", "spacing": spacing}
    settings |= {"mask": square(), "image": image()}
    previews: list[Image.Image] = []
    expected = usual(folders["sd15"])("a cat", **settings)
    torch.set_default_device("meta")
    try:
        pipeline = Pipeline(folders["sd15"], dtype=torch.float32, device="cpu")
        made = pipeline("a cat", on_step=lambda step: previews.extend(pipeline.preview(step)), **settings)
    finally:
        torch.set_default_device(None)
    near(made.latents[0], expected.latents[0], RUN)
    assert made.images[0].size == (64, 64) and len(previews) == 3


def test_numbers_of_numpy_and_pytorch_are_taken(folders: dict[str, Path]) -> None:
    pipeline = usual(folders["sd15"])
    plain: dict[str, Any] = {
        "seed": 1, "steps": 3, "width": 64, "n": 1, "guidance": 2.5, "eta": 0.5, "weights": False, "scheduler": "euler",
        "spacing": (9.0, 3.0, 0.5), "interval": (0.0, 0.5),
    }  # fmt: skip
    given: dict[str, Any] = {
        "seed": np.int64(1), "steps": np.int32(3), "width": torch.tensor(64), "n": np.uint8(1),
        "guidance": np.float32(2.5), "eta": np.float64(0.5), "weights": np.False_, "scheduler": np.str_("euler"),
        "spacing": np.array([9.0, 3.0, 0.5]), "interval": torch.tensor([0.0, 0.5]),
    }  # fmt: skip
    found, expected = (pipeline.request("a cat", **settings) for settings in (given, plain))
    assert records(found, pipeline.model.family) == records(expected, pipeline.model.family)
    assert json.dumps(records(found, pipeline.model.family))
    assert pipeline.request(["a", "b"], seed=np.arange(5, 7)).seeds == (5, 6)
    assert pipeline.request(np.array(["a", "b"]), seed=[np.int64(3), np.int64(9)]).seeds == (3, 9)  # type: ignore[arg-type]


def test_no_prompt_is_an_error(folders: dict[str, Path]) -> None:
    pipeline = usual(folders["sd15"])
    for nothing in (None, [], (), [None], ["a", None]):
        with pytest.raises(LdmError, match="no prompt: at least one text is needed"):
            pipeline(nothing)  # type: ignore[arg-type]
    with pytest.raises(LdmError, match="prompt 5: a text, or one for each prompt, is needed"):
        pipeline(5)  # type: ignore[arg-type]


def test_threads_share_a_pipeline(folders: dict[str, Path]) -> None:
    """Four threads with different settings give the images that they give alone, perturbed attention included."""
    pipeline = usual(folders["sdxl"])
    jobs = [
        {"steps": 4, "seed": 1, "scheduler": "euler-a"},
        {"steps": 5, "seed": 2, "guidance": Guidance(4, perturbed=2)},
        {"steps": 3, "seed": 3, "image": image(), "strength": 0.8},
        {"steps": 6, "seed": 4, "scheduler": "dpm++2m", "spacing": "karras"},
    ]
    alone = [pipeline("a cat", output="latents", **job).latents[0] for job in jobs]
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        results[index] = pipeline("a cat", output="latents", **jobs[index]).latents[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, latents in enumerate(alone):
        near(results[index], latents, RUN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_passes_for_high_resolution(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    pipeline = Pipeline(folders["sd15"], dtype=dtype, device="cpu")
    for latents in (False, True):
        result = pipeline("a cat", steps=4, seed=1, hires=1.5, hires_latents=latents)
        assert result.images[0].size == (96, 96)
        assert result.settings[0]["hires"] == 1.5


def test_steps_can_be_watched(folders: dict[str, Path]) -> None:
    pipeline = usual(folders["sd15"])
    seen = []
    result = pipeline("a cat", steps=4, seed=1, scheduler="euler", on_step=seen.append, output="latents")
    assert [(step.index, step.count) for step in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert torch.equal(seen[-1].latents[0], result.latents[0])
    assert seen[0].time.value > seen[-1].time.value


def test_previews_show_what_the_model_expects(folders: dict[str, Path]) -> None:
    for name, scheduler in (("sd15", "euler"), ("sd2-v", "ddim")):
        pipeline = usual(folders[name])
        seen: list[Step] = []
        result = pipeline("a cat", steps=4, seed=1, scheduler=scheduler, on_step=seen.append, output="latents")
        clean = preview.clean(seen[-1], pipeline.model.family.schedule)
        assert torch.allclose(clean[0], result.latents[0], rtol=0.05, atol=0.05 * float(clean.abs().max()))
        assert pipeline.preview(seen[0])[0].size == (8, 8)


def test_previews_are_fitted_to_the_autoencoder() -> None:
    class Linear(torch.nn.Module):
        """Latents that are linear in the pixels of an image four times larger."""

        def __init__(self) -> None:
            super().__init__()
            self.config = AutoencoderConfig(channels=(32, 32, 32), attention=(False,) * 3, scaling_factor=0.5)
            self.mix = torch.nn.Linear(3, 4)

        def encode(self, pixels: torch.Tensor) -> PointPosterior:
            small = torch.nn.functional.avg_pool2d(pixels, 4)
            return PointPosterior(self.mix(small.movedim(1, -1)).movedim(-1, 1))

    autoencoder: Any = Linear()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = autoencoder.encode(pixels).mode() * 0.5
    seen = preview.to_pixels(latents, preview.fit(autoencoder))
    assert torch.allclose(seen, torch.nn.functional.avg_pool2d(pixels, 4), atol=1e-3)


def test_the_second_prompt_goes_to_the_second_encoder(folders: dict[str, Path]) -> None:
    theirs = reference(folders["sdxl"], "StableDiffusionXLPipeline")(
        "a cat", prompt_2="in oil", negative_prompt="bad", negative_prompt_2="worse", num_inference_steps=3,
        generator=generator(), output_type="latent", original_size=(512, 256), crops_coords_top_left=(8, 16),
        target_size=(64, 64), negative_original_size=(1, 2), negative_target_size=(3, 4),
        negative_crops_coords_top_left=(5, 6),
    ).images  # fmt: skip
    made = ours(
        folders["sdxl"], "a cat", prompt_2="in oil", negative="bad", negative_2="worse", steps=3,
        original_size=(512, 256), crop=(8, 16), target_size=(64, 64), negative_original_size=(1, 2),
        negative_target_size=(3, 4), negative_crop=(5, 6),
    )  # fmt: skip
    near(made, theirs, RUN)


def test_a_crop_holds_for_the_negative_prompt_too(folders: dict[str, Path]) -> None:
    theirs = reference(folders["sdxl"], "StableDiffusionXLPipeline")(
        "a cat", num_inference_steps=3, generator=generator(), output_type="latent", crops_coords_top_left=(8, 16)
    ).images
    near(ours(folders["sdxl"], "a cat", steps=3, crop=(8, 16)), theirs, RUN)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 65}, "width 65: a multiple of 8 from 8 to 16384 is needed, such as 64"),
        ({"height": 0}, "height 0"),
        ({"width": 10**9}, "width 1000000000: a whole number from 1 to 16384"),
        ({"width": "wide"}, "width 'wide'"),
        ({"steps": 0}, "steps 0: a whole number from 1 to 1000 is needed"),
        ({"steps": 10**6}, "steps 1000000: a whole"),
        ({"steps": 5.5}, "steps 5.5: a whole"),
        ({"seed": -1}, "seed -1: a whole number from 0"),
        ({"seed": 2**70}, "seed 1180591620717411303424"),
        ({"guidance": float("nan")}, "guidance nan: a number from 0 to 1000"),
        ({"guidance": -3.0}, "guidance -3.0"),
        ({"strength": 1.5, "image": image()}, "strength 1.5"),
        ({"strength": 0.01, "image": image(), "steps": 10}, "less than one step"),
        ({"strength": 0.05, "image": image(), "mask": square(), "steps": 10}, "strength 0.05 of 10 steps"),
        ({"strength": 0, "image": image()}, "strength 0: a number above 0, at most 1, is needed"),
        ({"hires": 2, "hires_strength": 0.0}, "hires_strength 0.0: a number above 0"),
        ({"hires": 8, "width": 4096}, "width 32768"),
        ({"hires": 2, "hires_strength": 0.1}, "hires_strength 0.1 of 2 steps is less than one"),
        ({"scheduler": 5}, "scheduler 5: a name, or an object"),
        ({"spacing": ("a", "b"), "scheduler": "euler"}, "spacing .*: a name, or falling noise levels"),
        ({"spacing": 5, "scheduler": "euler"}, "spacing 5: a name"),
        ({"crop": 5}, "crop 5: two whole numbers"),
        ({"weights": "no"}, "weights 'no': true or false"),
        ({"negative": 5}, "negative 5: a text, or one for each prompt"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"mask": square()}, "a mask without an image"),
        ({"image": image(), "mask": square(32)}, "the mask has 32×32 pixels, its image 64×64"),
        ({"image": "/nowhere.png"}, "/nowhere.png does not exist"),
        ({"image": np.zeros((64, 64, 3))}, "^image numpy.ndarray: a path or a PIL image is needed$"),
        (
            {"image": [image(), image()]},
            r"^image \(PIL.Image.Image, PIL.Image.Image\): a path or a PIL image is",
        ),
        ({"image": ""}, "^image '': a path or a PIL image is needed$"),
        (
            {"image": image(), "mask": Image.new("L", (64, 64))},
            "the mask has no white pixel .128 or more., its largest is 0:",
        ),
        (
            {"image": image(), "mask": Image.new("L", (64, 64), 1)},
            "no white pixel .*, its largest is 1: paint white what",
        ),
        ({"image": image(), "mask": Image.new("L", (64, 64), 100)}, "no white pixel .*, its largest is 100:"),
        ({"image": image(), "mask": Image.new("RGB", (64, 64), "red")}, "no white pixel .*, its largest is 76:"),
        ({"image": image(), "mask": erased()}, "its largest is 0: .*; transparent parts count as black"),
        ({"seed": np.float32(1.5)}, "seed 1.5: a whole number"),
        ({"scheduler": "eulr"}, "scheduler 'eulr' is not known; choose euler"),
        (
            {"scheduler": "pndm", "spacing": "karras"},
            "does not go with scheduler pndm: its weights .*; karras goes with: ddim, ddpm, lms",
        ),
        ({"spacing": "wide"}, "spacing 'wide' is not known"),
        ({"spacing": (1.0, 2.0, 3.0), "steps": 3, "scheduler": "euler"}, "each smaller than the one before"),
        ({"n": 0}, "n 0"),
        ({"rng": "dice"}, "rng 'dice'"),
        ({"prompt_2": "x"}, "one text encoder, and so one prompt"),
        ({"refiner_at": 0.8}, "refiner_at without a refiner"),
        ({"hires": 100}, "hires 100"),
        ({"hiress": 2}, "setting hiress is not known; did you mean hires?"),
        ({"guidance_scal": 2}, r"setting guidance_scal is not known; did you mean guidance \(guidance_scale\)\?"),
        ({"guidance": Guidance(rescale=2)}, "rescale 2: a number from 0 to 1"),
        ({"output": "video"}, "output 'video'"),
        ({"negative": ["a", "b", "c"]}, "one for each of the 1 prompts"),
        ({"scheduler": "lcm", "steps": 200}, "scheduler lcm cannot do 200 steps"),
    ],
)
def test_wrong_settings_are_named(folders: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    pipeline = usual(folders["sd15"])
    with pytest.raises(LdmError, match=message) as caught:
        pipeline("a cat", **({"steps": 2, "seed": 0} | settings))
    assert "\n" not in str(caught.value)


def test_wrong_models_are_named(folders: dict[str, Path]) -> None:
    with pytest.raises(LdmError, match="fills in images: give an image and a mask"):
        usual(folders["sd15-inpaint"])("a cat")
    with pytest.raises(LdmError, match="one of sdxl-refiner is needed"):
        usual(folders["sdxl"], folders["sd15"])


@pytest.mark.parametrize(("part", "stage"), [("unet", "U-Net"), ("autoencoder", "autoencoder")])
def test_numbers_that_are_not_finite_are_an_error(part: str, stage: str) -> None:
    model = tiny.model("sd15", shallow=True)
    getattr(model, part).conv_out.weight.data.fill_(float("nan")) if part == "unet" else (
        model.autoencoder.decoder.conv_out.weight.data.fill_(float("nan"))
    )
    with pytest.raises(LdmError, match=f"the {stage} gave numbers that are not finite; .*bf16"):
        Pipeline(model)("a cat", steps=2)


def test_without_memory_for_the_whole_it_decodes_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("sd15", shallow=True)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = decode(model, latents)
        original = model.autoencoder.decode

        def small_only(z: torch.Tensor) -> torch.Tensor:
            if len(z) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(z)

        monkeypatch.setattr(model.autoencoder, "decode", small_only)
        assert (decode(model, latents) - whole).abs().mean() < 0.1 * whole.std()


def test_without_memory_for_the_whole_it_encodes_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("sd15", shallow=True)
    settings = {"image": image(0, 128, 128), "steps": 2, "strength": 0.5, "seed": 1, "output": "latents"}
    whole = Pipeline(model)("a cat", **settings).latents[0]

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.autoencoder, "encode", full)
    assert (Pipeline(model)("a cat", **settings).latents[0] - whole).abs().mean() < 0.1 * whole.std()


def test_out_of_memory_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("sd15", shallow=True)
    pipeline = Pipeline(model, device="cpu")

    def forward(*_: Any) -> torch.Tensor:
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(model.unet, "forward", forward)
    with pytest.raises(LdmError, match="out of memory with 1 images of 512×512 at a time; try 256×256"):
        pipeline("a cat", width=512, height=512)
    with pytest.raises(LdmError, match="a batch of 2 would fit better"):
        pipeline("a cat", n=4, batch=4)


def test_a_dynamic_threshold_cuts_at_the_percentile_and_scales_to_the_bound() -> None:
    schedule = tiny.family("sd2-v").schedule
    latents = torch.linspace(-10, 10, 101).view(1, 1, 1, 101)
    quiet = latents / 5
    for wanted, expected in ((latents, (latents / 8).clamp(-1, 1) * 3), (quiet, quiet)):
        x, time = torch.randn(wanted.shape), Time(500.0, torch.tensor(500.0))
        scales = schedule.scales(500.0)
        prediction = schedule.parametrisation.from_clean(wanted, x, *scales)
        limited = thresholded(lambda *_, v=prediction: v, 0.8, schedule)(x, time)
        clean = schedule.parametrisation.to_clean(limited, x, *scales)
        torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_any_scheduler_object_can_be_passed(folders: dict[str, Path], kind: str) -> None:
    """Also a second time: each call sets it up anew."""
    pipeline = usual(folders["sd15"])
    reference_ = reference(folders["sd15"], "StableDiffusionPipeline")
    scheduler = getattr(diffusers, kind).from_config(reference_.scheduler.config)
    reference_.scheduler = getattr(diffusers, kind).from_config(reference_.scheduler.config)
    theirs = reference_("a cat", num_inference_steps=4, generator=generator(), output_type="latent").images
    for _ in range(2):
        result = pipeline("a cat", scheduler=scheduler, steps=4, seed=3, rng="diffusers", output="latents")
        near(result.latents[0], theirs[0], RUN)
        assert result.settings[0]["scheduler"] == f"{kind} object"
