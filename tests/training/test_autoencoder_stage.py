"""Training an autoencoder: it learns, stops and goes on exactly, keeps gradients apart, measures its latents' scale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, VQModel
from launched import on_two
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.data.keyed import generator
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.evaluation.networks.lpips import LPIPS, save_lpips
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import Config, dump, load
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.run import train
from ldm.training.sections import ModelSection
from ldm.training.stages.autoencoder import HIGHEST, AutoencoderStage
from ldm.training.stages.sections import AutoencoderSection
from ldm.training.start import starting_model

CONFIGS = Path(__file__).parents[2] / "configs"
SIDE = 32
MODEL = {
    "family": "sd15",
    "unet": {
        "channels": [16] * 4, "heads": [2] * 4, "depth": [0] * 4, "mid_depth": 1, "text_dim": 16, "groups": 8,
    },
    "autoencoder": {"channels": [32, 32], "attention": [False] * 2, "layers": 1, "groups": 8, "mid_attention": False},
    "text": [{"width": 16, "layers": 1, "heads": 2, "hidden": 16, "vocab_size": 1000}],
}  # fmt: skip
SMALLER = {"channels": [8, 16], "groups": 4}
CODEBOOK = {"codebook": 64, "codebook_dim": 4}
ADVERSARY = {
    "adversarial_weight": 0.5, "adversarial_start": 0, "discriminator": {"channels": 8, "layers": 2, "groups": 4},
}  # fmt: skip
PLAIN = {"perceptual_weight": 0, "adversarial_weight": 0}
CLOCK = {"images_per_s", "waiting", "tflops"}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of smooth random colours."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(48):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of LPIPS with random weights."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_lpips(LPIPS("alex"), path, {})
    return str(path)


def model_section(**autoencoder: Any) -> ModelSection:
    return ModelSection.model_validate(MODEL | {"autoencoder": MODEL["autoencoder"] | autoencoder})


def configured(
    output: Path, images: Path, stage: dict[str, Any], model: dict[str, Any], precision: str = "no", **data: Any
) -> Config:
    section = {"batch": 8, "sizes": [{"size": SIDE}], "log_every": 1, "ema": {"decay": 0.9}, "measure": 100}
    return Config.model_validate({
        "output": str(output), "stages": ["autoencoder"], "trackers": [], "precision": precision,
        "model": model_section(**model),
        "data": {
            "source": str(images), "captions": "optional", "holdout": 16, "buckets": False, "bucket_step": SIDE,
            "workers": 0, **data,
        },
        "autoencoder": section | PLAIN | stage,
    })  # fmt: skip


def lines(output: Path) -> list[dict[str, float]]:
    """The log, without what the clock says."""
    text = (output / "autoencoder" / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in text.splitlines()]


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "autoencoder" / "done.json").read_text())["metrics"]


def vae_files(output: Path) -> Path:
    return output / "autoencoder" / "model" / "vae"


def made(
    section: dict[str, Any], model: dict[str, Any] = SMALLER, precision: str = "no", side: int = SIDE
) -> AutoencoderStage:
    """A stage without a run around it."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    return AutoencoderStage(
        AutoencoderSection.model_validate(PLAIN | section), starting_model(model_section(**model), 0), accelerator,
        0, [(side, side)], lambda: (),
    )  # fmt: skip


