"""The instruction sets of this machine's processor."""

from __future__ import annotations

import os

import torch

# value of PyTorch's variable ATEN_CPU_CAPABILITY -> prefixes of the instruction sets that it forbids
_FORBIDDEN = {"avx2": ("avx512", "avx10", "amx"), "default": ("avx", "amx")}


def can(*names: str) -> bool:
    """Whether the processor has one of these instruction sets, by PyTorch's names: avx512_bf16, amx_bf16 …

    PyTorch's variable ATEN_CPU_CAPABILITY counts here as for its own kernels: with `avx2` or `default`, all is as on a
    processor that has neither AVX-512 nor AMX.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    forbidden = _FORBIDDEN.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ())
    return any(found.get(name) and not name.startswith(forbidden) for name in names)
