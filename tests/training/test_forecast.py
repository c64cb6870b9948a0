"""What `ldm plan` says, beside what happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import TINY
from torch import Tensor

from ldm.families import FAMILIES
from ldm.models.unet import Conditioning, UNet
from ldm.training.config import Config
from ldm.training.forecast import _count, _most, count, forecast
from ldm.weights.components import build

SMALL = replace(FAMILIES["sd15"].unet, channels=(32, 64), depth=(1, 1), heads=(2, 2), groups=8, text_dim=32, layers=1)


def test_activations_are_those_that_are_kept() -> None:
    """Attention keeps no scores, which at this size would be three quarters of everything."""

    def run(device: str) -> tuple[UNet, tuple[Tensor, Tensor, Conditioning]]:
        with torch.device(device):
            unet = UNet(SMALL)
            given = torch.zeros(1, 4, 48, 48), torch.zeros(1, dtype=torch.long), Conditioning(torch.zeros(1, 16, 32))
        return unet, given

    unet, given = run("meta")
    predicted, flops = _count(lambda: unet(*given))
    unet, given = run("cpu")
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = unet(*given)
    assert sum(kept.values()) < predicted < 1.3 * sum(kept.values())
    assert result.requires_grad
    assert flops > 0


def test_attention_by_the_formula_keeps_its_scores() -> None:
    fused, plain = (
        forecast(
            Config.model_validate(
                {"model": {"family": "sd15"}, "data": {"cache": True}, "base": {"attention": name, "batch": 1}}
            )
        )[0]
        for name in ("sdpa", "math")
    )
    scores = 4 * 8 * 4096 * (4096 + 77)  # bytes of one layer's at 512 pixels, of which there are five so large
    assert 5 * scores < plain.activations - fused.activations < 15 * scores


@pytest.mark.parametrize(("family", "size", "tflop"), [("sd15", 512, 0.803), ("sdxl", 1024, 6.76)])
def test_the_arithmetic_of_known_models(family: str, size: int, tflop: float) -> None:
    """Three forward passes for each image, from a cache."""
    content = {
        "model": {"family": family}, "data": {"cache": True}, "base": {"batch": 4, "sizes": [{"size": size}]},
    }  # fmt: skip
    (row,) = forecast(Config.model_validate(content))
    assert row.flops_per_image == pytest.approx(3e12 * tflop, rel=0.01)
    assert row.flops_per_step == 4 * row.flops_per_image


def test_half_precision_halves_what_is_kept() -> None:
    whole, half = (
        forecast(Config.model_validate({"model": TINY["model"], "base": TINY["base"], "precision": name}))[0]
        for name in ("no", "bf16")
    )
    assert half.activations == whole.activations // 2 + 2 * whole.trained


def test_frozen_networks_beside_the_model_are_held_in_16_bits_too() -> None:
    with torch.device("meta"):
        parts = build(FAMILIES["sd15"])
        helper = torch.nn.Linear(64, 32)
    for rounded, nbytes in ((False, 4), (True, 2)):
        found = [count(parts, {}, helpers, rounded).nbytes for helpers in ([helper], [])]
        assert found[0] - found[1] == nbytes * (64 * 32 + 32)


def test_weights_are_no_activations() -> None:
    """A product keeps its weights too, as a view of them."""
    layer, x = torch.nn.Linear(64, 32), torch.randn(3, 64, requires_grad=True)
    kept, work = _count(lambda: layer(x))
    assert (kept, work) == (3 * 64 * 4, 2 * 3 * 64 * 32)


def test_memory_that_is_freed_within_a_pass_counts_beside_what_follows() -> None:
    """What is kept for a backward pass is counted once, whatever addresses it gets."""
    layer = torch.nn.Linear(64, 64)

    def run() -> None:
        for _ in range(5):
            layer(torch.randn(3, 64)).exp()  # two tensors are kept, as long as the result is there

    assert _count(run)[0] == 5 * 2 * (3 * 64 * 4)


def test_a_pass_without_gradients_needs_few_tensors_at_a_time() -> None:
    layers, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(5))), torch.randn(3, 64)
    assert 2 * 3 * 64 * 4 <= _most(lambda: layers(x)) <= 3 * 3 * 64 * 4


def test_the_memory_of_previews_takes_the_place_of_a_step_s() -> None:
    content = {
        "model": {"family": "sdxl"}, "data": {"cache": True}, "stages": ["adapter"], "precision": "bf16",
        "adapter": {"sizes": [{"size": 1024}], "batch": 1, "checkpointing": True, "quantize": "int8-weights"},
    }  # fmt: skip
    (row,) = forecast(Config.model_validate(content))
    assert 1e9 < row.previews < 8e9
    assert row.memory - row.weights - row.optimizer - row.averages == max(row.previews, row.gradients + row.activations)
