"""The stage `adapter`: what is trained, beside diffusers and peft; its files; after any stop; bad input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import inputs
from PIL import Image
from runs import DEEP, check_golden, interrupted, lines, losses, on_top, ready, whole_and_parts
from runs import _fresh_accelerator as _fresh_accelerator
from safetensors.torch import load_file
from torch import Tensor

from ldm.cli.train import make_images
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import Config
from ldm.training.folder import model_before, parents
from ldm.training.forecast import forecast
from ldm.training.frozen import EightBitLinear, matrices, uniform
from ldm.training.loop import Training
from ldm.training.run import TrainingRun, train
from ldm.training.stages.adapter import AdapterStage
from ldm.training.stages.adapter_file import write
from ldm.weights.adapters import open_adapter
from ldm.weights.tensors import LINEAGE, read_header
from pipelines import Pipeline
from pipelines.adapters import adapted
from pipelines.mixes import MixedAdapter

ADAPTER = [
    "stages=[adapter]", "adapter.steps=6", "adapter.batch=8", "adapter.sizes=[{size: 32}]", "adapter.rank=4",
    "adapter.log_every=1", "adapter.save_every=3", "adapter.validate_every=6", "adapter.preview_every=100",
    "adapter.optimizer.learning_rate=1e-2", "adapter.dtype=fp32",
]  # fmt: skip
TEXT = ["adapter.train_text=true", "adapter.text_learning_rate=[1e-2]"]
ALL = [
    *TEXT, "adapter.layers=[linear, convolutions]", "adapter.rank_dropout=0.3", "adapter.max_norm=0.5",
    "adapter.ema.decay=0.9", "adapter.up_rate=4",
]  # fmt: skip


TOWER = "width: 32, layers: 2, heads: 2, hidden: 32, vocab_size: 600, context: 16"
XL = [
    "model.family=sdxl", f"model.text=[{{{TOWER}}}, {{{TOWER}, projection: 24}}]", "model.unet.text_dim=64",
    "model.unet.pooled_dim=24", "model.unet.size_dim=8", "model.unet.mid_depth=1",
]  # fmt: skip


def settings(shapes: Path, output: Path, *overrides: str) -> Config:
    return on_top(shapes, output, ADAPTER, *overrides)


def start(chosen: Config) -> LatentDiffusion:
    return TrainingRun(chosen, None, lambda *_: None).start("adapter", None)


def stirred(training: Training) -> AdapterStage:
    """The stage with random numbers in the adapter."""
    stage = training.stage
    assert isinstance(stage, AdapterStage)
    with torch.no_grad():
        for parameter in stage.adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stage


def file_of(output: Path) -> Path:
    return output / "adapter" / "adapter.safetensors"


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], TEXT, ["adapter.kind=lokr"], ["adapter.dora=true"]], ids=["", "text", "k", "d"])
def test_the_model_stays_and_the_file_holds_the_change(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    chosen = settings(shapes, tmp_path / "r", *extra)
    training = ready(chosen)
    stage = training.stage
    assert isinstance(stage, AdapterStage)
    before = {name: one.detach().clone() for name, one in stage.model.unet.named_parameters()}
    training.run()
    assert all(torch.equal(before[name], one) for name, one in stage.model.unet.named_parameters())
    assert not any(one.requires_grad for network in stage.model.modules().values() for one in network.parameters())
    train(chosen)  # resumes at the end and writes
    model = start(settings(shapes, tmp_path / "s"))
    adapter = open_adapter(file_of(tmp_path / "r"), model)
    assert set(adapter.changes) == ({"unet", "text_encoder"} if extra == TEXT else {"unet"})
    mixed = MixedAdapter(adapter.name, adapter.file, adapter.digest, "", 1.0, 1.0, adapter)
    shown, again = stage.shown(), adapted(model, (mixed,))
    given = inputs(model.unet, torch.float32)
    with torch.no_grad():
        trained = stage.adapter.parts.unet(*given)
        assert torch.allclose(shown.unet(*given), trained, atol=1e-5)
        assert torch.allclose(again.unet(*given), trained, atol=1e-5)
        assert not torch.allclose(model.unet(*given), trained, atol=1e-3)
        if extra == TEXT:
            texts = [one.encode_prompt("a red circle").text for one in (stage.model, shown, again)]
            parts = stage.adapter.parts.text_encoders(["a red circle"]).text
            assert torch.allclose(texts[1], parts, atol=1e-5)
            assert torch.allclose(texts[2], parts, atol=1e-5)
            assert not torch.allclose(texts[0], parts, atol=1e-3)


def test_it_learns(shapes: Path, tmp_path: Path) -> None:
    """The random model's loss falls with changes of all layers alone."""
    chosen = settings(shapes, tmp_path / "r", "adapter.steps=60", "adapter.layers=[linear, convolutions]",
                      "adapter.validate_every=60", "adapter.save_every=60", "adapter.rank=8",
                      "adapter.log_every=10")  # fmt: skip
    train(chosen)
    curve = losses(tmp_path / "r", "adapter")
    assert curve[-1] < 0.8 * curve[0]


