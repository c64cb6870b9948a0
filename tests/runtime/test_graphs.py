"""A U-Net whose steps are recorded: what a CUDA graph would read and write, with a recorder that runs on any device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_prompts
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.runtime.graphs import MOST, RecordedUNet, Recordings, Step
from ldm.runtime.precomputing import precomputed
from ldm.sampling.guidance import Guidance
from pipelines import Pipeline

made = 0  # recordings


class Recorder:
    """Replays a step as a graph does: it reads what lies in the same places, and writes to the same one."""

    def __call__(self, step: Step) -> Step:
        global made
        made += 1
        out = step().clone()
        return lambda: out.copy_(step())


@pytest.fixture
def count() -> Callable[[], int]:
    global made
    made = 0
    return lambda: made


def recorded(model: LatentDiffusion) -> LatentDiffusion:
    model.unet.recordings = Recordings(model.unet, Recorder())  # type: ignore[assignment]
    model.unet.__class__ = RecordedUNet
    return model


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl-refiner"])
def test_one_recording_serves_all_prompts(name: str, count: Callable[[], int]) -> None:
    unet, plain = recorded(tiny.model(name, shallow=True)).unet, tiny.model(name, shallow=True).unet
    c = unet.config

    def cond(tokens: int) -> Conditioning:
        size = torch.randn(2, c.size_ids) if c.size_ids else None
        return Conditioning(
            torch.randn(2, tokens, c.text_dim), torch.randn(2, c.pooled_dim) if size is not None else None, size
        )

    def check(model: torch.nn.Module, x: Tensor, t: float, cond: Conditioning) -> Tensor:
        found = model(x, torch.tensor(t), cond)
        assert torch.equal(found, plain(x, torch.tensor(t), cond))
        return found

    with torch.inference_mode():
        conds = [cond(9), cond(9)]
        models = [precomputed(unet, one) for one in conds]
        first = check(models[0], torch.randn(2, 4, 8, 8), 9.0, conds[0])
        kept = first.clone()
        for t in (8.0, 3.0):  # taking turns
            for model, one in zip(models, conds, strict=True):
                check(model, torch.randn(2, 4, 8, 8), t, one)
        assert torch.equal(first, kept)  # later steps leave results alone
        assert count() == 1
        check(models[0], torch.randn(2, 4, 8, 6), 9.0, conds[0])
        longer = cond(18)
        check(precomputed(unet, longer), torch.randn(2, 4, 8, 8), 9.0, longer)
        assert count() == 3
        for network in (unet, plain):
            network.conv_in.weight.mul_(1.5)  # in its place
        check(models[1], torch.randn(2, 4, 8, 8), 9.0, conds[1])
        assert count() == 3
        for network in (unet, plain):
            network.conv_in.weight = torch.nn.Parameter(network.conv_in.weight * 2)
        check(precomputed(unet, conds[1]), torch.randn(2, 4, 8, 8), 9.0, conds[1])
        assert count() == 4
        check(unet, torch.randn(2, 4, 8, 8), 9.0, conds[1])  # which reads the text itself
        assert count() == 4


def test_steps_that_are_not_all_the_same_are_not_recorded(count: Callable[[], int]) -> None:
    ours, plain = Pipeline(recorded(tiny.model("sd15", shallow=True))), Pipeline(tiny.model("sd15", shallow=True))
    for settings, recordings in (
        ({}, 1),
        ({"reuse": 2}, 0),
        ({"guidance": Guidance(3, perturbed=2)}, 0),
        ({"guidance": Guidance(3, interval=(0.3, 0.6))}, 1),  # one more, for the steps without guidance
        ({"n": 3, "batch": 2}, 1),  # two at a time
    ):
        before = count()
        for prompt in ("a fox", "two dogs"):
            made, wanted = (p(prompt, seed=1, steps=4, **settings).latents for p in (ours, plain))  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
        assert count() - before == recordings, settings


def test_threads_and_how_many_are_kept(count: Callable[[], int]) -> None:
    pipeline = Pipeline(recorded(tiny.model("sd15", shallow=True)))
    wanted = Pipeline(tiny.model("sd15", shallow=True))("a fox", seed=1, steps=3, output="latents").latents[0]
    found: list[Tensor] = []

    def make() -> None:
        found.append(pipeline("a fox", seed=1, steps=3, output="latents").latents[0])

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(one, wanted) for one in found)
    for side in range(64, 64 + 8 * (MOST + 1), 8):
        pipeline("a fox", width=side, height=64, steps=1)
    before = count()
    pipeline("a fox", width=64 + 8 * MOST, height=64, steps=1)
    assert count() == before
    pipeline("a fox", width=64, height=64, steps=1)  # the oldest is gone
    assert count() == before + 1
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        pipeline("a fox", width=64, height=64, steps=1)
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert count() == before + 2


def test_what_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """And memory that does not suffice for a recording is said as it is elsewhere."""
    attempts = 0

    def fails(step: Step) -> Step:
        nonlocal attempts
        attempts += 1
        raise RuntimeError(problem)

    model, plain = recorded(tiny.model("sd15", shallow=True)), Pipeline(tiny.model("sd15", shallow=True))
    model.unet.recordings = Recordings(model.unet, fails)  # type: ignore[assignment]
    settings: dict[str, Any] = {"n": 2, "width": 64, "height": 64, "seed": 1, "steps": 3, "output": "latents"}
    problem = "CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(LdmError, match="out of memory with 1 images of 64×64"):
        Pipeline(model)("a fox", **settings)
    assert attempts == 2  # two images, then one
    problem = "operation not permitted when stream is capturing"
    caplog.clear()
    for prompt in ("a fox", "two dogs"):
        made, wanted = (pipeline(prompt, **settings).latents for pipeline in (Pipeline(model), plain))
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert attempts == 3
    assert [record.getMessage() for record in caplog.records] == [f"steps are not recorded: {problem}"]


def test_hooks_and_other_modes_are_seen(count: Callable[[], int]) -> None:
    unet = recorded(tiny.model("sd15", shallow=True)).unet
    cond = Conditioning(torch.randn(2, 9, unet.config.text_dim))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(5.0)
    with torch.inference_mode():
        first = precomputed(unet, cond)(x, t, cond)
    with torch.no_grad():
        assert torch.equal(precomputed(unet, cond)(x, t, cond), first)
    assert count() == 2
    seen: list[Tensor] = []
    unet.conv_out.register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.inference_mode():
        for _ in range(3):
            precomputed(unet, cond)(x, t, cond)
    assert len(seen) == 3
    assert count() == 2


def test_image_prompts_are_recorded(count: Callable[[], int], tmp_path: Path) -> None:
    """One recording serves other images, weights and masks of the same kind; without guidance, there is another."""
    image_prompts.saved(tmp_path / "ip.safetensors", tiny.family("sd15", shallow=True))
    image_prompts.encoder().save_pretrained(tmp_path / "image_encoder")
    ours, plain = (
        Pipeline(model, ip_adapter=tmp_path / "ip.safetensors")
        for model in (recorded(tiny.model("sd15", shallow=True)), tiny.model("sd15", shallow=True))
    )
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    mask = Image.new("L", (64, 64), 255)
    for settings, recordings in (
        ({"image_prompt": (red, 0.5)}, 1),
        ({"image_prompt": (blue, -1.0)}, 0),
        ({"image_prompt": red, "image_prompt_mask": mask}, 1),
        ({"image_prompt": blue, "image_prompt_mask": mask}, 0),
        ({"image_prompt": red, "guidance": 1.0, "n": 2}, 0),  # two images without guidance, as one with it
        ({"image_prompt": red, "image_prompt_end": 0.5}, 1),  # the steps without it
    ):
        before = count()
        made, wanted = (p("a fox", seed=1, steps=4, **settings).latents for p in (ours, plain))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True)), settings
        assert count() - before == recordings, settings
