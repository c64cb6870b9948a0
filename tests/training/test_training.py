"""The parts of training: configuration, loss, drop-out, averages, learning rates, gradient checkpointing."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers.training_utils import compute_snr
from rounding import FACTOR, near

from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.models.unet import Conditioning
from ldm.process import NoiseSchedule
from ldm.training.conditioning import ConditioningDropout, Prompt, conditioning, encode, prompt
from ldm.training.config import describe, dump, load
from ldm.training.ema import Averages, coefficients, exponent, recombine
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.losses.diffusion import DiffusionLoss, Draw, Timesteps
from ldm.training.optimizers import lay_out_state, learning_rate, make_optimizer
from ldm.training.phases import phases
from ldm.training.sections import EmaSection, ModelSection, OptimizerSection
from ldm.training.start import starting_model

# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.stpes=3"], "base.stpes is not known; did you mean steps?"),
        (["base.steps=many"], "base.steps is 'many': input should be a valid integer"),
        (["base.steps=0"], "base.steps is 0: input should be greater than or equal to 1"),
        (["base.optimizer.learning_rate=.nan"], "base.optimizer.learning_rate"),
        (["stages=[bass]"], "stages.0 is 'bass'"),
        (["base.sizes=[{sise: 3}]"], "base.sizes.0.sise is not known; did you mean size?"),
        (["seed.x=3"], "seed is {'x': 3}"),
        (["base=3", "base.steps=1"], "base is 3; give it as a whole"),
        (["seed"], "'seed': write KEY=VALUE"),
        (["seed=[1"], "the value cannot be read"),
    ],
)
def test_wrong_keys_and_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(LdmError) as caught:
        load(None, overrides)
    assert message in str(caught.value)


def test_a_configuration_is_read_changed_and_written(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\nbase: {steps: 7, optimizer: {learning_rate: 1e-4}}\n")
    config = load(tmp_path / "c.yaml", ["base.batch=4", "base.sizes=[{size: 64}]"])
    assert (config.seed, config.base.steps, config.base.batch, config.base.sizes[0].size) == (3, 7, 4, 64)
    assert config.base.optimizer.learning_rate == 1e-4
    (tmp_path / "whole.yaml").write_text(dump(config))
    assert load(tmp_path / "whole.yaml") == config


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(LdmError, match="c.yaml"):
        load(tmp_path / "c.yaml")
    with pytest.raises(LdmError, match="cannot be read: No such file"):
        load(tmp_path / "missing.yaml")


def test_every_key_is_described() -> None:
    rows = {name: text for name, _, text in describe()}
    assert len(rows) > 100
    assert all(rows.values())


def test_a_model_is_built_with_changes() -> None:
    section = ModelSection(family="sd15", schedule={"prediction_type": "v_prediction", "zero_terminal_snr": True})
    section = section.model_copy(update=_tiny_fields())
    model = starting_model(section, seed=1)
    assert (model.family.name, model.family.schedule.zero_terminal_snr) == ("custom", True)
    assert model.family.unet.channels == (16, 32)
    for change, message in (
        ({"unet": {"chanels": [1]}}, "model.unet.chanels is not known; did you mean channels?"),
        ({"unet": {"channels": "wide"}}, "model.unet.channels is 'wide'"),
        ({"unet": {"channels": [33, 64, 64, 64]}}, "model.unet: U-Net: 33 channels do not divide"),
        ({"family": None}, "name a source to start from, or a family"),
        ({"text": [{}, {}]}, "model.text: 2 entries"),
        ({"schedule": {"zero_terminal_snr": True}}, "epsilon cannot be learned from pure noise"),
        (
            {"source": "somewhere", "unet": {"layers": 1}},
            "cannot change shape; leave it out, or begin anew: model.fresh=[unet]",
        ),
    ):
        with pytest.raises(LdmError) as caught:
            starting_model(ModelSection(**{"family": "sd15", **change}), seed=1)
        assert message in str(caught.value)


def _tiny_fields() -> dict[str, object]:
    return {
        "unet": {"channels": [16, 32], "depth": [1, 1], "heads": [2, 2], "groups": 8, "text_dim": 32, "layers": 1},
        "autoencoder": {"channels": [8, 16, 16], "attention": [False, False, False], "groups": 8},
        "text": [{"width": 32, "layers": 2, "heads": 4, "hidden": 64, "vocab_size": 1000}],
    }


def test_resolutions_follow_each_other() -> None:
    config = load(None, ["base.steps=10", "base.sizes=[{size: 256, steps: 4, batch: 64}, {size: 512}]"])
    found = phases(config.base)
    assert [(phase.first, phase.end, phase.size, phase.batch) for phase in found] == [(0, 4, 256, 64), (4, 10, 512, 32)]
    assert found[0].parts(4) == 1
    assert replace(found[0], micro_batch=4).parts(4) == 4
    assert replace(found[0], micro_batch=6).parts(4) == 4  # four at a time: six do not divide
    with pytest.raises(LdmError, match="a batch of 64 does not divide among 3 processes"):
        found[0].parts(3)
    with pytest.raises(LdmError, match="the steps of each but the last must be given"):
        phases(load(None, ["base.steps=10", "base.sizes=[{size: 256}, {size: 512}]"]).base)
    with pytest.raises(LdmError, match="add up to less than 10"):
        phases(load(None, ["base.steps=10", "base.sizes=[{size: 256, steps: 10}, {size: 512}]"]).base)


# --- the loss ---------------------------------------------------------------------------------------------------------


def _schedule(prediction: str) -> NoiseSchedule:
    return replace(FAMILIES["sd15"].schedule, prediction_type=prediction)


# diffusers multiplies a thousand factors in single precision; of √(1 - 0.99915) that leaves 3.7e-7 in doubt
SINGLE = FACTOR * 3.7e-7


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_diffusers(prediction: str) -> None:
    loss = DiffusionLoss(_schedule(prediction), Timesteps())
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    draw = Draw(noise, torch.tensor([0, 500, 999]))
    scheduler = _ddpm()
    near(loss.noisy(latents, draw), scheduler.add_noise(latents, noise, draw.timestep), SINGLE)
    wanted = {
        "epsilon": noise, "v_prediction": scheduler.get_velocity(latents, noise, draw.timestep), "sample": latents,
    }  # fmt: skip
    near(loss.target(latents, draw), wanted[prediction], SINGLE)
    errors = loss(torch.zeros_like(latents), latents, draw)
    torch.testing.assert_close(errors, (wanted[prediction] ** 2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction: str) -> None:
    """Hang et al. 2023: the loss of the predicted latents is weighted by min(SNR, γ); the others by what that makes."""
    loss = DiffusionLoss(_schedule(prediction), Timesteps(), min_snr=5.0)
    steps = torch.tensor([0, 100, 400, 700, 999])
    snr = compute_snr(_ddpm(), steps)
    capped = snr.clamp(max=5.0)
    wanted = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[prediction]
    torch.testing.assert_close(loss.weight(steps), wanted, rtol=1e-4, atol=1e-6)


def _ddpm() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_zero_terminal_snr() -> None:
    schedule = replace(_schedule("v_prediction"), zero_terminal_snr=True)
    loss = DiffusionLoss(schedule, Timesteps(), min_snr=5.0)
    latents, noise = torch.randn(2, 1, 4, 4, 4).unbind(0)
    last = Draw(noise, torch.tensor([999]))
    assert torch.equal(loss.noisy(latents, last), noise)
    torch.testing.assert_close(loss.target(latents, last), -latents)
    assert float(loss.weight(last.timestep)) == 0
    with pytest.raises(LdmError, match="timestep 999 is pure noise"):
        DiffusionLoss(replace(schedule, prediction_type="epsilon"), Timesteps())
    DiffusionLoss(replace(schedule, prediction_type="epsilon"), Timesteps(high=998))


def test_timesteps_are_distributed_as_asked() -> None:
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    uniform = Timesteps(100, 299).at(quantiles)
    assert (int(uniform.min()), int(uniform.max())) == (100, 299)
    assert torch.bincount(uniform).max() == torch.bincount(uniform)[100:].min() == 100
    cubic = Timesteps(distribution="cubic").at(quantiles).double()
    assert abs(float(cubic.mean()) - 749.5) < 1  # of 1 - q³
    assert float((cubic < 500).double().mean()) == pytest.approx(1 - 0.5 ** (1 / 3), abs=1e-3)
    normal = Timesteps(distribution="logit-normal", mean=0.5, std=0.8).at(quantiles).double() / 1000
    logits = torch.logit(normal.clamp(1e-4, 1 - 1e-4))
    assert abs(float(logits.mean()) - 0.5) < 0.01
    assert abs(float(logits.std()) - 0.8) < 0.01
    with pytest.raises(LdmError, match="must lie within 0 to 999"):
        DiffusionLoss(_schedule("epsilon"), Timesteps(0, 1000))


def test_noise_depends_on_the_sample_alone() -> None:
    loss = DiffusionLoss(_schedule("epsilon"), Timesteps(), noise_offset=0.1)
    together = loss.draw((4, 8, 8), 7, ["a", "b", "c"], [0, 0, 1])
    alone = loss.draw((4, 8, 8), 7, ["b"], [0])
    assert torch.equal(together.noise[1], alone.noise[0])
    assert together.timestep[1] == alone.timestep[0]
    other = loss.draw((4, 8, 8), 7, ["b"], [1])
    assert not torch.equal(other.noise, alone.noise)
    many = loss.draw((4, 8, 8), 7, [str(n) for n in range(500)], [0] * 500).noise
    assert abs(float(many.mean(dim=(2, 3)).var()) - (0.01 + 1 / 64)) < 0.002


# --- drop-out ---------------------------------------------------------------------------------------------------------


def test_captions_are_left_out_as_often_as_asked_and_not_always_the_same() -> None:
    keys = [f"image {n}" for n in range(4000)]
    drop = ConditioningDropout((0.1, 0.3), size=0.2)
    first, second = (drop.captions(0, keys, [epoch] * 4000, 2) for epoch in (0, 1))
    for rows in (first, second):
        assert rows.float().mean(dim=0).tolist() == pytest.approx([0.1, 0.3], abs=0.02)
    assert 0.02 < float((first[:, 0] != second[:, 0]).float().mean()) < 0.3
    both = float((first[:, 0] & first[:, 1]).float().mean())
    assert both == pytest.approx(0.03, abs=0.01)  # independent of each other
    together = ConditioningDropout((0.1,), together=True).captions(0, keys, [0] * 4000, 2)
    assert torch.equal(together[:, 0], together[:, 1])
    assert float(drop.sizes(0, keys, [0] * 4000).float().mean()) == pytest.approx(0.2, abs=0.02)


def _batch(captions: list[str]) -> Batch:
    size = torch.tensor([[600.0, 500, 10, 20, 64, 64]] * len(captions))
    scores = torch.tensor([float("nan"), 7.5][: len(captions)])
    keys, weights = [f"{n}" for n in range(len(captions))], torch.ones(len(captions))
    return Batch(keys, [0] * len(captions), captions, None, None, size, scores, weights)


def test_what_is_left_out_of_sdxl_is_zeros_and_of_sd15_an_empty_prompt() -> None:
    batch = _batch(["a cat", "a dog"])
    model = tiny.model("sdxl")
    with torch.no_grad():
        said = prompt(batch, model.family, ConditioningDropout((0.0,)), 0, 6.0)
        dropped = torch.tensor([[True, False], [False, True]])
        whole = conditioning(encode(model.text_encoders, said.texts), said, model.family)
        said = Prompt(said.texts, dropped, said.size)
        cond = conditioning(encode(model.text_encoders, said.texts), said, model.family)
    width = model.family.text[0].width
    assert cond.pooled is not None
    assert whole.pooled is not None
    assert not cond.text[0, :, :width].any()
    assert torch.equal(cond.text[0, :, width:], whole.text[0, :, width:])
    assert torch.equal(cond.text[1, :, :width], whole.text[1, :, :width])
    assert not cond.text[1, :, width:].any()
    assert torch.equal(cond.pooled[0], whole.pooled[0])
    assert not cond.pooled[1].any()
    said = prompt(batch, tiny.family("sd15"), ConditioningDropout((1.0,)), 0, 6.0)
    assert said.texts == [["", ""]]


def test_the_refiner_is_told_the_score_and_sizes_can_be_left_out() -> None:
    batch = _batch(["a cat", "a dog"])
    said = prompt(batch, tiny.family("sdxl-refiner"), ConditioningDropout((0.0,)), 0, 6.0)
    assert said.size is not None
    assert said.size.tolist() == [[600, 500, 10, 20, 6.0], [600, 500, 10, 20, 7.5]]
    said = prompt(batch, tiny.family("sdxl"), ConditioningDropout((0.0,), size=1.0), 0, 6.0)
    assert said.size is not None
    assert not said.size.any()
    assert prompt(batch, tiny.family("sd15"), ConditioningDropout(), 0, 6.0).size is None


# --- averages, learning rates, memory ---------------------------------------------------------------------------------


def test_an_exponential_average() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    averages = Averages(layer, EmaSection(decay=0.9, ramp=False))
    expected = 0.0
    for step in range(1, 6):
        layer.weight.data.fill_(float(step))
        averages.update(step)
        expected = 0.9 * expected + 0.1 * step
    with averages.in_place():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 5
    ramped = Averages(layer, EmaSection(decay=0.9999))
    layer.weight.data.fill_(6.0)
    ramped.update(1)
    with ramped.in_place():
        assert layer.weight.item() == pytest.approx(5 + (1 - 2 / 11))


def test_averages_of_any_width_can_be_made_afterwards(tmp_path: Path) -> None:
    """Karras et al. 2024: from snapshots at two widths, one that was kept as a check."""
    assert exponent(0.1) == pytest.approx(6.94, abs=0.005)
    layer = torch.nn.Linear(1, 1, bias=False)
    kept = Averages(layer, EmaSection(decay=0, widths=[0.05, 0.1]))
    check = Averages(layer, EmaSection(decay=0, widths=[0.07]))
    path = torch.randn(2000, generator=torch.Generator().manual_seed(0)).cumsum(0) / 20
    for step, value in enumerate(path, 1):
        layer.weight.data.fill_(float(value))
        kept.update(step)
        check.update(step)
        if step % 100 == 0:
            kept.save_snapshots(tmp_path, step)
    found = recombine(tmp_path, 0.07)["weight"]
    with check.in_place():
        assert float(found) == pytest.approx(layer.weight.item(), abs=3e-3)
    weights = coefficients([500, 1000], [0.1, 0.1], 1000, 0.1)
    assert weights.tolist() == pytest.approx([0, 1], abs=1e-9)
    with pytest.raises(LdmError, match="above 0 and below 0.288"):
        exponent(0.3)
    with pytest.raises(LdmError, match="has no snapshots"):
        recombine(tmp_path / "nothing", 0.1)


def test_learning_rates_depend_on_the_update_alone() -> None:
    section = OptimizerSection(schedule="cosine", warmup=10, final=0.1)
    rates = [learning_rate(section, step, 110) for step in range(1, 111)]
    assert rates[4] == 0.5
    assert rates[9] == 1
    assert rates[59] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    linear = OptimizerSection(schedule="linear", warmup=0)
    assert learning_rate(linear, 50, 100) == pytest.approx(0.5)
    assert learning_rate(OptimizerSection(), 100, 100) == 1


def test_a_longer_run_with_a_cooldown_begins_alike() -> None:
    section = OptimizerSection(schedule="linear", warmup=10, cooldown=20)
    short, long = ([learning_rate(section, step, steps) for step in range(1, steps + 1)] for steps in (100, 200))
    assert short[:80] == long[:80]
    assert short[9:80] == [1] * 71
    assert short[89] == pytest.approx(0.5)
    assert short[-1] == long[-1] == 0
    assert learning_rate(section, 15, 20) == pytest.approx(0.5)  # longer than what is left after the warm-up


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "muon"])
def test_optimisers_by_name(name: str) -> None:
    layer = torch.nn.Linear(4, 1)
    optimizer = make_optimizer(OptimizerSection(name=name), [(list(layer.parameters()), 0.1)])
    target = torch.ones(8, 1)
    first = None
    for _ in range(60):
        loss = ((layer(torch.ones(8, 4)) - target) ** 2).mean()
        first = float(loss) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.5 * first


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 4, 3, 3), (6,)])
def test_muon_is_as_pytorchs_for_matrices_and_adamw_for_vectors(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().flatten(min(1, start.ndim - 1)))
    section = OptimizerSection(name="muon", betas=(0.95, 0.99), weight_decay=0.1)
    mine = make_optimizer(section, [([ours], 0.02)])
    reference: torch.optim.Optimizer
    if len(shape) > 1:
        reference = torch.optim.Muon([theirs], 0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    else:
        reference = torch.optim.AdamW([theirs], 0.02, betas=(0.95, 0.99), weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient, gradient.reshape(theirs.shape).clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours.flatten(), theirs.flatten(), rtol=0, atol=2e-3)  # bf16 there
    assert (ours.flatten() - start.flatten()).abs().mean() > 0.005


def test_an_optimiser_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(LdmError, match="needs one more package: pip install bitsandbytes"):
        make_optimizer(OptimizerSection(name="adamw-8bit"), [([torch.nn.Parameter(torch.ones(1))], 0.1)])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    family = tiny.family(name)
    x = torch.randn(1, 4, 8, 8)
    text = torch.randn(1, 77, family.unet.text_dim)
    pooled = torch.randn(1, family.unet.pooled_dim) if family.unet.pooled_dim else None
    size = torch.ones(1, 6) if family.unet.pooled_dim else None
    gradients = []
    saved: list[int] = []
    for again in (False, True):
        unet = tiny.model(name).unet.train().requires_grad_(True)
        if again:
            checkpointed(unet)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = unet(x, torch.tensor([500]), Conditioning(text, pooled, size)).square().mean()
        saved.append(kept)
        loss.backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < 0.5 * saved[0]
    assert math.isfinite(float(loss))


def test_moments_lie_as_their_weights_do() -> None:
    """As after a run on a device where convolutions lie otherwise."""
    weights, there = (torch.nn.Parameter(torch.randn(8, 4, 3, 3)) for _ in range(2))
    there.data = weights.detach().clone(memory_format=torch.channels_last)
    section = OptimizerSection(name="adamw", learning_rate=0.01)
    ours, theirs = (make_optimizer(section, [([one], 0.01)]) for one in (weights, there))
    gradient = torch.randn(8, 4, 3, 3)
    there.grad = gradient.contiguous(memory_format=torch.channels_last)
    theirs.step()
    weights.data.copy_(there.data)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    lay_out_state(ours)
    for one, optimizer in ((weights, ours), (there, theirs)):
        one.grad = torch.empty_like(one).copy_(gradient)
        optimizer.step()
    torch.testing.assert_close(weights, there, rtol=1e-6, atol=1e-6)
