"""What a processor can do, and what it is told not to."""

from __future__ import annotations

import pytest
import torch

from ldm.runtime.kernels.processor import can


def test_pytorchs_own_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {"avx2": True, "avx512_bf16": True, "amx_bf16": True, "avx512_fp16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: everything, raising=False)
    for value, able in (("", "all"), ("avx512", "all"), ("avx2", "avx2"), ("default", "")):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
        assert can("avx2") == bool(able)
        assert can("avx512_bf16") == can("avx512_fp16", "amx_bf16") == (able == "all")
        assert not can("avx512_fp16") and not can("unheard_of")
