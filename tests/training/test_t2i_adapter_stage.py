"""The stage `t2i-adapter`: what is trained, beside diffusers; its files; after a stop; bad input."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from runs import DEEP, check_golden, losses, on_top, ready, whole_and_parts
from runs import _fresh_accelerator as _fresh_accelerator

from ldm.errors import LdmError
from ldm.training.config import Config
from ldm.training.run import train
from ldm.training.stages.control import ControlStage, write
from ldm.weights.control_models import open_control_model

T2I = [
    DEEP, "stages=[t2i-adapter]", "data.beside.condition=gray", "t2i-adapter.steps=6", "t2i-adapter.batch=8",
    "t2i-adapter.sizes=[{size: 32}]", "t2i-adapter.log_every=1", "t2i-adapter.save_every=3",
    "t2i-adapter.validate_every=6", "t2i-adapter.preview_every=100", "t2i-adapter.optimizer.learning_rate=1e-3",
    "t2i-adapter.dtype=fp32",
]  # fmt: skip


def settings(shapes: Path, output: Path, *overrides: str) -> Config:
    return on_top(shapes, output, T2I, *overrides)


@pytest.mark.parametrize("shape", [[], ["t2i-adapter.gray=true", "t2i-adapter.layers=1"]])
def test_the_loss_and_the_gradients_are_those_of_diffusers(shape: list[str], shapes: Path, tmp_path: Path) -> None:
    """One step as in diffusers' script, on the same latents, noise, text and condition images."""
    training = ready(settings(shapes, tmp_path / "r", "t2i-adapter.drop_caption=[0]", *shape))
    stage = training.stage
    assert isinstance(stage, ControlStage)
    write(stage, tmp_path, "{}")
    stage.model.save_pretrained(tmp_path / "model")
    batch = next(training.batches(0))[0]
    loss = next(iter(stage.losses(batch, 0)))
    loss.values.mean().backward()
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    text = stage.model.encode_prompt(batch.captions).text
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet").requires_grad_(False)
    adapter = diffusers.T2IAdapter.from_pretrained(tmp_path / "t2i-adapter").train()
    condition = batch.beside["condition"][:, : adapter.config.in_channels]  # all of its colours are gray
    made = unet(
        stage.loss.noisy(latents, draw), draw.timestep, encoder_hidden_states=text,
        down_intrablock_additional_residuals=adapter(condition),
    ).sample  # fmt: skip
    theirs = torch.nn.functional.mse_loss(made, draw.noise)
    theirs.backward()
    assert loss.values.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = {name: one.grad for name, one in adapter.named_parameters()}
    for name, parameter in stage.attachment.trained.named_parameters():
        assert torch.allclose(parameter.grad, gradients.pop(name), rtol=1e-3, atol=1e-6), name  # type: ignore[arg-type]
    assert not gradients


def test_the_model_stays_and_the_files_hold_the_network(shapes: Path, tmp_path: Path) -> None:
    chosen = settings(shapes, tmp_path / "r")
    training = ready(chosen)
    stage = training.stage
    assert isinstance(stage, ControlStage)
    before = {name: one.detach().clone() for name, one in stage.model.unet.named_parameters()}
    training.run()
    assert all(torch.equal(before[name], one) for name, one in stage.model.unet.named_parameters())
    train(chosen)  # resumes at the end and writes
    folder = tmp_path / "r" / "t2i-adapter" / "t2i-adapter"
    trained = stage.attachment.trained.state_dict()
    for source in (folder, folder.with_suffix(".safetensors")):
        found = open_control_model(source, stage.model.family).load(torch.float32)
        assert all(torch.equal(trained[name], weight) for name, weight in found.state_dict().items())


def test_it_learns(shapes: Path, tmp_path: Path) -> None:
    """The loss of a batch falls, if it is always the same."""
    training = ready(settings(shapes, tmp_path / "r", "t2i-adapter.optimizer.learning_rate=1e-2",
                              "t2i-adapter.optimizer.warmup=0",
                              "model.schedule={prediction_type: sample}"))  # fmt: skip
    batch = next(training.batches(0))[0]
    before = next(iter(training.stage.losses(batch, 0))).values.mean().item()
    for _ in range(40):
        training.train_step([batch])
    assert next(iter(training.stage.losses(batch, 0))).values.mean().item() < 0.93 * before


def test_an_interrupted_run_ends_in_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    extra = ["t2i-adapter.drop_condition=0.3", "t2i-adapter.ema.decay=0.9", "t2i-adapter.checkpointing=true"]
    whole, parts = whole_and_parts(lambda output: settings(shapes, output, *extra), tmp_path)
    file = Path("t2i-adapter") / "t2i-adapter.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()
    check_golden("t2i-adapter", losses(whole, "t2i-adapter"))


def test_sides_must_divide(shapes: Path, tmp_path: Path) -> None:
    """A level without transformers gets its map after it has halved the sides."""
    autoencoder = "{channels: [8, 16, 16, 16], attention: [false, false, false, false], layers: 1, groups: 8}"
    with pytest.raises(LdmError, match="reads images whose sides are multiples of 16, not 16×56"):
        ready(settings(shapes, tmp_path / "r", "model.unet.depth=[0,1]", f"model.autoencoder={autoencoder}"))


def test_the_shape_of_a_source_is_its_own(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="t2i-adapter.layers is 1: .*source has its own layers"):
        settings(shapes, tmp_path / "r", "t2i-adapter.source=mine", "t2i-adapter.layers=1")
