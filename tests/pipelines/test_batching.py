"""How many images are made at a time, and that it changes nothing in them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from rounding import RUN, near

from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.models.prompts import PromptReader, count_chunks
from ldm.models.unet import UNet
from ldm.sampling.loop import Step
from pipelines import Pipeline
from pipelines.batching import decodable, shared, together
from pipelines.request import Request

LONG = ", ".join(f"thing {number}" for number in range(60))


class Batches:
    """Notes how many images were made at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, step: Step) -> None:
        if step.index == 0:
            self.sizes.append(len(step.latents))


def test_as_many_as_keep_the_device_busy() -> None:
    pipeline, seen = Pipeline(tiny.model("sd15", shallow=True)), Batches()
    made = pipeline("a fox", n=5, width=256, height=256, steps=2, seed=3, on_step=seen, output="latents")
    assert seen.sizes == [3, 2]  # of 32×32 latents four would do; two batches about as large as each other
    assert [row["seed"] for row in made.settings] == [3, 4, 5, 6, 7]
    for number in (0, 4):  # of each batch
        latents = made.latents[number]
        alone = pipeline("a fox", width=256, height=256, steps=2, seed=3 + number, output="latents").latents[0]
        near(latents, alone, RUN)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"width": 512, "height": 512}, [1, 1]),
        ({"width": 256, "height": 256, "hires": 2.0, "hires_latents": True}, [1, 1, 1, 1]),  # the second pass decides
        ({"width": 512, "height": 512, "batch": 2}, [2]),
    ],
)
def test_the_size_of_the_images_counts(
    settings: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet, "forward", lambda self, x, *_: torch.zeros_like(x))  # whatever the images show
    seen = Batches()
    Pipeline(tiny.model("sd15", shallow=True))(
        "a fox", n=2, steps=2, seed=0, on_step=seen, output="latents", **settings
    )
    assert seen.sizes == sizes


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("batch", [None, 4])
def test_a_long_prompt_leaves_others_as_they_are(name: str, batch: int | None) -> None:
    pipeline, seen = Pipeline(tiny.model(name, shallow=True)), Batches()
    prompts = ["a fox", "a dog", LONG, "a cat"]
    settings: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "output": "latents"}
    made = pipeline(prompts, seed=[1, 2, 3, 4], batch=batch, on_step=seen, **settings)
    assert seen.sizes == [2, 1, 1]
    for number, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=1 + number, **settings).latents[0]
        near(made.latents[number], alone, RUN)
    seen.sizes.clear()
    pipeline(prompts, seed=0, negative=LONG, on_step=seen, **settings)  # which makes all of them as long
    pipeline(prompts, seed=0, chunks=False, on_step=seen, **settings)
    assert seen.sizes == [4, 4]


@pytest.mark.parametrize("task", ["text", "image", "mask", "edit"])
@pytest.mark.parametrize(("rng", "sizes"), [("ldm", [3]), ("diffusers", [1, 1, 1])])
def test_all_tasks_make_several(task: str, rng: str, sizes: list[int]) -> None:
    given: dict[str, Any] = {} if task == "text" else {"image": Image.effect_noise((64, 64), 90).convert("RGB")}
    if task == "mask":
        given["mask"] = Image.new("L", (64, 64))
        given["mask"].paste(255, (16, 16, 48, 48))
    pipeline, seen = Pipeline(tiny.model("sd15-edit" if task == "edit" else "sd15", shallow=True)), Batches()
    settings = {"steps": 4, "rng": rng, "seed": 5, "output": "latents", "width": 64, "height": 64} | given
    made = pipeline(["a fox", "a dog", "a cat"], on_step=seen, **settings)
    assert seen.sizes == sizes
    one = pipeline(["a fox", "a dog", "a cat"], batch=1, **settings)
    for a, b in zip(made.latents, one.latents, strict=True):
        near(a, b, RUN)


def test_less_memory_makes_fewer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("sd15", shallow=True)
    pipeline, plain = Pipeline(model), Pipeline(tiny.model("sd15", shallow=True))
    forward = model.unet.forward

    def small(x: torch.Tensor, *more: Any) -> torch.Tensor:
        if len(x) > 4:  # two images, and two without a prompt
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(x, *more)

    monkeypatch.setattr(model.unet, "forward", small)
    settings: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 1}
    seen = Batches()
    assert list(pipeline.batches(pipeline.request("a fox", n=7, **settings))) == [range(7)]
    parts = list(pipeline.stream("a fox", n=7, on_step=seen, output="latents", **settings))
    assert [part.rows for part in parts] == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    made = [latents for part in parts for latents in part.latents]
    assert seen.sizes == [2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "memory does not suffice for 7 images at a time; making 4",
        "memory does not suffice for 4 images at a time; making 2",
    ]
    for a, b in zip(made, plain("a fox", n=7, output="latents", **settings).latents, strict=True):
        near(a, b, RUN)
    with pytest.raises(LdmError, match="a batch of 2 would fit better"):
        pipeline("a fox", n=4, batch=4, **settings)


def test_numbers() -> None:
    def most(side: int, device: str) -> int:
        request = Request(("a fox",), (None,), values={"width": side, "height": side, "rng": "ldm"})
        return together(request, FAMILIES["sd15"], torch.device(device))

    assert [most(side, "cpu") for side in (512, 1024, 96)] == [1, 1, 28]
    assert [most(side, "cuda") for side in (512, 1024, 4096)] == [16, 4, 1]
    assert (decodable(1024, 1024), decodable(2048, 512), decodable(512, 512)) == (1, 1, 4)
    sizes = []
    left = 100
    while left:
        sizes.append(shared(left, 28))
        left -= sizes[-1]
    assert sizes == [25, 25, 25, 25]
    encoders = tiny.model("sdxl").text_encoders
    assert count_chunks(encoders, [["a", LONG], ["a BREAK b", ""]], PromptReader()) == [2, 4]


def test_batches_that_are_not_needed() -> None:
    pipeline, seen = Pipeline(tiny.model("sd15", shallow=True)), Batches()
    request = pipeline.request("a fox", n=10, width=256, height=256, steps=1, seed=0)
    missing = [rows for rows in pipeline.batches(request) if 5 in rows]
    parts = list(pipeline.make(request, only=missing, on_step=seen, output="latents"))
    assert [part.rows for part in parts] == [range(4, 7)]
    assert seen.sizes == [3]
    assert [row["seed"] for row in parts[0].settings] == [4, 5, 6]


def test_latents_can_be_changed_and_learned_from() -> None:
    pipeline = Pipeline(tiny.model("sd15", shallow=True))
    latents = pipeline("a fox", width=64, height=64, steps=1, seed=0, output="latents").latents[0]
    latents.mul_(2).requires_grad_().sum().backward()
    assert latents.grad is not None
