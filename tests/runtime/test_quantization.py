"""Weights of 8 bits: nearly the same images, by the layers that are meant alone, and nothing else is misled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import run
from networks import distance, inputs, runs
from torch import nn

from ldm.bench import sides
from ldm.bench.options import OURS, BenchOptions, Call
from ldm.errors import LdmError
from ldm.images import load_image, read_settings, save_png
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.layers import TransformerBlock
from ldm.models.surgery import twin
from ldm.models.unet import UNet
from ldm.runtime import quantization
from ldm.runtime.fused_cpu import CPUGEGLU, fuse
from ldm.runtime.kernels import layers as kernels
from ldm.runtime.precomputing import precomputed
from ldm.runtime.quantization import quantize
from ldm.sampling.guidance import Guidance
from pipelines import Pipeline

INT8 = ["int8", "int8-weights"]
BF16, CPU = torch.bfloat16, torch.device("cpu")


def quantised(unet: UNet) -> set[str]:
    """Names of the weights that are not plain."""
    return {name for name, weight in unet.named_parameters() if type(weight) is not nn.Parameter}


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "emoji"])
def test_a_unet_gives_nearly_the_same(family: str, dtype: torch.dtype, name: str) -> None:
    unet = tiny.model(family, shallow=True).unet.to(dtype)
    x, t, cond = inputs(unet, dtype)
    cond.text[1] = 0  # as SDXL's empty negative prompt
    with torch.inference_mode():
        wanted = unet(x, t, cond)
        count = quantize(unet, name)
        made = unet(x, t, cond)
        assert 1e-5 < distance(made, wanted) < 0.03
        assert torch.equal(precomputed(unet, cond)(x, t, cond), made)
        assert torch.equal(twin(unet)(x, t, cond), made)
    assert count == len(quantised(unet))


def test_fp8_gives_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers, not its speed: the CPU has products of that type too, but torchao does not want them there."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    config = quantization._config("fp8", CPU)
    problem = quantization._try(config, CPU, BF16)
    if "per-tensor scaling" in problem:
        pytest.skip("older versions of PyTorch have them with one scale alone")
    assert problem == ""
    monkeypatch.setattr(quantization, "check_quantize", lambda *arguments: config)
    unet = tiny.model("sdxl", shallow=True).unet.to(BF16)
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.data[5] = 0
    x, t, cond = inputs(unet, BF16)
    cond.text[1] = 0
    with torch.inference_mode():
        wanted = unet(x, t, cond)
        quantize(unet, "fp8")
        made = unet(x, t, cond)
        assert distance(made, wanted) < 0.06
        assert torch.equal(precomputed(unet, cond)(x, t, cond), made)


def test_which_layers() -> None:
    """All linear layers in transformer blocks, and nothing else."""
    unet = tiny.model("sdxl", shallow=True).unet
    plain = {name for name, weight in unet.named_parameters() if weight.ndim == 2 and ".transformer_blocks." in name}
    assert any(".attn1.to_q." in name for name in plain) and any(".ff.net.0.proj." in name for name in plain)
    quantize(unet, "int8-weights")
    assert quantised(unet) == plain
    assert not any(name.startswith(("conv_", "time_embedding", "add_embedding")) for name in plain)


@pytest.mark.parametrize("name", INT8)
def test_half_the_memory(name: str) -> None:
    """Of bf16: a byte a number, and a scale of four for each row."""
    unet = tiny.model("sd15", shallow=True).unet.to(BF16)
    before = {name: weight.nbytes for name, weight in unet.named_parameters()}
    quantize(unet, name)
    for key, weight in unet.named_parameters():
        if key in quantised(unet):
            parts = [getattr(weight, part) for part in ("qdata", "scale", "zero_point")]
            nbytes = sum(part.nbytes for part in parts if part is not None)
            assert nbytes <= before[key] / 2 + 5 * len(weight)


def test_widths_that_do_not_fit_are_passed_over() -> None:
    block = TransformerBlock(32, 4, text_dim=40)
    assert quantize(block, "int8") == 8
    assert type(block.attn2.to_k.weight) is type(block.attn2.to_v.weight) is nn.Parameter
    with pytest.raises(LdmError, match="no layer can be quantised"):
        quantize(block, "int8")
    with pytest.raises(LdmError, match="no layer can be quantised"):
        quantize(TransformerBlock(24, 4, text_dim=40), "int8")


@runs
@pytest.mark.parametrize("name", INT8)
def test_kernels_of_our_own_leave_them_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised weights call themselves bf16 on the CPU, but there is nothing where they are said to be."""
    unet = tiny.model("sd15", shallow=True).unet.to(BF16)
    fuse(unet)
    x, t, cond = inputs(unet, BF16)
    calls: list[object] = []
    own = kernels.geglu
    monkeypatch.setattr(kernels, "geglu", lambda *arguments: calls.append(arguments) or own(*arguments))
    with torch.inference_mode():
        wanted = unet(x, t, cond)
        assert calls
        calls.clear()
        quantize(unet, name)
        assert distance(unet(x, t, cond), wanted) < 0.03
    assert any(isinstance(module, CPUGEGLU) for module in unet.modules())
    assert not calls


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "int8-weights"), (BF16, "int8")])
def test_images(models: Path, dtype: torch.dtype, name: str) -> None:
    """With all that the U-Net is wrapped in: guidance, a twin for perturbed attention, reuse, and a refiner."""
    settings: dict[str, Any] = {"steps": 4, "seed": 3, "refiner_at": 0.5, "reuse": 2, "guidance": 3.0}
    made = []
    for option in (None, name):
        pipeline = Pipeline(
            models / "sdxl", refiner=models / "sdxl-refiner", device="cpu", dtype=dtype, quantize=option
        )
        result = pipeline("a fox", **settings)
        assert torch.equal(result.latents[0], pipeline("a fox", **settings).latents[0])
        made.append(result)
        refiner = pipeline.refiner
        assert refiner is not None
        assert bool(quantised(refiner.unet)) is bool(quantised(pipeline.model.unet)) is (option is not None)
    assert 0 < distance(made[1].latents[0], made[0].latents[0]) < 0.05
    a, b = (np.asarray(result.images[0]).astype(float) for result in made)
    assert 10 * np.log10(255**2 / np.square(a - b).mean()) > 30


