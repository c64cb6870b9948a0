"""Kernels for GPUs in Triton's interpreter, on the CPU, beside the formula in fp64.

The interpreter must be chosen before the kernels are imported, which no other test should see: `test_fused_gpu.py` runs
these in a process of their own. In bf16 it cuts off what a GPU rounds, which doubles the error of the last bit.
"""

from __future__ import annotations

import copy
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import DTYPES, device, distance, formula
from torch import nn

from ldm.models.layers import GEGLU, ResnetBlock
from ldm.runtime import fused_gpu
from ldm.runtime.fused import LAST, FusedResnetBlock
from ldm.runtime.fused_gpu import TritonGEGLU, fuse

__all__ = ["device"]  # a fixture
LAST_BIT = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 8e-3}  # relative errors


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random inputs are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def kernels() -> ModuleType:
    return fused_gpu.kernels()


def random(layer: nn.Module, dtype: torch.dtype) -> Any:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width", "offset", "silu", "dtypes"),
    [
        (1, 4, 1, 1, 1, True, True, "16"), (2, 40, 4, 5, 3, False, False, "32"), (2, 40, 4, 5, 3, True, True, "all"),
        (1, 320, 32, 6, 7, False, False, "16"), (1, 2560, 32, 1, 2, True, True, "32"),
        (1, 18, 9, 17, 19, False, False, "16"), (1, 18, 9, 17, 19, True, True, "all"),  # in chunks
        (1, 64, 32, 16, 17, True, True, "32"),
    ],
)  # fmt: skip
def test_group_norm(
    kernels: ModuleType, batch: int, channels: int, groups: int, height: int, width: int, offset: bool, silu: bool,
    dtypes: str,
) -> None:  # fmt: skip
    chosen = {"all": DTYPES, "16": [torch.float16], "32": [torch.float32]}[dtypes]
    for dtype, mean in product(chosen, (0, 30)):
        norm = random(nn.GroupNorm(groups, channels, 1e-5), dtype)
        x = (torch.randn(batch, channels, height, width) + mean).to(dtype, memory_format=LAST)
        more = torch.randn(batch, channels).to(dtype) if offset else None
        with torch.inference_mode():
            found = kernels.group_norm(norm, x, more, silu)
        exact = formula(norm, x, more, silu)
        assert found.dtype == dtype and found.is_contiguous(memory_format=LAST)
        assert distance(found, exact) < LAST_BIT[dtype] * (1 + mean * (dtype == torch.float32))


@pytest.mark.parametrize("side", [9, 20])
def test_a_mean_that_is_large_beside_the_spread(kernels: ModuleType, side: int) -> None:
    """Where fp32 sums of squares would have nothing left: as near as PyTorch's own, which has fp64 here."""
    norm = random(nn.GroupNorm(2, 12, 1e-8), torch.float32)
    x = (0.01 * torch.randn(2, 12, side, side) + 100).to(memory_format=LAST)
    with torch.inference_mode():
        exact = formula(norm, x, None, False)
        far = distance(kernels.group_norm(norm, x), exact)
        assert far < 2e-3
        assert far <= distance(norm.double()(x.double()).float(), exact) + distance(norm.float()(x), exact)


def test_an_image_gives_the_same_in_any_batch(kernels: ModuleType) -> None:
    norm, x = random(nn.GroupNorm(4, 24), torch.float32), torch.randn(2, 24, 17, 17).to(memory_format=LAST)
    offset = torch.randn(2, 24)
    with torch.inference_mode():
        whole = kernels.group_norm(norm, x, offset, True)
        assert torch.equal(whole, kernels.group_norm(norm, x, offset, True))
        for i in range(2):
            alone = kernels.group_norm(norm, x[i : i + 1], offset[i : i + 1], True)
            assert torch.equal(alone, whole[i : i + 1])
        assert torch.equal(
            kernels.group_norm(norm, x, offset[:1], True), kernels.group_norm(norm, x, offset[:1].repeat(2, 1), True)
        )


@pytest.mark.parametrize("side", [4, 20])
def test_extreme_numbers(kernels: ModuleType, side: int) -> None:
    norm = nn.GroupNorm(2, 8).half()
    x = torch.full((1, 8, side, side), 3.0).half().to(memory_format=LAST)
    with torch.inference_mode():
        assert (kernels.group_norm(norm, x).abs() < 1e-4).all()  # nothing varies
        x[0, 0, 1, 1] = torch.nan
        assert torch.isnan(kernels.group_norm(norm, x, silu=True)[:, :4]).all()
        assert (kernels.group_norm(norm, x)[:, 4:].abs() < 1e-4).all()
    rows = torch.tensor([[1.0, 1, 1, 1, -90, 90, 0, torch.nan]]).half()
    found = kernels.geglu(rows, torch.zeros(8).half())[0]
    assert found[:3].tolist() == [0, 90, 0] and torch.isnan(found[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 34), (2, 9, 640)])
def test_geglu(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    value, gate = (x.double() + bias.double()).chunk(2, dim=-1)
    found = kernels.geglu(x, bias)
    assert found.shape == value.shape and found.dtype == dtype
    assert distance(found, value * F.gelu(gate)) < LAST_BIT[dtype]
    assert torch.equal(kernels.geglu(x.mT.contiguous().mT, bias), found)


def test_shares(kernels: ModuleType) -> None:
    """Every group is in one program, in tiles that are powers of two."""
    for groups in (1, 4, 9, 32):
        for per_group in (1, 2, 4, 10, 20, 30, 40, 60, 80, 333):
            width, tile_c, tile_p, tile_g = kernels.shared(groups * per_group, groups)
            assert width % per_group == 0 and width // per_group <= tile_g and width <= tile_c
            assert all(size & (size - 1) == 0 for size in (tile_c, tile_p, tile_g))
            assert per_group > 256 or tile_c <= 256
    assert kernels.shared(320, 32).width == 120  # of 128
    for pixels in (257, 1024, 16384, 10**6 + 1):
        length = kernels.chunk(pixels)
        assert length * (pixels // length) + length >= pixels and length <= 4 * pixels**0.5


@pytest.mark.parametrize("side", [5, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_with_their_kernels(device: None, dtype: torch.dtype, side: int) -> None:
    block, gated = ResnetBlock(12, 24, 4, 1e-5, 8), GEGLU(6, 10)
    x, time, rows = torch.randn(2, 12, side, side), torch.randn(2, 8), torch.randn(2, 7, 6)
    with torch.inference_mode():
        exact = copy.deepcopy(block).double()(x.double(), time.double()), copy.deepcopy(gated).double()(rows.double())
        plain = nn.ModuleList([block, gated]).to(dtype)
        quick = copy.deepcopy(plain)
        fuse(quick)
        assert [type(layer) for layer in quick] == [FusedResnetBlock, TritonGEGLU]
        for i, given in enumerate(((x, time), (rows,))):
            given = [tensor.to(dtype) for tensor in given]
            far = distance(quick[i](*given), exact[i])
            assert far < (2 if dtype == torch.bfloat16 else 1.1) * distance(plain[i](*given), exact[i]) + 1e-7
