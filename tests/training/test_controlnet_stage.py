"""The stage `controlnet`: what is trained, beside diffusers; its files; after any stop; bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import controls
import diffusers
import pytest
import tiny
import torch
from PIL import Image
from runs import DEEP, check_golden, interrupted, losses, noting, on_top, ready, whole_and_parts
from runs import _fresh_accelerator as _fresh_accelerator
from torch import Tensor

from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import Config
from ldm.training.loop import Training
from ldm.training.run import TrainingRun, train
from ldm.training.stages.control import ControlStage, write
from ldm.training.stages.controlnet import config_for
from ldm.weights.control_models import open_control_model
from ldm.weights.tensors import LINEAGE, read_header
from pipelines import Pipeline

CONTROL = [
    "stages=[controlnet]", "data.beside.condition=gray", "controlnet.steps=6", "controlnet.batch=8",
    "controlnet.sizes=[{size: 32}]", "controlnet.log_every=1", "controlnet.save_every=3", "controlnet.validate_every=6",
    "controlnet.preview_every=100", "controlnet.optimizer.learning_rate=1e-3", "controlnet.dtype=fp32",
]  # fmt: skip
ALL = ["controlnet.drop_condition=0.3", "controlnet.ema.decay=0.9"]


def settings(shapes: Path, output: Path, *overrides: str) -> Config:
    return on_top(shapes, output, CONTROL, *overrides)


def stirred(training: Training) -> tuple[ControlStage, ControlNet]:
    """The stage with random numbers in the ControlNet."""
    stage = training.stage
    assert isinstance(stage, ControlStage)
    network = stage.attachment.trained
    assert isinstance(network, ControlNet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stage, network


def prediction(stage: ControlStage, batch: Batch) -> tuple[Tensor, Tensor]:
    """The prediction of a step, with the ControlNet and without."""
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    said = stage.said(batch, stage.no_dropout)
    with torch.no_grad(), stage.accelerator.autocast():
        modules = (stage.players["unet"].module, stage.model.unet)
        found = [stage.predict(module, stage.loss.noisy(latents, draw), draw.timestep, said) for module in modules]
    return found[0].float(), found[1].float()


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_first_step_gives_what_the_model_gives(shapes: Path, tmp_path: Path, precision: str) -> None:
    training = ready(settings(shapes, tmp_path / "r", f"precision={precision}"))
    stage, batch = training.stage, next(training.batches(0))[0]
    assert isinstance(stage, ControlStage)
    controlled, alone = prediction(stage, batch)
    assert torch.equal(controlled, alone)
    stage, _ = stirred(training)
    assert not torch.allclose(prediction(stage, batch)[0], alone, atol=1e-2)


def test_the_model_stays_and_the_files_hold_the_network(shapes: Path, tmp_path: Path) -> None:
    """Both files are read here, and diffusers makes the same image with the folder."""
    chosen = settings(shapes, tmp_path / "r")
    training = ready(chosen)
    stage = training.stage
    assert isinstance(stage, ControlStage)
    before = {name: one.detach().clone() for name, one in stage.model.unet.named_parameters()}
    training.run()
    assert all(torch.equal(before[name], one) for name, one in stage.model.unet.named_parameters())
    assert not any(one.requires_grad for network in stage.model.modules().values() for one in network.parameters())
    train(chosen)  # resumes at the end and writes
    folder = tmp_path / "r" / "controlnet" / "controlnet"
    trained = stage.attachment.trained.state_dict()
    for source in (folder, folder.with_suffix(".safetensors")):
        found = open_control_model(source, stage.model.family).load(torch.float32)
        assert all(torch.equal(trained[name], weight) for name, weight in found.state_dict().items())
    assert "control_model.zero_convs.0.0.weight" in read_header(folder.with_suffix(".safetensors"))[0]
    lineage = json.loads(read_header(folder / "diffusion_pytorch_model.safetensors")[1][LINEAGE])
    assert (lineage["stage"], lineage["steps"], lineage["parents"]) == ("controlnet", 6, ["sd15"])


def test_diffusers_makes_the_same_image(tmp_path: Path) -> None:
    model, network = tiny.model("sd15"), controls.controlnet(tiny.family("sd15"), image_channels=(16, 32, 96, 256))
    model.save_pretrained(tmp_path / "model")

    class Stage:
        name = "controlnet"
        section = type("Section", (), {"dtype": "fp32"})()
        attachment = type("Attachment", (), {"trained": network})()

    write(Stage(), tmp_path, "{}")  # type: ignore[arg-type]
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    made = Pipeline(
        tmp_path / "model", control_models=tmp_path / "controlnet", dtype=torch.float32, device="cpu", quick=False
    )("a cat", control=image, steps=2, seed=3, rng="diffusers", weights=False, output="latents").latents  # fmt: skip
    loaded = diffusers.ControlNetModel.from_pretrained(tmp_path / "controlnet")
    pipeline: Any = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "model", controlnet=loaded)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat", image=image, num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="latent"
    ).images
    assert torch.allclose(torch.stack(list(made)), theirs, atol=1e-4)


def test_the_loss_and_the_gradients_are_those_of_diffusers(shapes: Path, tmp_path: Path) -> None:
    """One step as in diffusers' script, on the same latents, noise, text and condition images."""
    training = ready(settings(shapes, tmp_path / "r", "controlnet.drop_caption=[0]"))
    stage, network = stirred(training)
    write(stage, tmp_path, "{}")
    stage.model.save_pretrained(tmp_path / "model")
    batch = next(training.batches(0))[0]
    loss = next(iter(stage.losses(batch, 0)))
    loss.values.mean().backward()
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    text = stage.model.encode_prompt(batch.captions).text
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet").requires_grad_(False)
    control = diffusers.ControlNetModel.from_pretrained(tmp_path / "controlnet").train()
    noisy = stage.loss.noisy(latents, draw)
    down, middle = control(
        noisy, draw.timestep, encoder_hidden_states=text, controlnet_cond=batch.beside["condition"], return_dict=False
    )
    made = unet(
        noisy, draw.timestep, encoder_hidden_states=text, down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample  # fmt: skip
    theirs = torch.nn.functional.mse_loss(made, draw.noise)
    theirs.backward()
    assert loss.values.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = {name: one.grad for name, one in control.named_parameters()}
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.grad, gradients.pop(name), rtol=1e-3, atol=1e-6), name  # type: ignore[arg-type]
    assert not gradients


