"""The instruction sets of this machine's processor."""

from __future__ import annotations

import torch


def can(*names: str) -> bool:
    """Whether the processor has one of these instruction sets, by PyTorch's names: avx512_bf16, amx_bf16 …"""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name) for name in names)
