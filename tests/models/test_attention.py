"""Kernels of attention: chosen by name, equal to plain attention, refused with a remedy where they do not run."""

from __future__ import annotations

import pytest
import tiny
import torch

from ldm.errors import LdmError
from ldm.models.attention import attention_layers
from ldm.models.unet import Conditioning
from ldm.runtime.attention import KERNELS, set_attention


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_runs_or_says_what_it_needs(name: str) -> None:
    model = tiny.model("sdxl")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500)
    cond = model.encode_prompt("a cat")
    with torch.no_grad():
        before = model.unet(x, t, cond)
        try:
            set_attention(model.unet, name)
        except LdmError as error:
            assert KERNELS[name][1] in str(error)
            assert "\n" not in str(error)
            assert name not in ("sdpa", "math")
        else:
            assert {layer.kernel for layer in attention_layers(model.unet)} == {KERNELS[name][0]}
            set_attention(model.autoencoder, name)
        torch.testing.assert_close(model.unet(x, t, cond), before, atol=1e-4, rtol=1e-4)


def test_a_refused_kernel_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.model("sd15").unet
    set_attention(unet, "math")
    monkeypatch.setitem(KERNELS, "wrong", (lambda q, k, v: v * 2, "a miracle"))
    with pytest.raises(LdmError, match=r"its result is wrong.*needs a miracle"):
        set_attention(unet, "wrong")
    with pytest.raises(LdmError, match="'nonsense' is not known; choose one of: sdpa"):
        set_attention(unet, "nonsense")
    assert {layer.kernel for layer in attention_layers(unet)} == {KERNELS["math"][0]}


def test_all_attention_goes_through_the_kernel() -> None:
    """Every layer calls its kernel: 2 in each of the U-Net's transformer blocks, 2 in the autoencoder."""
    model = tiny.model("sd15")
    calls = []

    def zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape)
        return torch.zeros_like(q)

    for module in (model.unet, model.autoencoder):
        for layer in attention_layers(module):
            layer.kernel = zeros
    with torch.no_grad():
        model.unet(torch.randn(1, 4, 8, 8), torch.tensor(1), Conditioning(torch.randn(1, 77, 32)))
        model.autoencoder(torch.rand(1, 3, 64, 64))
    assert len(calls) == 2 * 16 + 2
