"""Whether a device computes in bf16 itself, or PyTorch emulates it there."""

from __future__ import annotations

import torch

from ldm.runtime.kernels.processor import can


def computes_bf16(device: torch.device) -> bool:
    """Whether a GPU has units for bf16 (compute capability 8.0 or more), or a processor AVX-512 BF16, AMX-BF16 or
    Arm's bf16. Of other devices it is not known: False."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and can("avx512_bf16", "amx_bf16", "bf16")