def batch(count: int = 8, first: int = 0) -> Batch:
    numbers = range(first, first + count)
    pixels = torch.stack([torch.rand(3, SIDE, SIDE, generator=generator(0, "pixels", n)) * 2 - 1 for n in numbers])
    rows = torch.zeros(count, 6)
    return Batch([f"{n}" for n in numbers], [0] * count, [""] * count, pixels, None, rows, rows[:, 0], rows[:, 0])


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def backward(stage: AutoencoderStage, batches: list[Batch], step: int = 0) -> dict[str, Tensor]:
    """Gradients of every player after a step's micro-batches, without an update."""
    for player in stage.players.values():
        player.module.zero_grad()
    for part in batches:
        for loss in stage.losses(part, step):
            (loss.values.mean() / len(batches)).backward()
    return {name: gradients(player.module) for name, player in stage.players.items()}


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codebook", "least"), [({}, 15.0), (CODEBOOK, 16.5)], ids=["kl", "vq"])
def test_it_learns(tmp_path: Path, images: Path, codebook: dict[str, int], least: float) -> None:
    """60 updates of 8 images; grey, the best that knows nothing of an image, has 12.8 dB."""
    stage = {"steps": 60, "validate_every": 60, "log_every": 20, "optimizer": {"learning_rate": 1e-3}}
    train(configured(tmp_path, images, stage, codebook))
    figures = lines(tmp_path)[-1]
    assert figures["validation/psnr"] > least
    assert figures["validation/ssim"] > 0.4
    assert "validation/lpips" not in figures
    written, known = json.loads((vae_files(tmp_path) / "config.json").read_text()), record(tmp_path)
    assert written["scaling_factor"] == known["scaling_factor"] not in (0.18215, 1.0)
    assert known["measured_on"] == "16 held-out images"
    assert known["psnr"] == figures["validation/psnr"]
    # the folder opens in diffusers, and does the same there
    theirs = (VQModel if codebook else AutoencoderKL).from_pretrained(vae_files(tmp_path))
    ours = LatentDiffusion.from_pretrained(tmp_path / "autoencoder" / "model").autoencoder
    x = batch(2).pixels
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).sample, ours.decode(ours.encode(x).mode()), rtol=1e-4, atol=1e-4)