def test_it_learns(shapes: Path, tmp_path: Path) -> None:
    """The loss falls, and the condition image comes to matter."""
    chosen = settings(shapes, tmp_path / "r", "controlnet.steps=60", "controlnet.validate_every=60",
                      "controlnet.optimizer.learning_rate=1e-2", "controlnet.save_every=60")  # fmt: skip
    training = ready(chosen)
    training.run()
    curve = losses(tmp_path / "r", "controlnet")
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    batch = next(training.batches(0))[0]
    others = replace(batch, beside={name: images.roll(1, 0) for name, images in batch.beside.items()})
    figures = [training.stage.validate([one])["loss"] for one in (batch, others)]
    assert figures[0] != figures[1]


def test_the_loss_curve_is_the_golden_one(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "r", *ALL, DEEP))
    check_golden("controlnet", losses(tmp_path / "r", "controlnet"))


# --- it goes on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [ALL, ["data.cache=true", "data.crops=2"], ["controlnet.checkpointing=true"]],
    ids=["all", "cached", "checkpointing"],
)  # fmt: skip
def test_an_interrupted_run_ends_in_the_same_bytes(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    whole, parts = whole_and_parts(lambda output: settings(shapes, output, *extra), tmp_path)
    file = Path("controlnet") / "controlnet.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()


def test_checkpointing_and_parts_change_nothing(shapes: Path, tmp_path: Path) -> None:
    curves = []
    for name, extra in {"a": [], "b": ["controlnet.checkpointing=true"], "c": ["controlnet.micro_batch=2"]}.items():
        train(settings(shapes, tmp_path / name, *ALL, *extra, "controlnet.steps=3"))
        curves.append(losses(tmp_path / name, "controlnet"))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_the_network_that_runs_is_the_one_that_is_compiled(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def compiled(call: Any, **_: Any) -> Any:
        def counted(*inputs: Any) -> Any:
            calls.append(call.__self__)
            return call(*inputs)

        return counted

    monkeypatch.setattr("ldm.training.run.check_compiling", lambda device: None)
    monkeypatch.setattr(torch, "compile", compiled)
    training = ready(settings(shapes, tmp_path / "r", "controlnet.compile=true"))
    next(iter(training.stage.losses(next(training.batches(0))[0], 0)))
    assert calls == [training.stage.players["unet"].network]
    assert calls[0].unet.config == training.stage.model.unet.config


def test_it_begins_with_a_source(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "r"))
    source = tmp_path / "r" / "controlnet" / "controlnet"
    stage = ready(settings(shapes, tmp_path / "s", f"controlnet.source={source}")).stage
    assert isinstance(stage, ControlStage)
    written = open_control_model(source, stage.model.family).load(torch.float32).state_dict()
    assert all(torch.equal(written[name], one) for name, one in stage.attachment.trained.state_dict().items())
    train(settings(shapes, tmp_path / "t", f"controlnet.source={source}", "controlnet.steps=1"))


def test_another_shape_is_named(shapes: Path, tmp_path: Path) -> None:
    interrupted(settings(shapes, tmp_path / "r"), after=5)
    family = TrainingRun(settings(shapes, tmp_path / "x"), None, lambda *_: None).start("controlnet", None).family
    controls.folder(ControlNet(replace(config_for(family), image_channels=(16, 24, 96))), tmp_path / "other")
    told = r"image_channels of the network \(controlnet.source, model.unet\) is \(16, 24, 96\), not \(16, 32, 96\); set"
    with pytest.raises(LdmError, match=told):
        train(settings(shapes, tmp_path / "r", f"controlnet.source={tmp_path / 'other'}"))


# --- previews, bad input ----------------------------------------------------------------------------------------------


def test_previews_show_condition_control_and_none(shapes: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    train(settings(shapes, tmp_path / "r", "controlnet.preview_every=6", "precision=bf16"), noting(seen))
    assert seen == [["batch", "control", "control_models", "steps"], ["batch", "steps"]] * 4
    preview = Image.open(tmp_path / "r" / "controlnet" / "previews" / "step-00000006.png")
    assert preview.width == 2 * 3 * preview.height // 2 == 192


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.beside.condition=null"], "data.beside.condition: the stage controlnet reads it; name a folder"),
        (
            ["data.beside.condition=null", "data.stream=true"],
            "data.beside.condition: the stage controlnet reads it; a stream has no images beside its own; copy it",
        ),
        (["controlnet.train_text=true"], "the text encoders stay as they are here; leave it out"),
        (["controlnet.source=nowhere"], "controlnet.source: nowhere does not exist"),
        (["controlnet.source=ADAPTER"], "ADAPTER is a T2I-Adapter, for the stage t2i-adapter"),
        (["controlnet.source=OTHER"], "controlnet.source: OTHER is a ControlNet for no family known here"),
        (
            ["controlnet.evaluation.every=5"],
            "controlnet.evaluation.every: the stage controlnet trains what makes no",
        ),
    ],
)
def test_bad_input(shapes: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    places = {name: str(tmp_path / name) for name in ("ADAPTER", "OTHER")}
    controls.folder(controls.controlnet(tiny.family("sd15")), tmp_path / "OTHER")
    family = TrainingRun(settings(shapes, tmp_path / "x", DEEP), None, lambda *_: None).start("controlnet", None).family
    adapter = controls.T2IAdapter(controls.T2IAdapterConfig(family.unet.channels, (False, True), factor=4))
    controls.folder(adapter, tmp_path / "ADAPTER")
    for name, place in places.items():
        overrides = [override.replace(name, place) for override in overrides]
        message = message.replace(name, place)
    with pytest.raises(LdmError) as caught:
        chosen = settings(shapes, tmp_path / "r", DEEP, *overrides)
        check_bounds(chosen)
        check_paths(chosen)
        train(chosen)
    assert message in str(caught.value)
