"""Minimal filtering of large convolutions, with the widest vectors and with AVX2's, beside PyTorch's in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from networks import distance, inputs, vectors
from torch import Tensor, nn

from ldm.models.layers import Upsample
from ldm.runtime import reordered
from ldm.runtime.calls import CallRecorder
from ldm.runtime.fused_cpu import FusedConv2d, FusedUpsample, convolutions, fuse, large_filters, works
from ldm.runtime.kernels import filters, products
from ldm.runtime.reordered import Reordered

__all__ = ["vectors"]  # a fixture
LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not works(torch.float32), reason="oneDNN's operators are not as they were")


@pytest.fixture(autouse=True)
def large_alone(vectors: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both kinds of vectors; small layers are not computed by the kernels for those, layers of few channels are."""
    monkeypatch.setattr(products, "MOST", 0)
    monkeypatch.setattr(filters, "FEWEST", 16)
    torch.manual_seed(0)
    yield


def images(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=LAST)


def used(layer: Any) -> bool:
    """Whether a layer has been computed by minimal filtering."""
    known = dict.get(layer._parameters, "weight")
    return isinstance(known, Reordered) and large_filters in known.orders


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(1, 16, 16, 12, 12), (2, 64, 48, 13, 15), (3, 80, 32, 17, 9), (2, 208, 64, 30, 26), (1, 32, 16, 3, 70)],
)
def test_convolutions(batch: int, channels: int, outputs: int, height: int, width: int, bias: bool) -> None:
    """At most half as far again from exact as direct convolutions, or a few roundings."""
    layer = nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)
    x, other = images(batch, channels, height, width), images(batch, outputs, height, width)
    weight = filters.ordered(layer.weight.detach())
    with torch.no_grad():
        assert filters.suits(layer, x)
        plain = layer(x)
        exact = layer.double()(x.double())
        layer.float()
        bound = max(1.5 * distance(plain, exact), 1e-6)
        found = filters.convolution(x, weight, layer)
        assert found.shape == plain.shape and found.is_contiguous(memory_format=LAST)
        assert distance(found, exact) < bound
        assert distance(filters.convolution(x, weight, layer, other), exact + other.double()) < bound


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 9), (20, 13)])
def test_doubled_pixels(height: int, width: int) -> None:
    plain = Upsample(48)
    quick = copy.deepcopy(plain)
    fuse(quick)
    x, size = images(2, 48, height, width), torch.Size((2 * height, 2 * width))
    with torch.inference_mode():
        found = quick(x, size)
        assert isinstance(quick, FusedUpsample) and used(quick.conv)
        assert distance(found, plain.double()(x.double(), size)) < 1e-6


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_networks(name: str) -> None:
    """To 1e-5, as the other fused layers."""
    model = tiny.model(name)
    x, t, cond = inputs(model.unet, torch.float32, 24, 28)
    z = torch.randn(1, model.autoencoder.config.latent_channels, 14, 13)
    quick = [copy.deepcopy(one) for one in (model.unet, model.autoencoder)]
    for network in quick:
        fuse(network)
    with torch.inference_mode():
        for found, plain in (
            (quick[0](x, t, cond), model.unet(x, t, cond)),
            (quick[1].decode(z), model.autoencoder.decode(z)),
        ):
            assert float((found - plain).abs().max() / plain.abs().max()) < 1e-5
    assert all(
        sum(used(layer) for layer in network.modules() if isinstance(layer, FusedConv2d)) > 9 for network in quick
    )


def test_an_image_does_not_depend_on_others() -> None:
    """Not in a bit, whatever their number."""
    layer = nn.Conv2d(80, 48, 3, padding=1)
    x = images(7, 80, 18, 22)
    weight = filters.ordered(layer.weight.detach())
    whole = filters.convolution(x, weight, layer)
    for number in (0, 3, 6):
        assert torch.equal(whole[number : number + 1], filters.convolution(x[number : number + 1], weight, layer))
    assert torch.equal(whole[2:5], filters.convolution(x[2:5], weight, layer))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1), nn.Conv2d(36, 40, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
    ],
)  # fmt: skip
def test_other_layers_are_not_computed_so(layer: nn.Conv2d) -> None:
    plain = copy.deepcopy(layer)
    fuse(layer)
    x = images(2, layer.in_channels, 14, 14)
    with torch.inference_mode():
        assert distance(layer(x), plain(x)) < 1e-5
    assert not used(layer)


def test_nor_small_images_nor_where_gradients_are_wanted() -> None:
    layer = FusedConv2d(32, 32, 3, padding=1)
    with torch.inference_mode():
        layer(images(4, 32, 8, 8))
        layer(images(0, 32, 14, 14))
    layer(images(1, 32, 14, 14)).sum().backward()
    assert not used(layer) and layer.weight.grad is not None
    with torch.inference_mode():
        layer.to(torch.float64)(images(1, 32, 14, 14).double())
    assert not used(layer)


def test_another_tensor_is_added() -> None:
    layer = FusedConv2d(32, 32, 3, padding=1)
    x, other = images(2, 32, 14, 14), images(2, 32, 14, 14)
    with torch.inference_mode():
        assert distance(layer.plus(x, other), layer(x) + other) < 1e-6
        assert used(layer)


def test_weights_are_in_memory_once_and_come_back_to_the_bit() -> None:
    layer = FusedConv2d(64, 96, 3, padding=1)
    with torch.no_grad():
        layer.weight.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e-40, torch.inf, torch.nan])
    before = layer.weight.detach().clone()
    with torch.inference_mode():
        layer(images(1, 64, 14, 14))
    known = dict.get(layer._parameters, "weight")
    assert isinstance(known, Reordered) and known.weight is None
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
    assert layer.weight.stride() == before.stride()


def test_weights_are_in_one_order_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though small images need another one than large ones; small weights may be in both."""
    layer = FusedConv2d(64, 96, 3, padding=1)
    before, small, large = layer.weight.detach().clone(), images(1, 64, 8, 8), images(1, 64, 14, 14)
    with torch.inference_mode():
        wanted = [layer(x) for x in (small, large)]
    known = dict.get(layer._parameters, "weight")
    assert isinstance(known, Reordered) and len(known.orders) == 2
    monkeypatch.setattr(reordered, "ONE_ORDER", 0)
    bias = layer.bias
    layer = FusedConv2d(64, 96, 3, padding=1)
    layer.weight, layer.bias = nn.Parameter(before.clone()), bias
    with torch.inference_mode():
        for _ in range(2):
            for x, found, order in zip((small, large), wanted, (convolutions, large_filters), strict=True):
                assert torch.equal(layer(x), found)
                known = dict.get(layer._parameters, "weight")
                assert isinstance(known, Reordered) and list(known.orders) == [order] and known.weight is None
    assert torch.equal(layer.weight, before)


def test_a_recording_makes_the_calls_again() -> None:
    layer = FusedConv2d(32, 48, 3, padding=1)
    x, other = images(1, 32, 14, 14), images(1, 48, 14, 14)
    with torch.inference_mode():
        again = CallRecorder()(lambda: layer.plus(x, other))
        x.copy_(images(1, 32, 14, 14))
        found = again().clone()
        assert used(layer) and torch.equal(found, layer.plus(x, other))
        layer.weight.mul_(2)
        assert torch.equal(again(), layer.plus(x, other)) and not torch.equal(again(), found)