def test_averages_are_what_is_saved(tmp_path: Path, images: Path) -> None:
    """Those of the autoencoder; the discriminator has none."""
    train(configured(tmp_path, images, {"steps": 3} | ADVERSARY, SMALLER))
    saved = load_file(vae_files(tmp_path) / "diffusion_pytorch_model.safetensors")["decoder.conv_out.weight"]
    checkpoint = tmp_path / "autoencoder" / "checkpoints" / "step-00000003"
    last = load_file(checkpoint / "model.safetensors")["autoencoder.decoder.conv_out.weight"]
    states = [torch.load(path) for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl"))]
    averages = [state["averages"][0] for state in states if "averages" in state]
    assert not torch.equal(saved, last)
    assert len(averages) == 1
    assert any(torch.equal(saved, tensor) for tensor in averages[0] if tensor.shape == saved.shape)


# --- the same run -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_goes_on_exactly(tmp_path: Path, images: Path) -> None:
    """With a discriminator, its weight, a moving codebook and vectors that are replaced."""
    stage = {"steps": 6, "save_every": 3, "validate_every": 2, "codebook_patience": 2} | ADVERSARY
    for name in ("whole", "killed"):

        def kill(_: str, step: int, __: int, figures: dict[str, float], name: str = name) -> None:
            if name == "killed" and step == 5:
                raise KeyboardInterrupt

        run = configured(tmp_path / name, images, stage, SMALLER | CODEBOOK)
        try:
            train(run, report=kill)
        except KeyboardInterrupt:
            assert lines(tmp_path / name)[-1]["step"] == 5
            train(run)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lines(whole) == lines(killed)
    assert lines(whole)[-2]["adaptive_weight"] > 0
    assert record(whole) == record(killed)
    for network in ("model.safetensors", "model_1.safetensors"):
        ours, theirs = (
            (path / "autoencoder" / "checkpoints" / "step-00000006" / network).read_bytes() for path in (whole, killed)
        )
        assert ours == theirs
    ours, theirs = (load_file(vae_files(path) / "diffusion_pytorch_model.safetensors") for path in (whole, killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("regularised", [{}, CODEBOOK], ids=["kl", "vq"])
def test_micro_batches_make_the_same_step(lpips: str, regularised: dict[str, int]) -> None:
    """The second step too, in which the discriminator has a weight and the codebook has moved."""
    whole, parts = (
        made(ADVERSARY | {"perceptual": lpips, "perceptual_weight": 1}, SMALLER | regularised) for _ in range(2)
    )
    for step in range(2):
        expected = backward(whole, [batch(8)], step)
        found = backward(parts, [batch(4), batch(4, first=4)], step)
        for name in expected:
            scale = expected[name].abs().max()
            torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=1e-3, atol=1e-4)
        figures = whole.updated(step + 1), parts.updated(step + 1)
        assert figures[0] == pytest.approx(figures[1])
    assert whole.adaptive.value > 0


def test_two_processes_take_the_path_of_one(tmp_path: Path, images: Path, lpips: str) -> None:
    """2×2×2 images and 1×8, in fp32: gradients, the discriminator's weight, codebook, figures, measures."""
    stage = {"steps": 3, "perceptual": lpips, "perceptual_weight": 1, "optimizer": {"learning_rate": 1e-4}} | ADVERSARY
    alone, together = (
        configured(tmp_path / name, images, stage | size, SMALLER | CODEBOOK)
        for name, size in (("alone", {}), ("together", {"micro_batch": 2}))
    )
    train(alone)
    (tmp_path / "run.yaml").write_text(dump(together))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom ldm.training.config import load\nfrom ldm.training.run import train\ntrain(load(sys.argv[1]))"
    )
    on_two(script, tmp_path / "run.yaml")
    for ours, theirs in zip(lines(tmp_path / "alone"), lines(tmp_path / "together"), strict=True):
        assert theirs == pytest.approx(ours, rel=2e-3, abs=1e-5)
    ours, theirs = record(tmp_path / "alone"), record(tmp_path / "together")
    assert theirs["measured_on"] == ours["measured_on"] == "16 held-out images"
    assert theirs["scaling_factor"] == pytest.approx(ours["scaling_factor"], rel=1e-3)
    assert theirs["latent_std"] == pytest.approx(ours["latent_std"], rel=1e-3)


@pytest.mark.parametrize("regularised", [{}, CODEBOOK], ids=["kl", "vq"])
def test_checkpointing_changes_nothing(regularised: dict[str, int]) -> None:
    found = []
    for recompute in (False, True):
        stage = made(ADVERSARY, SMALLER | regularised)
        stage.adaptive.value.fill_(2.0)
        if recompute:
            checkpointed(stage.players["autoencoder"].module)
        found.append(backward(stage, [batch()]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("regularised", [{}, CODEBOOK], ids=["kl", "vq"])
def test_half_precision(tmp_path: Path, images: Path, lpips: str, regularised: dict[str, int]) -> None:
    """bf16 with everything on takes the path of fp32, nearly."""
    stage = {"steps": 4, "checkpointing": True, "perceptual": lpips, "perceptual_weight": 1} | ADVERSARY
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(configured(tmp_path / precision, images, stage, SMALLER | regularised, precision))
    full, half = (lines(tmp_path / precision) for precision in ("no", "bf16"))
    for name in ("pixels", "perceptual", "loss/autoencoder", "loss/discriminator"):
        assert half[3][name] == pytest.approx(full[3][name], rel=0.1)
        assert half[3][name] != full[3][name]
    for name in ("psnr", "ssim", "lpips"):
        assert half[4][f"validation/{name}"] == pytest.approx(full[4][f"validation/{name}"], rel=0.1)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_each_loss_moves_its_own_player() -> None:
    stage = made(ADVERSARY)
    stage.adaptive.value.fill_(1.0)
    autoencoder, discriminator = (stage.players[name].module for name in ("autoencoder", "discriminator"))
    losses = stage.losses(batch(), 0)
    first = next(losses)
    first.values.backward()
    assert first.player == "autoencoder"
    assert all(p.grad is None for p in discriminator.parameters())
    before = gradients(autoencoder).clone()
    second = next(losses)
    second.values.backward()
    assert second.player == "discriminator"
    assert torch.equal(gradients(autoencoder), before)
    assert all(p.grad is not None for p in discriminator.parameters())
    assert next(losses, None) is None


def test_lpips_reaches_the_whole_autoencoder(lpips: str) -> None:
    found = {
        weight: backward(made({"perceptual": lpips, "perceptual_weight": weight}), [batch()]) for weight in (0.0, 1.0)
    }
    without = backward(made({}), [batch()])["autoencoder"]
    assert torch.equal(found[0.0]["autoencoder"], without)
    stage = made({"perceptual": lpips, "perceptual_weight": 1.0})
    loss = next(stage.losses(batch(), 0))
    loss.values.backward()
    for name, parameter in stage.model.autoencoder.named_parameters():
        assert parameter.grad is not None, name
    assert loss.report["perceptual"] > 0
    difference = (found[1.0]["autoencoder"] - without).norm() / without.norm()
    assert difference > 1e-3


def test_the_codebook_learns_by_gradient_too() -> None:
    for decay, has_gradient in ((0.0, True), (0.9, False)):
        stage = made({"codebook_decay": decay}, SMALLER | CODEBOOK)
        vectors = stage.model.autoencoder.quantize.embedding.weight
        before = vectors.clone()
        backward(stage, [batch()])
        assert (vectors.grad is not None) == has_gradient
        assert stage.updated(1).keys() == (set() if has_gradient else {"codebook/usage", "codebook/perplexity"})
        assert torch.equal(vectors, before) == has_gradient


def test_the_adversary_waits(tmp_path: Path, images: Path) -> None:
    """Until its start it does not move, for all its weight decay; then figures are means over the steps that have
    them."""
    stage = {"steps": 4, "save_every": 1, "keep": 9, "optimizer": {"weight_decay": 0.5}} | ADVERSARY
    for every in (1, 4):
        run = stage | {"adversarial_start": 2, "log_every": every}
        train(configured(tmp_path / str(every), images, run, SMALLER))
    folder = tmp_path / "1" / "autoencoder" / "checkpoints"
    weights = [(folder / f"step-0000000{step}" / "model_1.safetensors").read_bytes() for step in (1, 2, 3)]
    assert weights[0] == weights[1] != weights[2]
    each, together = lines(tmp_path / "1"), lines(tmp_path / "4")[0]
    assert ["real" in line for line in each[:4]] == [False, False, True, True]
    for name, steps in (("real", each[2:4]), ("pixels", each[:4])):
        assert together[name] == pytest.approx(np.mean([line[name] for line in steps]))


# --- measures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_the_scale_is_one_over_the_standard_deviation(shift: bool) -> None:
    stage = made({"measure": 11, "measure_shift": shift})
    autoencoder = stage.model.autoencoder
    known = stage.finish([batch(8), batch(8, first=8)])
    noise = torch.stack([torch.randn(4, 16, 16, generator=generator(0, "validation", f"{n}", 0)) for n in range(11)])
    with torch.no_grad():
        posterior = autoencoder.encode(batch(11).pixels)
    latents = (posterior.mean + posterior.std * noise).double()
    assert known["measured_on"] == "11 held-out images"
    assert known["scaling_factor"] == pytest.approx(1 / latents.std(correction=0).item(), rel=1e-5)
    assert known["shift_factor"] == (pytest.approx(latents.mean().item(), rel=1e-4) if shift else 0)
    assert known["latent_std"] == pytest.approx(latents.std((0, 2, 3), correction=0).tolist(), rel=1e-4)
    assert stage.model.family.autoencoder == autoencoder.config
    assert autoencoder.config.scaling_factor == known["scaling_factor"]
    assert autoencoder.config.shift_factor == known["shift_factor"]
    scaled = (latents - known["shift_factor"]) * known["scaling_factor"]
    assert scaled.std().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("codebook", [{}, CODEBOOK], ids=["kl", "vq"])
def test_the_decoder_alone_leaves_latents_as_they_are(tmp_path: Path, images: Path, codebook: dict[str, int]) -> None:
    fast = {"steps": 8, "optimizer": {"learning_rate": 1e-3}}
    train(configured(tmp_path / "whole", images, fast, codebook))
    source = tmp_path / "whole" / "autoencoder" / "model"
    settings = configured(tmp_path / "decoder", images, fast | {"decoder_only": True}, codebook)
    train(settings.model_copy(update={"model": ModelSection(source=str(source))}))
    before, after = (
        LatentDiffusion.from_pretrained(folder).autoencoder
        for folder in (source, tmp_path / "decoder" / "autoencoder" / "model")
    )
    x = batch(2).pixels
    assert torch.equal(after.encode(x).mode(), before.encode(x).mode())
    assert after.config == before.config  # the scale too
    assert record(tmp_path / "decoder")["psnr"] > record(tmp_path / "whole")["psnr"]
    with pytest.raises(LdmError, match="does not fit the configuration: another network"):
        train(configured(tmp_path / "decoder", images, fast | {"steps": 12}, codebook))


def test_noise_of_latents_is_each_image_s_own() -> None:
    plain, noisy = (made({"decoder_only": True, "latent_noise": level}) for level in (0.0, 0.5))

    def loss(stage: AutoencoderStage, *batches: Batch) -> float:
        return float(np.mean([next(iter(stage.losses(one, 1))).report["pixels"].item() for one in batches]))

    together = loss(noisy, batch(4))
    assert together == pytest.approx(loss(noisy, batch(2), batch(2, first=2)), rel=1e-5)
    assert abs(together - loss(plain, batch(4))) > 1e-4


def test_without_held_out_images_training_images_are_measured(tmp_path: Path, images: Path) -> None:
    train(configured(tmp_path, images, {"steps": 2, "measure": 12}, SMALLER, holdout=0))
    known = record(tmp_path)
    assert known["measured_on"] == "12 views of training images"
    assert "psnr" not in known
    assert json.loads((vae_files(tmp_path) / "config.json").read_text())["scaling_factor"] == known["scaling_factor"]


def test_figures_are_means_over_images(lpips: str) -> None:
    stage = made({"perceptual": lpips, "perceptual_weight": 2.0})
    whole = stage.validate([batch(6)])
    assert stage.validate([batch(5), batch(1, first=5)]) == pytest.approx(whole, rel=1e-4)
    x = batch(6).pixels
    with torch.no_grad():
        y = stage.model.autoencoder.decode(stage.model.autoencoder.encode(x).mode())
        distance = stage.perceptual(y, x).mean().item()
    errors = (y.clamp(-1, 1) - x).square().mean((1, 2, 3))
    assert whole["psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-4)
    assert whole["lpips"] == pytest.approx(distance, rel=1e-4)
    assert whole["loss"] == pytest.approx((y - x).abs().mean().item() + 2 * distance, rel=1e-4)
    assert stage.validate([]) == {}


def test_a_perfect_image_does_not_make_the_mean_infinite() -> None:
    stage = made({})
    nn.init.zeros_(stage.model.autoencoder.decoder.conv_out.weight)
    nn.init.constant_(stage.model.autoencoder.decoder.conv_out.bias, 2.0)  # all white
    white = batch(2)
    white.pixels.fill_(1.0)
    assert stage.validate([white])["psnr"] == HIGHEST


def test_previews_are_pairs(tmp_path: Path, images: Path) -> None:
    stage = made({})
    shown = stage.preview(batch(8), 1)
    assert [image.size for image in shown] == [(2 * SIDE, SIDE)] * 4
    left = np.asarray(shown[0].crop((0, 0, SIDE, SIDE)), np.float32) / 127.5 - 1
    assert np.abs(left - batch(1).pixels[0].permute(1, 2, 0).numpy()).max() < 0.01
    train(configured(tmp_path, images, {"steps": 1}, SMALLER))
    preview = Image.open(tmp_path / "autoencoder" / "previews" / "step-00000001.png")
    assert preview.size == (4 * SIDE, 2 * SIDE)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "model", "options", "message"),
    [
        ({"perceptual_weight": 1}, SMALLER, {}, "tools/fetch_weights.py), or set autoencoder.perceptual_weight=0"),
        ({"perceptual": "nowhere.safetensors"}, SMALLER, {}, "nowhere.safetensors"),
        (ADVERSARY, SMALLER, {"precision": "fp16"}, "set precision=bf16"),
        (ADVERSARY | {"compile": True}, SMALLER, {}, "autoencoder.compile"),
        (ADVERSARY | {"adversarial_start": 9, "steps": 9}, SMALLER, {}, "start is 9, but there are 9 steps"),
        (ADVERSARY | {"discriminator": {"layer": 2}}, SMALLER, {}, "autoencoder.discriminator.layer is not known"),
        ({"measure_shift": True}, SMALLER | CODEBOOK, {}, "measure_shift"),
        ({"latent_noise": 0.5}, SMALLER, {}, "set autoencoder.decoder_only=true"),
        ({}, SMALLER | {"in_channels": 4}, {}, "in_channels 4"),
        ({}, SMALLER, {"side": 8}, "8×8 pixels are too small for SSIM, which needs 11×11"),
        ({"adversarial_weight": 1}, SMALLER, {"side": 16}, "too small for the discriminator, which needs 24×24"),
        ({}, SMALLER | {"channels": [8] * 5, "attention": [False] * 5}, {"side": 24}, "autoencoder's factor 16"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    stage: dict[str, Any], model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LdmError) as caught:
        made(stage, model, **options)
    assert message in str(caught.value)


def test_images_too_small_for_lpips_are_refused(lpips: str) -> None:
    with pytest.raises(LdmError, match="24×24 pixels are too small for LPIPS, which needs 31×31"):
        made({"perceptual": lpips}, side=24)


def test_a_refused_run_has_not_begun(tmp_path: Path, images: Path) -> None:
    cases = (({"perceptual_weight": 1}, 8, "perceptual is not set"), ({}, 48, "leaves none to train with"))
    for options, holdout, message in cases:
        run = configured(tmp_path, images, options, SMALLER, holdout=holdout)
        with pytest.raises(LdmError, match=message):
            train(run)
    assert not (tmp_path / "autoencoder" / "metrics.jsonl").exists()


def test_one_image_is_enough(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "one" / "a.png")
    train(configured(tmp_path / "run", tmp_path / "one", {"steps": 2}, SMALLER, holdout=0))
    assert record(tmp_path / "run")["measured_on"] == "16 views of training images"


def test_the_configuration_runs(tmp_path: Path, images: Path, lpips: str) -> None:
    """That of Stable Diffusion's autoencoder, with small networks and images, for two steps."""
    stage = {
        "steps": 2, "batch": 4, "micro_batch": 2, "sizes": [{"size": 64}], "perceptual": lpips, "adversarial_start": 1,
        "log_every": 1, "optimizer.warmup": 1,
    }  # fmt: skip
    small = {"channels": [8] * 4, "layers": 1, "groups": 4}
    changes = {
        "output": str(tmp_path), "data.source": str(images), "data.holdout": 4, "data.upscale": 2, "data.workers": 0,
        "trackers": [], "model.unet": MODEL["unet"], "model.text": MODEL["text"], "model.autoencoder": small,
    }  # fmt: skip
    changes |= {f"autoencoder.{name}": value for name, value in stage.items()}
    config = load(CONFIGS / "autoencoder-f8.yaml", [f"{name}={json.dumps(value)}" for name, value in changes.items()])
    train(config)
    second, last = lines(tmp_path)[1:]
    assert {"kl", "perceptual", "adversarial", "loss/discriminator"} <= second.keys()
    assert last.keys() >= {"validation/psnr", "validation/lpips"}