def test_the_loss_curve_is_the_golden_one(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "r", *ALL, DEEP, "adapter.min_snr=5"))
    check_golden("adapter", losses(tmp_path / "r", "adapter"))


def test_the_merged_adapter_makes_the_same_images(shapes: Path, tmp_path: Path) -> None:
    training = ready(settings(shapes, tmp_path / "r"))
    stage = stirred(training)
    write(stage, tmp_path, "{}")
    apart = stage.model.with_networks({"unet": stage.adapter.parts.unet})

    def images(model: LatentDiffusion, **options: Any) -> Tensor:
        asked = {"steps": 3, "seed": 0, "width": 32, "height": 32, "output": "latents", **options}
        pipeline = Pipeline(model, device="cpu", dtype=torch.float32)
        return torch.stack(pipeline(["a red circle", "a blue square"], **asked).latents)

    unmerged = images(apart)
    assert torch.allclose(images(stage.model, adapters=[tmp_path / "adapter.safetensors"]), unmerged, atol=1e-4)
    assert not torch.allclose(images(stage.model), unmerged, atol=1e-2)


def test_an_adapter_of_the_base_before_it(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "r", "stages=[base,adapter]", "base.steps=2"))
    lineage = json.loads(read_header(file_of(tmp_path / "r"))[1][LINEAGE])
    assert lineage["parents"] == [str(tmp_path / "r" / "base" / "model")]
    model = LatentDiffusion.from_pretrained(tmp_path / "r" / "base" / "model")
    assert open_adapter(file_of(tmp_path / "r"), model).changes["unet"]


