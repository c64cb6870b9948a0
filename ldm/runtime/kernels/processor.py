"""The instruction sets of this machine's processor."""

from __future__ import annotations

import os
import platform

import torch

# value of PyTorch's variable ATEN_CPU_CAPABILITY -> prefixes of the instruction sets that it forbids
_FORBIDDEN = {"avx2": ("avx512", "avx10", "amx"), "default": ("avx", "amx")}
_AVX512 = tuple(f"avx512{name}" for name in ("f", "bw", "dq", "vl"))
# an instruction set -> the compiler's names of it and of what comes with it
_VECTORS = {"avx512_bf16": (*_AVX512, "avx512bf16", "fma"), "avx512_bw": (*_AVX512, "fma"), "avx2": ("avx2", "fma")}


def can(*names: str) -> bool:
    """Whether the processor has one of these instruction sets, by PyTorch's names: avx512_bf16, amx_bf16 …

    PyTorch's variable ATEN_CPU_CAPABILITY counts here as for its own kernels: with `avx2` or `default`, all is as on a
    processor that has neither AVX-512 nor AMX.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    forbidden = _FORBIDDEN.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ())
    return any(found.get(name) and not name.startswith(forbidden) for name in names)


def vectors() -> list[str] | None:
    """The compiler's options for the widest vectors of this processor; None where they are too narrow for our kernels.

    64-bit Arm needs no options.
    """
    if platform.machine() in ("aarch64", "arm64"):
        return []
    return next(([f"-m{name}" for name in names] for key, names in _VECTORS.items() if can(key)), None)
