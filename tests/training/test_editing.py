"""U-Nets that inpaint and that edit by instruction: from a text-to-image model, beside diffusers, after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image, ImageOps
from runs import DEEP, check_golden, config, losses, weights
from runs import _fresh_accelerator as _fresh_accelerator
from torch import Tensor

from ldm.cli.train import make_images
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.models.surgery import widened
from ldm.training.conditioning import ConditioningDropout
from ldm.training.config import Config
from ldm.training.forecast import forecast
from ldm.training.run import TrainingRun, train
from ldm.training.sections import ModelSection
from ldm.training.stages.denoiser import DenoiserStage
from ldm.training.start import starting_model

TASKS = ("inpaint", "edit")
CHANNELS = {"inpaint": 9, "edit": 8}


@pytest.fixture(scope="module")
def before(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images without their colours, before an edit that gives them back."""
    root = tmp_path_factory.mktemp("before")
    for path in shapes.glob("*.png"):
        ImageOps.grayscale(Image.open(path).convert("RGB")).convert("RGB").save(root / path.name)
    return root


@pytest.fixture(scope="module")
def start(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image model, whose output is not zero."""
    folder = tmp_path_factory.mktemp("start")
    model = starting_model(ModelSection(**config(shapes, folder / "c", DEEP).model.model_dump()), seed=0)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder / "model")
    return folder / "model"


def chosen(task: str, shapes: Path, before: Path, start: Path, output: Path, *overrides: str) -> Config:
    beside = "data.beside.mask=random" if task == "inpaint" else f"data.beside.before={before}"
    usual = [
        "model.family=null", "model.autoencoder={}", "model.text=[]", f"model.source={start}",
        f"model.unet={{in_channels: {CHANNELS[task]}}}", beside,
    ]  # fmt: skip
    given = {override.partition("=")[0] for override in overrides}
    return config(shapes, output, *(one for one in usual if one.partition("=")[0] not in given), *overrides)


def ready(settings: Config) -> tuple[DenoiserStage, Batch]:
    """The stage, and its first batch."""
    run = TrainingRun(settings, None, lambda *_: None)
    training = run.training("base", run.start("base", None), run.folder / "base")
    assert isinstance(training.stage, DenoiserStage)
    return training.stage, next(training.batches(0))[0]


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_convolution_reads_more_channels() -> None:
    layer = torch.nn.Conv2d(4, 6, 3, padding=1)
    wide, x = widened(layer, 9), torch.randn(2, 9, 5, 5)
    torch.testing.assert_close(wide(x), layer(x[:, :4]))
    assert layer.in_channels == 4 and wide.in_channels == 9 and wide.bias is layer.bias


@pytest.mark.parametrize("task", TASKS)
def test_at_first_the_new_channels_are_ignored(
    shapes: Path, before: Path, start: Path, tmp_path: Path, task: str
) -> None:
    """The first step's prediction is the base's, whatever mask or image there is; only then they have gradients."""
    more = ["base.drop_both=0"] if task == "edit" else []
    settings = chosen(task, shapes, before, start, tmp_path / "r", "base.drop_caption=[0]", *more)
    stage, batch = ready(settings)
    assert stage.model.family.task == task
    base = starting_model(ModelSection(source=str(start)), 0).unet
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], 0, batch.keys, batch.epochs)
    x = stage.loss.noisy(latents, draw)
    complete = stage.task.complete(x, batch, stage.dropout)
    cond = stage.model.encode_prompt(batch.captions)
    expected = base(x, draw.timestep, cond)
    torch.testing.assert_close(stage.model.unet(complete, draw.timestep, cond), expected, rtol=1e-4, atol=1e-5)
    (loss,) = stage.losses(batch, 0)
    loss.values.mean().backward()
    weight = stage.model.unet.conv_in.weight
    assert (weight[:, 4:] == 0).all() and weight.grad is not None and (weight.grad[:, 4:] != 0).any()
    (row,) = forecast(settings)
    assert row.trained == sum(parameter.numel() for parameter in stage.model.unet.parameters())


# --- beside diffusers -------------------------------------------------------------------------------------------------


def theirs(stage: DenoiserStage, batch: Batch, root: Path) -> tuple[Any, Tensor]:
    """The U-Net of diffusers, and the loss of its training scripts on the same numbers."""
    stage.model.save_pretrained(root)
    vae = diffusers.AutoencoderKL.from_pretrained(root / "vae")
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(root / "unet").train()
    schedule: Any = diffusers.DDPMScheduler.from_pretrained(root / "scheduler")
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    noisy = schedule.add_noise(latents, draw.noise, draw.timestep)
    assert batch.pixels is not None
    with torch.no_grad():
        if stage.model.family.task == "edit":
            dropped = stage.dropout.images(stage.seed, batch.keys, batch.epochs)
            image = vae.encode(batch.beside["before"]).latent_dist.mode() * (~dropped)[:, None, None, None]
            x = torch.cat([noisy, image], dim=1)
        else:
            mask = (batch.beside["mask"] >= 0.5).float()
            known = vae.encode(batch.pixels * (mask < 0.5)).latent_dist
            drawn = torch.nn.functional.max_pool2d(mask, 4)
            eps = stage.latents(replace(batch, pixels=batch.pixels * (mask < 0.5), moments=None), "masked posterior")
            assert (eps / vae.config.scaling_factor - known.mean).abs().max() < 6 * known.std.max()
            x = torch.cat([noisy, drawn, eps], dim=1)
        missing = stage.dropout.captions(stage.seed, batch.keys, batch.epochs, 1)[:, 0].tolist()
        said = ["" if gone else text for text, gone in zip(batch.captions, missing, strict=True)]
        text = stage.model.encode_prompt(said).text
    made = unet(x, draw.timestep, encoder_hidden_states=text).sample
    return unet, torch.nn.functional.mse_loss(made, draw.noise)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_and_the_gradients_are_those_of_diffusers(
    shapes: Path, before: Path, start: Path, tmp_path: Path, task: str
) -> None:
    """One step as in train_instruct_pix2pix, or as inpainting models are trained; with captions and images dropped."""
    more = ["base.drop_caption=[0.3]", *(["base.drop_before=0.3", "base.drop_both=0.2"] if task == "edit" else [])]
    stage, batch = ready(chosen(task, shapes, before, start, tmp_path / "r", *more))
    with torch.no_grad():
        stage.model.unet.conv_in.weight[:, 4:].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    (loss,) = stage.losses(batch, 0)
    loss.values.mean().backward()
    unet, expected = theirs(stage, batch, tmp_path / "model")
    expected.backward()
    assert loss.values.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters()}
    for name, parameter in stage.model.unet.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_captions_and_images_are_dropped_as_often_as_asked() -> None:
    """As in the paper: each alone for about 5 %, both for 5 %."""
    dropout = ConditioningDropout((0.05,), image=0.05, both=0.05)
    keys, epochs = [f"{n}.png" for n in range(4000)], [0] * 4000
    texts, images = dropout.captions(0, keys, epochs, 1)[:, 0], dropout.images(0, keys, epochs)
    found = [
        (one & other).float().mean().item() for one, other in ((texts, ~images), (~texts, images), (texts, images))
    ]
    assert found == pytest.approx([0.05] * 3, abs=0.012)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_run_goes_on_and_its_result_opens_everywhere(
    shapes: Path, before: Path, start: Path, tmp_path: Path, task: str
) -> None:
    """Exactly where it stopped, with a cache; previews are edits; diffusers opens the folder as what it is."""
    more = ["data.cache=true", "base.steps=4", "base.save_every=2", "base.preview_every=4"]
    train(chosen(task, shapes, before, start, tmp_path / "whole", *more), make_images)
    assert sorted((tmp_path / "whole" / "base" / "previews").rglob("*.png"))
    train(chosen(task, shapes, before, start, tmp_path / "parts", *more, "base.steps=2"))
    train(chosen(task, shapes, before, start, tmp_path / "parts", *more))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    check_golden(f"base, {task}", losses(tmp_path / "whole"))
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "whole" / "base" / "model", safety_checker=None)
    name = {"inpaint": "StableDiffusionInpaintPipeline", "edit": "StableDiffusionInstructPix2PixPipeline"}[task]
    assert type(opened).__name__ == name and opened.unet.config.in_channels == CHANNELS[task]
    again = chosen(task, shapes, before, tmp_path / "whole" / "base" / "model", tmp_path / "more", "model.unet={}")
    assert ready(again)[0].model.unet.conv_in.in_channels == CHANNELS[task]  # and is trained further as it is


def test_it_learns_to_use_the_image_before_the_edit(shapes: Path, before: Path, start: Path, tmp_path: Path) -> None:
    """The loss falls, and is lower with the right image than with another."""
    more = [
        "base.steps=60", "base.optimizer.learning_rate=1e-2", "base.validate_every=60", "base.save_every=60",
        "base.drop_before=0", "base.drop_both=0",
    ]  # fmt: skip
    run = TrainingRun(chosen("edit", shapes, before, start, tmp_path / "r", *more), None, lambda *_: None)
    training = run.training("base", run.start("base", None), run.folder / "base")
    training.run()
    curve = losses(tmp_path / "r")
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    batch = next(training.batches(0))[0]
    other = replace(batch, beside={name: images.roll(1, 0) for name, images in batch.beside.items()})
    figures = [training.stage.validate([one])["loss"] for one in (batch, other)]
    assert figures[0] < figures[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.beside.before=null"], "data.beside.before: the U-Net of custom reads it; name a folder with the same"),
        (["model.unet={in_channels: 7}"], "the U-Net reads 7"),
        (["model.unet={in_channels: 8, layers: 2}"], "model.unet: the networks of .* cannot change shape"),
        (["base.prior.prompt=a shape"], "base.prior.prompt: class images have no before beside"),
        (["base.evaluation.every=2"], "base.evaluation.every: a U-Net that edits makes no images of captions alone"),
    ],
)
def test_wrong_settings(
    shapes: Path, before: Path, start: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(LdmError, match=message):
        ready(chosen("edit", shapes, before, start, tmp_path / "r", *overrides))


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        (
            "edit",
            ["model.unet={in_channels: 4}"],
            r"data.beside.before: .* set model.unet={in_channels: 8} ",
        ),
        (
            "inpaint",
            ["model.unet={}"],
            r"data.beside.mask: .* random masks .*model.unet={in_channels: 9} ",
        ),
        ("inpaint", ["base.outside_mask=0.1"], "base.outside_mask: the loss of a U-Net that inpaints is of the whole"),
        (
            "inpaint",
            ["base.drop_both=0"],
            "base.drop_both: the U-Net of .* reads no image before an edit; leave",
        ),
    ],
)
def test_settings_of_another_task(
    shapes: Path, before: Path, start: Path, tmp_path: Path, task: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(LdmError, match=message):
        ready(chosen(task, shapes, before, start, tmp_path / "r", *overrides))


def test_a_model_that_edits_is_not_made_to_read_less(shapes: Path, before: Path, start: Path, tmp_path: Path) -> None:
    wide = starting_model(ModelSection(source=str(start), unet={"in_channels": 9}), 0)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(LdmError, match=r"model.unet.in_channels is 8: the U-Net of .*wide reads 9; leave it out, or"):
        ready(chosen("edit", shapes, before, tmp_path / "wide", tmp_path / "r"))