@pytest.mark.parametrize("family", [[], XL], ids=["sd15", "sdxl"])
def test_the_loss_and_the_gradients_are_those_of_diffusers(shapes: Path, tmp_path: Path, family: list[str]) -> None:
    """One step of a LoRA of attention, in diffusers' U-Net with peft's layers, on the same latents, noise and text."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    training = ready(settings(shapes, tmp_path / "r", "adapter.drop_caption=[0]", *family))
    stage = stirred(training)
    write(stage, tmp_path, "{}")
    stage.model.save_pretrained(tmp_path / "model")
    batch = next(training.batches(0))[0]
    loss = next(iter(stage.losses(batch, 0)))
    loss.values.mean().backward()
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    encoded = stage.model.encode_prompt(batch.captions)
    added = {"text_embeds": encoded.pooled, "time_ids": batch.size} if family else None
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    state, network_alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "diffusers")[:2]
    unet.load_lora_adapter(state, network_alphas=network_alphas, prefix="unet")
    weights = {name: one for name, one in unet.named_parameters() if "lora" in name}
    for one in weights.values():
        one.requires_grad_(True)
    noisy = stage.loss.noisy(latents, draw)
    prediction = unet(noisy, draw.timestep, encoded.text, added_cond_kwargs=added).sample
    theirs = (prediction - draw.noise).square().mean()
    theirs.backward()
    assert loss.values.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    pairs = 0
    for place, change in stage.adapter.places.items():
        for ours, name in ((change.down, "lora_A"), (change.up, "lora_B")):
            found = next(one for key, one in weights.items() if key.startswith(f"{place.layer}.{name}."))
            assert torch.allclose(ours.grad, found.grad, rtol=1e-3, atol=1e-6), place
            pairs += 1
    assert pairs == len(weights)


def test_rates_are_those_of_the_parts(shapes: Path, tmp_path: Path) -> None:
    training = ready(settings(shapes, tmp_path / "r", "adapter.up_rate=16", "adapter.train_text=true",
                              "adapter.text_learning_rate=[2e-3]"))  # fmt: skip
    (player,) = training.stage.players.values()
    assert [group["highest"] for group in player.optimizer.param_groups] == [1e-2, 0.16, 2e-3, pytest.approx(0.032)]


def test_ranks_and_alphas_by_pattern(shapes: Path, tmp_path: Path) -> None:
    training = ready(settings(shapes, tmp_path / "r", "adapter.ranks={'attn2.to_[kv]': 2}", "adapter.alpha=2",
                              "adapter.alphas={to_q: 8}"))  # fmt: skip
    stage = training.stage
    assert isinstance(stage, AdapterStage)
    found = {place.layer: (len(change.down), change.scale) for place, change in stage.adapter.places.items()}
    assert {shape for layer, shape in found.items() if layer.endswith(("attn2.to_k", "attn2.to_v"))} == {(2, 1.0)}
    assert {shape for layer, shape in found.items() if layer.endswith("to_q")} == {(4, 2.0)}
    assert {shape for layer, shape in found.items() if layer.endswith("to_out.0")} == {(4, 0.5)}


@pytest.mark.parametrize("extra", [[], ["adapter.ema.decay=0.9"]], ids=["", "averages"])
def test_norms_stay_below_the_largest(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    train(settings(shapes, tmp_path / "r", "adapter.max_norm=0.05", *extra))
    model = start(settings(shapes, tmp_path / "s"))
    changes = open_adapter(file_of(tmp_path / "r"), model).changes["unet"]
    norms = [float(change.delta(model.unet.get_parameter(name)).norm()) for name, change in changes.items()]
    assert 0.04 < max(norms) < 0.0501
    assert any(row.get("norms/scaled", 0) > 0 for row in lines(tmp_path / "r", "adapter"))


# --- it goes on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [ALL, ["data.cache=true", "data.crops=2", "adapter.dora=true"], ["adapter.checkpointing=true"]],
    ids=["all", "cached", "checkpointing"],
)  # fmt: skip
def test_an_interrupted_adapter_ends_in_the_same_bytes(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    whole, parts = whole_and_parts(lambda output: settings(shapes, output, *extra), tmp_path)
    assert file_of(parts).read_bytes() == file_of(whole).read_bytes()
    (saved, *_) = (parts / "adapter" / "checkpoints").glob("*/model.safetensors")
    assert all(name.startswith("changes.") for name in load_file(saved))  # no frozen weights


def test_checkpointing_and_parts_change_nothing(shapes: Path, tmp_path: Path) -> None:
    curves = []
    for name, extra in {"a": [], "b": ["adapter.checkpointing=true"], "c": ["adapter.micro_batch=2"]}.items():
        train(settings(shapes, tmp_path / name, *ALL, *extra, "adapter.steps=3"))
        curves.append(losses(tmp_path / name, "adapter"))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [("adapter.rank=2", "adapter.rank is 2, not 4"), ("adapter.alpha=8", "adapter.alpha is 8.0, not None")],
)
def test_another_adapter_is_refused(shapes: Path, tmp_path: Path, override: str, message: str) -> None:
    interrupted(settings(shapes, tmp_path / "r"), after=5)
    with pytest.raises(LdmError, match=f"step-00000003 does not fit the configuration: {message}; set back what"):
        train(settings(shapes, tmp_path / "r", override))


# --- files, previews, memory ------------------------------------------------------------------------------------------


def test_the_header_says_how_it_was_trained(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "style", "adapter.alpha=2", "adapter.dtype=fp16"))
    infos, metadata = read_header(file_of(tmp_path / "style"))
    assert {str(info.dtype) for info in infos.values()} == {"torch.float16"}
    assert (metadata["ss_output_name"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "style",
        "4",
        "2.0",
    )
    assert metadata["ss_num_train_images"] == "44"
    assert json.loads(metadata["ss_tag_frequency"])["images"]["a red circle"] > 0
    lineage = json.loads(metadata[LINEAGE])
    assert (lineage["stage"], lineage["steps"], lineage["parents"]) == ("adapter", 6, ["sd15"])
    assert (tmp_path / "style" / "adapter" / "diffusers" / "pytorch_lora_weights.safetensors").exists()


def test_previews_show_the_adapter(shapes: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def watched(
        model: LatentDiffusion,
        prompts: list[str],
        size: tuple[int, int],
        seeds: Sequence[int],
        with_: Mapping[str, Any],
    ) -> list[Image.Image]:
        with torch.no_grad():
            torch.manual_seed(0)
            seen.append(model.unet(*inputs(model.unet, torch.float32)))
        return make_images(model, prompts, size, seeds, {"steps": 2})

    train(settings(shapes, tmp_path / "r", "adapter.preview_every=3"), watched)
    assert len(seen) == 2
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert Image.open(tmp_path / "r" / "adapter" / "previews" / "step-00000006.png").size[0] > 32


def test_a_preview_that_does_not_fit_is_left_out(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> list[Image.Image]:
        raise LdmError("out of memory with 1 images of 32×32 at a time; try 64×64 (--size)")

    train(settings(shapes, tmp_path / "r", "adapter.preview_every=6"), full)
    assert "no preview of step 6: out of memory" in caplog.text
    assert file_of(tmp_path / "r").exists()


def test_a_refiner_is_a_branch(shapes: Path, tmp_path: Path) -> None:
    chosen = settings(shapes, tmp_path / "r", "stages=[base,refiner,adapter,textual-inversion]")
    base = tmp_path / "r" / "base" / "model"
    assert [model_before(chosen, name) for name in chosen.stages] == [None, base, base, base]
    assert parents(chosen, "refiner") == [str(base), "sdxl-refiner"]
    assert parents(chosen, "textual-inversion") == [str(base)]


def test_weights_that_autocast_rounds_may_be_rounded_before() -> None:
    model = start_of_tiny()
    given = inputs(model.unet, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model.unet(*given)
    for weight in matrices(model.unet):
        weight.data = weight.data.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.unet(*given), before)
    even = uniform(model.unet)
    assert {weight.dtype for weight in even.parameters()} == {torch.bfloat16}
    assert len({weight.dtype for weight in model.unet.parameters()}) == 2


def start_of_tiny() -> LatentDiffusion:
    import tiny

    return tiny.model("sd15")


def test_16_bits_hold_the_frozen_weights(shapes: Path, tmp_path: Path) -> None:
    chosen = settings(shapes, tmp_path / "r", "precision=bf16", *TEXT)
    train(chosen, make_images)
    whole, half = (forecast(settings(shapes, tmp_path / "p", f"precision={name}"))[0] for name in ("no", "bf16"))
    stage = stirred(ready(settings(shapes, tmp_path / "q", "precision=bf16")))
    held = sum(p.nbytes for network in stage.model.modules().values() for p in network.parameters())
    assert half.weights == held + 4 * half.trained
    assert half.weights < 0.8 * whole.weights


def test_8_bits_hold_the_frozen_weights(shapes: Path, tmp_path: Path) -> None:
    layer = torch.nn.Linear(24, 32)
    rounded, x = EightBitLinear(layer.requires_grad_(False)), torch.randn(2, 5, 24, requires_grad=True)
    assert torch.allclose(rounded.plain().weight, layer.weight, atol=float(layer.weight.abs().max()) / 250)
    found = [torch.autograd.grad(one(x).square().sum(), x)[0] for one in (rounded, rounded.plain())]
    assert torch.allclose(*found, atol=1e-5)
    small = torch.nn.Linear(24, 32).requires_grad_(False).half()
    small.weight.mul_(1e-3)  # its steps are smaller than any normal number of fp16
    assert torch.allclose(
        EightBitLinear(small).plain().weight, small.weight, atol=float(small.weight.abs().max()) / 200
    )
    stage = stirred(ready(settings(shapes, tmp_path / "q", "adapter.quantize=int8-weights")))
    given = inputs(stage.model.unet, torch.float32)
    with torch.no_grad():
        assert torch.allclose(stage.shown().unet(*given), stage.adapter.parts.unet(*given), atol=1e-5)


def test_8_bits_take_less_memory(shapes: Path, tmp_path: Path) -> None:
    chosen = settings(
        shapes, tmp_path / "r", "adapter.quantize=int8-weights", "adapter.preview_every=3", "precision=bf16"
    )
    train(chosen, make_images)
    whole, eight = (
        forecast(settings(shapes, tmp_path / "p", "precision=bf16", *extra))[0].weights
        for extra in ([], ["adapter.quantize=int8-weights"])
    )
    stage = ready(chosen).stage
    layers = [one for one in stage.model.unet.modules() if isinstance(one, EightBitLinear)]
    assert 0 < whole - eight < sum(one.weight.nbytes for one in layers)


def test_previews_copy_what_the_forecast_says(shapes: Path, tmp_path: Path) -> None:
    """The changed weights in 16 bits; of LoRA beside 8 bits, its own matrices alone."""
    left = {}
    for name, extra in {"16": [], "8": ["adapter.quantize=int8-weights"]}.items():
        chosen = settings(shapes, tmp_path / name, "precision=bf16", *extra)
        stage = ready(chosen).stage
        assert isinstance(stage, AdapterStage)
        there = {p.data_ptr() for network in stage.model.modules().values() for p in network.parameters()}
        shown = [p for network in stage.shown().modules().values() for p in network.parameters()]
        copies = sum(p.nbytes for p in shown if p.data_ptr() not in there)
        left[name] = forecast(chosen)[0].previews - copies
        assert copies < (0.3 if extra else 1) * sum(p.nbytes for p in stage.model.unet.parameters())
    factors = 2 * sum(parameter.numel() for parameter in stage.adapter.parameters())
    assert 0 < left["16"] == left["8"] + factors  # what decoding an image needs


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.layers=[attn9]", "adapter.layers: attn9 matches no layer; write attention, transformers, linear"),
        ("adapter.ranks={ff.*: 2}", "adapter.ranks: ff.* matches none of the"),
        ("adapter.alphas={conv1: 2}", "adapter.alphas: conv1 matches none of the"),
        ("adapter.layers=['(']", "( is no regular expression"),
        ("adapter.text_learning_rate=[1e-3]", "the adapter has no text encoder; set train_text=true"),
        ("adapter.rank=0", "greater than or equal to 1"),
        ("adapter.alphas={attn2: 0}", "greater than 0"),
        ("adapter.lokr_factor=8", "adapter.lokr_factor is 8: value error, it is for lokr"),
        ("adapter.prior.weight=2", "adapter.prior.weight is 2: value error, class images need their prompt"),
        ("adapter.quantize=int4", "int8-weights"),
    ],
)
def test_bad_input(shapes: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(LdmError) as caught:
        ready(settings(shapes, tmp_path / "r", override))
    assert message in str(caught.value)


def test_unusable_images(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "one").mkdir()
    Image.open(next(shapes.glob("*.png"))).save(tmp_path / "one" / "a.png")
    own = [f"data.source={tmp_path / 'one'}", "data.holdout=0"]
    with pytest.raises(LdmError, match="1 of 1 images have no caption .*set trigger"):
        ready(settings(shapes, tmp_path / "r", *own))
    with pytest.raises(LdmError, match="all 1 images are too small for size 512"):
        train(settings(shapes, tmp_path / "s", *own, "data.trigger=sks", "adapter.sizes=[{size: 512}]"))
    with pytest.raises(LdmError, match="holding out 64 of 1 images leaves none to train with"):
        train(settings(shapes, tmp_path / "t", *own, "data.trigger=sks", "data.holdout=64"))
    train(settings(shapes, tmp_path / "u", *own, "data.trigger=sks", "adapter.steps=1"))  # one is enough
    assert "adapter: the batch at size 32 is 8, and" in caplog.text
    assert "has 1 images: each comes 8 times or more in one update, each time with its own noise" in caplog.text


@pytest.mark.parametrize("override", ["adapter.rank_dropout=0.1", "adapter.up_rate=16"])
@pytest.mark.parametrize("kind", ["adapter.kind=loha", "adapter.dora=true"])
def test_what_lora_alone_has(shapes: Path, tmp_path: Path, kind: str, override: str) -> None:
    with pytest.raises(LdmError, match="it is for plain lora"):
        settings(shapes, tmp_path / "r", kind, override)
