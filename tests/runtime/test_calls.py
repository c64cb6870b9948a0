"""Steps recorded on the CPU: the same numbers as steps that run, with other inputs, prompts and weights."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import tiny
import torch
import torch.nn.functional as F
from networks import inputs, runs
from rounding import NETWORK, RUN, near
from torch import Tensor

from ldm.models.unet import Conditioning
from ldm.runtime.calls import CallRecorder, PyTorchCall, Watch
from ldm.runtime.fused_cpu import FusedConv2d, fuse
from ldm.runtime.graphs import RecordedUNet, record_steps
from ldm.runtime.kernels import products
from ldm.runtime.kernels.compiled import recording
from ldm.runtime.precomputing import TimeTable, precomputed
from pipelines import Pipeline
from pipelines.tuning import Tuning

DTYPES = [torch.float32, torch.bfloat16]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "emoji"])
def test_a_unet(name: str, dtype: torch.dtype) -> None:
    plain = tiny.model(name).unet.to(dtype)
    fuse(plain)
    unet = copy.deepcopy(plain)
    record_steps(unet)

    def check() -> Tensor:
        """Steps of two prompts in turn."""
        tables = []
        for _ in range(2):
            x, _, cond = inputs(unet, dtype, 8, 6)
            tables.append((TimeTable(precomputed(unet, cond), cond, times), x, cond))
        for time in times:
            for table, x, cond in tables:
                table.set(time)
                found = table.unet(x, torch.tensor(time), cond)
                near(found, plain(x, torch.tensor(time), cond), part)  # SiLU is rounded in another way
        return found

    times, part = [900.0, 500.0, 3.0], NETWORK if dtype == torch.float32 else 1e-2
    with torch.inference_mode():
        kept = check()
        before = kept.clone()
        assert isinstance(unet, RecordedUNet) and len(unet.recordings.found) == 1
        for network in (plain, unet):
            for parameter in network.parameters():
                parameter.mul_(1.1)  # in its place
        check()
        assert torch.equal(kept, before)  # a result is nobody else's
        assert len(unet.recordings.found) == 1


def test_pytorchs_calls_are_made_again() -> None:
    """But for those whose results nothing reads."""
    x, weight = torch.zeros(3, 4), torch.randn(4, 4)

    def step() -> Tensor:
        x.softmax(dim=-1)
        y = (x @ weight).view(4, 3)
        y.mul_(2)
        return y.sum(dim=0)

    with torch.inference_mode():
        again = CallRecorder()(step)
        for _ in range(2):
            x.copy_(torch.randn(3, 4))
            assert torch.equal(again().clone(), step())
        parts = Watch.over(step).parts
    assert len(parts) == 3 and all(isinstance(part, PyTorchCall) for part in parts)


@runs
def test_weights_are_brought_into_order_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each step, after they have changed either."""
    for most in (products.MOST, 0):  # by our own kernels, then by oneDNN
        monkeypatch.setattr(products, "MOST", most)
        layer = FusedConv2d(64, 64, 3, padding=1)
        x = torch.zeros(1, 64, 5, 5).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            again = CallRecorder()(lambda layer=layer, x=x: layer(x))
            for _ in range(2):
                x.copy_(torch.randn(1, 64, 5, 5))
                near(again().clone(), F.conv2d(x, layer.weight, layer.bias, padding=1), NETWORK)
                layer.weight.mul_(2)
                assert len(Watch.over(lambda layer=layer, x=x: layer(x)).parts) == 1
    with torch.no_grad():  # the last one's weight, which can be made anew
        again()
        layer.weight.data.mul_(2)
        near(again().clone(), F.conv2d(x, layer.weight, layer.bias, padding=1), NETWORK)
        again()
        assert cast("Any", dict.get(layer._parameters, "weight")).weight is None  # which was read, and is free again


@runs
def test_layers_by_onednn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(products, "MOST", 0)
    unet = tiny.model("sd15", shallow=True).unet
    fuse(unet)
    plain = copy.deepcopy(unet)
    record_steps(unet)
    x, t, cond = inputs(unet, torch.float32, 8, 6)
    with torch.inference_mode():
        ready = precomputed(unet, cond)
        for _ in range(2):
            near(ready(x, t, cond), plain(x, t, cond), NETWORK)
    assert isinstance(unet, RecordedUNet) and len(unet.recordings.found) == 1 and not caplog.records


def test_what_depends_on_numbers_is_not_recorded() -> None:
    x = torch.ones(3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="reads a number that it computes"):
        CallRecorder()(lambda: x * x.sum().item())
    assert recording.calls is None and recording.weights is None


@runs
def test_a_pipeline_records_small_images() -> None:
    """And does not keep all tensors of a large one."""
    model, plain = (Tuning(fused=True).apply(tiny.model("sd15")) for _ in range(2))
    assert isinstance(model.unet, RecordedUNet)
    plain.unet.recordings.works = False  # type: ignore[union-attr]
    for n in (1, 3):
        made, wanted = (
            Pipeline(one)("a fox", n=n, seed=1, steps=3, output="latents").latents for one in (model, plain)
        )
        for a, b in zip(made, wanted, strict=True):
            near(a, b, RUN)
    assert len(model.unet.recordings.found) == 2
    model.unet.recordings.pixels = 100
    x, t, cond = inputs(model.unet, torch.float32, 8, 7)  # of two images
    with torch.inference_mode():
        precomputed(model.unet, cond)(x, t, Conditioning(cond.text))
    assert len(model.unet.recordings.found) == 2
