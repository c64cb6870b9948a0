"""Networks beside their fused or rounded twins: inputs, changes that users make, distances."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.unet import Conditioning, UNet
from ldm.runtime import fused_gpu
from ldm.runtime.fused_gpu import works
from ldm.runtime.kernels.compiled import library, usable
from ldm.runtime.kernels.processor import can

runs = pytest.mark.skipif(not usable(), reason="needs AVX2 or 64-bit Arm's vectors, and a C++ compiler")


@pytest.fixture(params=["widest", "avx2"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our kernels, compiled for this processor, and for one with AVX2 alone."""
    if not usable():
        pytest.skip("needs AVX2 or 64-bit Arm's vectors, and a C++ compiler")
    if request.param == "avx2":
        if not can("avx512_bw"):
            pytest.skip("this processor has no wider vectors")
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        library.cache_clear()
    yield
    library.cache_clear()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def inputs(unet: UNet, dtype: torch.dtype, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Conditioning]:
    c = unet.config
    pooled = torch.randn(2, c.pooled_dim).to(dtype) if c.pooled_dim else None
    size = torch.randint(0, 1000, (2, c.size_ids)).float() if c.size_ids else None
    cond = Conditioning(torch.randn(2, 9, c.text_dim).to(dtype), pooled, size)
    return torch.randn(2, c.in_channels, height, width).to(dtype), torch.tensor(500), cond


def cast(cond: Conditioning, dtype: torch.dtype) -> Conditioning:
    return Conditioning(cond.text.to(dtype), None if cond.pooled is None else cond.pooled.to(dtype), cond.size)


def circular(unet: UNet) -> None:
    """As those do who want images without borders."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [side for side in reversed(module.padding) for _ in range(2)]


def hooked(unet: UNet) -> None:
    """As those do who change what layers give."""
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm, nn.Linear)):
            module.register_forward_hook(lambda layer, inputs, result: 1.1 * result)


def adapted(unet: UNet) -> None:
    """As adapters do: a layer in the place of another, which it calls."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.weight = layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return 1.1 * self.layer(x)

    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Conv2d, nn.Linear)) and name in ("conv1", "conv2", "conv", "proj"):
                setattr(parent, name, Adapter(child))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU in the place of a GPU."""
    monkeypatch.setattr(fused_gpu, "DEVICE", "cpu")
    works.cache_clear()
    yield
    works.cache_clear()


def formula(norm: nn.GroupNorm, x: Tensor, offset: Tensor | None, silu: bool) -> Tensor:
    """In fp64."""
    whole = x.double() if offset is None else x.double() + offset.double()[:, :, None, None]
    exact = F.group_norm(whole, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return (F.silu(exact) if silu else exact).detach()