def test_a_perturbed_twin(models: Path) -> None:
    plain, other = (
        Pipeline(models / "sd15", device="cpu", dtype=torch.float32, quantize=name) for name in (None, "int8")
    )
    guidance = Guidance(3.0, perturbed=2.0)
    a, b = (one("a fox", steps=2, seed=1, guidance=guidance).latents[0] for one in (plain, other))
    assert 0 < distance(b, a) < 0.05


def test_weights_are_known_by_what_they_were_and_not_written(models: Path, tmp_path: Path) -> None:
    model = Pipeline(models / "sd15", device="cpu", quantize="int8").model
    plain = Pipeline(models / "sd15", device="cpu").model
    assert model.fingerprint() == plain.fingerprint()
    for target in (tmp_path / "folder", tmp_path / "file.safetensors"):
        with pytest.raises(LdmError, match="quantised weights cannot be written"):
            model.save_pretrained(target)
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_stays_as_it_is(models: Path) -> None:
    model = LatentDiffusion.from_pretrained(models / "sdxl")
    with pytest.raises(LdmError, match="quantize 'int8': a model that is loaded already stays as it is"):
        Pipeline(model, quantize="int8")
    with pytest.raises(LdmError, match="loaded already"):
        Pipeline(models / "sdxl", refiner=tiny.model("sdxl-refiner", shallow=True), device="cpu", quantize="int8")
    assert not quantised(model.unet)
    assert quantised(Pipeline(Pipeline(models / "sdxl", device="cpu", quantize="int8").model).model.unet)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4", "quantize 'int4' is not known; choose one of: int8, int8-weights, fp8"),
        ("fp8", "capability 8.9 or more"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)
    with pytest.raises(LdmError, match=message):
        Pipeline(models / "sd15", device="cpu", quantize=name)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in INT8:
        with pytest.raises(LdmError, match="needs the package torchao .*: pip install -U torchao"):
            quantize(tiny.model("sd15", shallow=True).unet, name)


def test_an_image_says_so_and_is_made_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        return run(capsys, monkeypatch, *arguments)

    monkeypatch.chdir(tmp_path)
    common = ("generate", "a fox", "--model", models / "sd15", "--device", "cpu", "--steps", 3, "--seed", 1)
    for name in ("int8", None):
        option = ("--quantize", name) if name else ()
        assert call(*common, *option, "--out", f"{name}.png")[0] == 0
        record, parameters = read_settings(tmp_path / f"{name}.png")
        assert record is not None and record.get("quantize") == name
        assert call("repro", f"{name}.png", "--device", "cpu")[1].startswith("identical")
        if name:
            del record["quantize"]
            save_png(load_image(tmp_path / f"{name}.png"), tmp_path / "other.png", record, parameters)
            assert call("repro", "other.png", "--device", "cpu")[1].startswith("different")
    message = "ldm: --quantize 'int9': int8, int8-weights or fp8 is needed\n"
    assert call(*common, "--quantize", "int9", "--out", "c.png") == (1, "", message)


def test_bench_measures_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours alone; the others keep the weights as they are."""
    seen: list[LatentDiffusion] = []
    monkeypatch.setattr(sides, "ours", lambda model, call: seen.append(model))
    options, call = BenchOptions(str(models / "sd15"), quantize="int8"), Call(64, 64, 1, 5.0)
    for name in (OURS, "plain"):
        sides.make_side(name, options, call, torch.device("cpu"), torch.bfloat16)
    assert quantised(seen[0].unet) and not quantised(seen[1].unet)
