"""Fused layers on the CPU: the numbers of the plain ones, no further from exact in bf16, with the same weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from networks import adapted, cast, circular, distance, hooked, inputs, runs
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.tiling import tiled_decode, tiled_encode
from ldm.runtime import fused_cpu
from ldm.runtime.fused_cpu import (
    CPUGEGLU,
    FEW,
    CPUGroupNorm,
    CPULayerNorm,
    CPULinear,
    CPUResnetBlock,
    CPUTokenLinear,
    FusedConv2d,
    FusedUpsample,
    fuse,
    matrices,
    works,
)
from ldm.runtime.kernels import layers as kernels
from ldm.runtime.kernels import products
from ldm.runtime.kernels.compiled import usable
from ldm.runtime.precomputing import precomputed
from ldm.runtime.reordered import Reordered
from pipelines import Pipeline

DTYPES = [torch.float32, torch.bfloat16]  # on processors without bf16, nothing is fused in it
KERNELS = [pytest.param(dtype, marks=runs) for dtype in DTYPES]  # which do without the processor's bf16
FAMILIES = ["sd15", "sdxl", "emoji"]


def check(quick: Tensor, plain: Tensor, exact: Tensor) -> None:
    """fp32 to 1e-5; bf16 no further from exact than the plain layers, and a tenth."""
    if plain.dtype == torch.float32:
        assert float((quick - plain).abs().max() / plain.abs().max()) < 1e-5
    else:
        assert distance(quick, exact) <= 1.1 * distance(plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 13)])  # the second is not simply doubled on its way up
@pytest.mark.parametrize("name", FAMILIES)
def test_a_unet(name: str, height: int, width: int, dtype: torch.dtype) -> None:
    unet = tiny.model(name).unet
    exact = copy.deepcopy(unet).double()
    unet.to(dtype)
    quick = copy.deepcopy(unet)
    fuse(quick)
    with torch.inference_mode():
        x, t, cond = inputs(unet, dtype, height, width)
        wanted = exact(x.double(), t, cast(cond, torch.float64))
        check(quick(x, t, cond), unet(x, t, cond), wanted)
        assert torch.equal(precomputed(quick, cond)(x, t, cond), quick(x, t, cond))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sdxl", "emoji"])
def test_an_autoencoder(name: str, dtype: torch.dtype) -> None:
    autoencoder = tiny.model(name).autoencoder
    exact = copy.deepcopy(autoencoder).double()
    autoencoder.to(dtype)
    quick = copy.deepcopy(autoencoder)
    fuse(quick)
    config = autoencoder.config
    z, x = torch.randn(2, config.latent_channels, 12, 10).to(dtype), torch.randn(2, 3, 96, 80).to(dtype)
    with torch.inference_mode():
        check(quick.decode(z), autoencoder.decode(z), exact.decode(z.double()))
        check(quick.encode(x).mode(), autoencoder.encode(x).mode(), exact.encode(x.double()).mode())
        check(tiled_decode(quick, z, 8), tiled_decode(autoencoder, z, 8), tiled_decode(exact, z.double(), 8))
        tiled = [tiled_encode(one, x.to(kind), 64).mode() for one, kind in ((quick, dtype), (autoencoder, dtype))]
        check(tiled[0], tiled[1], tiled_encode(exact, x.double(), 64).mode())


@pytest.mark.parametrize("dtype", DTYPES)
def test_which_layers(dtype: torch.dtype) -> None:
    unet = tiny.model("sdxl").unet.to(dtype)
    names = [name for name, _ in unet.named_parameters()]
    fuse(unet)
    kinds = {type(module) for module in unet.modules()}
    fused, kernels = (
        {FusedConv2d, FusedUpsample, CPUResnetBlock},
        {CPUGroupNorm, CPULayerNorm, CPUGEGLU, CPULinear, CPUTokenLinear},
    )
    assert kinds & fused == (fused if works(dtype) else set())
    assert kinds & kernels == (kernels if works(dtype) and usable() else set())
    assert [name for name, _ in unet.named_parameters()] == names


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_and_changed_weights(dtype: torch.dtype) -> None:
    """What is trained, or gets other weights, is not what was remembered."""
    plain = tiny.model("sd15").unet.to(dtype)
    quick = copy.deepcopy(plain)
    fuse(quick)
    x, t, cond = inputs(plain, dtype)
    for unet in (plain, quick):
        unet(x, t, cond).float().square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert distance(other.grad, one.grad) < (1e-4 if dtype == torch.float32 else 0.1), name
    with torch.no_grad():
        before = quick(x, t, cond)
        for unet in (plain, quick):
            for module in unet.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.weight.mul_(1.5)
        after = quick(x, t, cond)
        assert distance(after, before) > 0.01
        assert distance(after, plain(x, t, cond)) < (1e-5 if dtype == torch.float32 else 0.05)


@runs
def test_biases_alone_can_learn() -> None:
    """And the layers before which nothing learns are no exception."""
    plain = tiny.model("sd15", shallow=True).unet
    quick = copy.deepcopy(plain)
    fuse(quick)
    x, t, cond = inputs(plain, torch.float32)
    for unet in (plain, quick):
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        unet(x, t, cond).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert one.grad is None or (other.grad is not None and distance(other.grad, one.grad) < 1e-4), name


@runs
@pytest.mark.parametrize("change", [-2, 2])
@pytest.mark.parametrize("kind", ["few channels", "convolution", "linear", "group norm", "layer norm"])
def test_other_channels_are_an_error(kind: str, change: int) -> None:
    """As they are to plain layers: no kernel reads beyond the weights."""
    layer: nn.Module = {
        "few channels": nn.Conv2d(8, 8, 3), "convolution": nn.Conv2d(16, 16, 3, padding=1), "linear": nn.Linear(8, 16),
        "group norm": nn.GroupNorm(2, 8), "layer norm": nn.LayerNorm(8),
    }[kind]  # fmt: skip
    fuse(layer)
    channels = (16 if kind == "convolution" else 8) + change
    maps = torch.randn(2, channels, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        layer(torch.randn(3, channels) if kind in ("linear", "layer norm") else maps)


@runs
def test_what_kernels_do_not_read() -> None:
    """Tensors elsewhere, and an offset that is one row for all images."""
    layer, norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 8)
    for one in (layer, norm):
        fuse(one)
    with torch.inference_mode():
        layer(torch.randn(1, 16, 5, 5))
        assert layer.to("meta")(torch.empty(1, 16, 5, 5, device="meta")).is_meta
        x = torch.randn(2, 8, 5, 5)
        assert isinstance(norm, CPUGroupNorm) and norm.fits(x, torch.zeros(2, 8))
        assert not norm.fits(x, torch.zeros(1, 8)) and not norm.fits(x, torch.zeros(8, 2).t())


def test_where_the_operators_are_not_as_they_were(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """PyTorch keeps them to itself and may change them: then layers stay plain, which is said."""
    unet = tiny.model("sd15").unet
    state = torch.get_rng_state()
    for operator in (lambda *arguments: arguments[0], None):
        fused_cpu.works.cache_clear()
        monkeypatch.setattr(fused_cpu, "onednn", SimpleNamespace(_reorder_convolution_transpose_weight=operator))
        fuse(unet)
        assert not any(type(module).__module__ == fused_cpu.__name__ for module in unet.modules())
    assert "fused layers are not used" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    fused_cpu.works.cache_clear()


@pytest.mark.parametrize("change", [circular, hooked, adapted])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_others_change_counts(dtype: torch.dtype, change: Any) -> None:
    """What is done to a U-Net after its layers were fused does to it what it does to a plain one."""
    plain = tiny.model("sd15").unet
    exact = copy.deepcopy(plain).double()
    plain.to(dtype)
    quick = copy.deepcopy(plain)
    fuse(quick)
    for unet in (exact, plain, quick):
        change(unet)
    with torch.inference_mode():
        x, t, cond = inputs(plain, dtype)
        check(quick(x, t, cond), plain(x, t, cond), exact(x.double(), t, cast(cond, torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.model("sd15").save_pretrained(tmp_path / "model")
    plain = Pipeline(tmp_path / "model", device="cpu", dtype=dtype, quick=False)
    quick = Pipeline(tmp_path / "model", device="cpu", dtype=dtype)
    kinds = [{type(module) for module in one.model.unet.modules()} for one in (plain, quick)]
    assert FusedUpsample not in kinds[0] and (FusedUpsample in kinds[1]) == works(dtype)
    made = [one("a fox", steps=2, seed=3, output="latents").latents[0] for one in (plain, quick)]
    assert distance(made[1], made[0]) < (1e-5 if dtype == torch.float32 else 0.05)
    quick.model.save_pretrained(tmp_path / "again")
    assert tiny.same_weights(LatentDiffusion.from_pretrained(tmp_path / "again"), plain.model)


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"),
    [(1, 4, 1, 1, 1), (2, 40, 8, 5, 3), (3, 96, 32, 12, 12), (1, 320, 32, 64, 64), (2, 18, 9, 40, 33)],
)
def test_group_norm(
    batch: int, channels: int, groups: int, height: int, width: int, offset: bool, silu: bool, dtype: torch.dtype
) -> None:
    norm = nn.GroupNorm(groups, channels, 1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.to(dtype)
    for mean in (0, 30):  # where fp32 sums of squares would lose what counts
        x = (torch.randn(batch, channels, height, width) + mean).to(dtype, memory_format=torch.channels_last)
        more = torch.randn(batch, channels).to(dtype) if offset else None
        with torch.no_grad():
            found = kernels.group_norm(norm, x, more, silu)
            whole = x.double() if more is None else x.double() + more.double()[:, :, None, None]
            exact = F.group_norm(whole, groups, norm.weight.double(), norm.bias.double(), norm.eps)
            exact = F.silu(exact) if silu else exact
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert distance(found, exact) < (4e-3 if dtype == torch.bfloat16 else 1e-3)  # half the last bit of bf16


@pytest.mark.parametrize("dtype", KERNELS)
def test_extreme_numbers(dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(2, 8).to(dtype)
    x = torch.full((1, 8, 4, 4), 3.0).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        assert (kernels.group_norm(norm, x, None, False).abs() < 1e-4).all()  # nothing varies
        x[0, 0, 1, 1] = math.nan
        assert torch.isnan(kernels.group_norm(norm, x, None, True)[:, :4]).all()
        assert (kernels.group_norm(norm, x, None, False)[:, 4:].abs() < 1e-4).all()


@runs
def test_extreme_numbers_through_the_gate() -> None:
    rows = torch.tensor([[1.0, 1, 1, 1, -90, 90, 0, math.nan]]).bfloat16()
    found = kernels.geglu(rows, torch.zeros(8).bfloat16())[0]
    assert found[:3].tolist() == [0, 90, 0] and torch.isnan(found[3])


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 34), (2, 100, 640)])
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    value, gate = (x.double() + bias.double()).chunk(2, dim=-1)
    found = kernels.geglu(x, bias)
    assert found.shape == value.shape
    assert distance(found, value * F.gelu(gate)) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(not works(torch.bfloat16), reason="needs a processor with bf16")
def test_products_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ordered weights, of which no copy is made for many rows; in any layout, with or without a bias."""
    monkeypatch.setattr(products, "MOST", 0)  # not by our own kernels
    plain = nn.Linear(24, 40).bfloat16()
    quick = copy.deepcopy(plain)
    quick.__class__ = CPULinear
    exact = copy.deepcopy(plain).double()
    with torch.inference_mode():
        many = torch.randn(FEW + 1, 24).bfloat16()
        assert torch.equal(quick(many), plain(many))
        assert not isinstance(dict.get(quick._parameters, "weight"), Reordered)
        for x in (many[:5], many[:24].t(), many[:24].view(2, 3, 4, 24), many[0]):
            assert quick(x).shape == plain(x).shape
            check(quick(x), plain(x), exact(x.double()))
        assert matrices in dict.__getitem__(quick._parameters, "weight").orders
        assert quick(many[:0]).shape == (0, 40)
        quick.bias = None
        torch.testing.assert_close(quick(many[:5]), F.linear(many[:5], plain.weight), atol=1e-2, rtol=1e-2)
