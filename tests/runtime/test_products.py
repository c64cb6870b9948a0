"""Our own kernels beside PyTorch's in fp64, with the widest vectors and with AVX2's: products, then all others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import distance, vectors
from torch import Tensor, nn

from ldm.models.layers import Upsample
from ldm.runtime.kernels import layers, products
from ldm.runtime.kernels.attention import attend
from ldm.runtime.kernels.compiled import multiplies

__all__ = ["vectors"]  # a fixture
DTYPES = [torch.float32, torch.bfloat16]
LAST = torch.channels_last


def near(found: Tensor, exact: Tensor) -> None:
    """A few roundings of sums in fp32, and one of the result."""
    assert found.shape == exact.shape
    assert distance(found, exact) < (2e-6 if found.dtype == torch.float32 else 4e-3)


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest, vectors: None) -> Iterator[None]:
    """Each test for both kinds of vectors; products in bf16 where the processor has them."""
    dtype = request.node.callspec.params["dtype"]
    if "norms" not in request.node.name and not multiplies(dtype):
        pytest.skip("needs AVX-512 BF16")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (5, 1, 2)])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(1, 2, 3, 5, 7), (2, 18, 40, 12, 12), (3, 96, 70, 7, 6), (1, 386, 66, 5, 5)],
)
def test_convolutions(
    batch: int, channels: int, outputs: int, height: int, width: int, kernel: int, stride: int, padding: int,
    bias: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias).to(dtype)
    assert products.suits(layer, batch * height * width)
    x = torch.randn(batch, channels, height, width).to(dtype, memory_format=LAST)
    exact = layer.double()(x.double())
    layer.to(dtype)
    other = torch.randn(exact.shape).to(dtype, memory_format=LAST)
    weight = products.taps(layer.weight)
    near(products.convolution(x, weight, layer), exact)
    near(products.convolution(x, weight, layer, other), exact + other.double())
    if dtype == torch.float32 and products.filters(layer):
        weight = products.filtered(layer.weight)
        near(products.filtering(x, weight, layer), exact)
        near(products.filtering(x, weight, layer, other), exact + other.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_others(dtype: torch.dtype) -> None:
    """Not in a bit."""
    layer = nn.Conv2d(32, 48, 3, padding=1).to(dtype)
    x = torch.randn(5, 32, 7, 9).to(dtype, memory_format=LAST)
    weight = products.taps(layer.weight)
    whole, alone = products.convolution(x, weight, layer), products.convolution(x[2:3], weight, layer)
    assert torch.equal(whole[2:3], alone)
    if dtype == torch.float32:
        weight = products.filtered(layer.weight)
        assert torch.equal(products.filtering(x, weight, layer)[2:3], products.filtering(x[2:3], weight, layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (77, 320), (3, 49, 64), (2, 3, 4, 24)])
@pytest.mark.parametrize("outputs", [1, 16, 33, 192])
def test_linear_layers(shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(shape[-1], outputs).to(dtype)
    x = torch.randn(shape).to(dtype)
    weight = products.taps(layer.weight)
    near(
        products.linear(x, weight, layer.bias, outputs),
        F.linear(x.double(), layer.weight.double(), layer.bias.double()),
    )
    near(products.linear(x, weight, None, outputs), F.linear(x.double(), layer.weight.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(6, 6), (1, 5)])
def test_doubled_pixels(height: int, width: int, dtype: torch.dtype) -> None:
    layer = Upsample(36).to(dtype)
    x = torch.randn(2, 36, height, width).to(dtype, memory_format=LAST)
    exact = layer.double()(x.double(), (2 * height, 2 * width))
    layer.to(dtype)
    near(products.doubled(x, products.phases(layer.conv.weight), layer.conv), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_sums_and_attention(dtype: torch.dtype) -> None:
    for channels in (6, 64, 193):
        norm = nn.LayerNorm(channels).to(dtype)
        nn.init.normal_(norm.weight)
        x, y = (torch.randn(3, 41, channels).to(dtype) + 5 for _ in range(2))
        near(
            layers.layer_norm(norm, x), F.layer_norm(x.double(), (channels,), norm.weight.double(), norm.bias.double())
        )
        assert torch.equal(layers.add(x, y), x + y)
        near(layers.silu(x), F.silu(x.double()))
    a, b = (torch.randn(2, channels, 5, 7).to(dtype, memory_format=LAST) for channels in (6, 11))
    assert torch.equal(layers.join(a, b), torch.cat([a, b], dim=1))
    norm = nn.GroupNorm(6, 18).to(dtype)
    x, offset = torch.randn(2, 18, 9, 7).to(dtype, memory_format=LAST), torch.randn(2, 18).to(dtype)
    exact = F.group_norm(x.double() + offset.double()[:, :, None, None], 6, eps=norm.eps)
    near(layers.group_norm(norm, x, offset, silu=True), F.silu(exact))
    x, bias = 3 * torch.randn(5, 68).to(dtype), torch.randn(68).to(dtype)
    value, gate = (x.double() + bias.double()).chunk(2, dim=-1)
    near(layers.geglu(x, bias), value * F.gelu(gate))
    q, k, v = (torch.randn(2, 3, tokens, 40).to(dtype) for tokens in (97, 300, 300))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert distance(attend(q, k, v), exact) < (2e-6 if dtype == torch.float32 else 1e-2)  # weights are rounded, too
