"""Fused layers for CUDA GPUs, in Triton: they read memory less often, with channels last. Convolutions stay cuDNN's.

Each layer computes what the plain layer that it replaces computes, up to rounding (`fused.py`).
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import first_line
from ldm.models.layers import GEGLU, ResnetBlock
from ldm.models.surgery import reclassed
from ldm.runtime.fused import LAST, FusedGEGLU, FusedGroupNorm, FusedResnetBlock
from ldm.runtime.kernels.compiled import learns

log = logging.getLogger(__name__)
DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 4096  # channels of a group that fit into a program's registers


def fuse(model: nn.Module, device: torch.device | None = None) -> None:
    """Replace layers of a network on a CUDA GPU by fused ones with the same weights, in place.

    The weights of convolutions are channels last in memory from then on, and so are the network's outputs.

    `device` is where the network will compute, if not where its weights are.
    """
    weight = next(model.parameters())
    device = device or weight.device
    if device.type != DEVICE or not works(device, weight.dtype):
        return
    model.to(memory_format=LAST)
    reclassed(model, {nn.GroupNorm: TritonGroupNorm, ResnetBlock: FusedResnetBlock, GEGLU: TritonGEGLU})


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels compute correctly in that type on that GPU, tried on a few numbers."""
    if dtype not in DTYPES:
        return False
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return False  # Triton does not support older ones
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            right = _right(device, dtype)
    except Exception as error:  # compilers and drivers fail in many ways; plain layers do the work then
        log.warning("fused layers are not used: %s", first_line(error))
        return False
    if not right:
        log.warning("fused layers are not used: Triton's kernels give wrong results in %s on %s", dtype, device)
    return right


def _right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with plain layers: group norm of images in one piece and in chunks, and GEGLU."""
    norm, gated = nn.GroupNorm(4, 64), GEGLU(8, 40)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm, gated = norm.to(device, dtype), gated.to(device, dtype)
    rows, offset = torch.randn(5, 8).to(device, dtype), torch.randn(2, 64).to(device, dtype)
    pairs = [(kernels().geglu(F.linear(rows, gated.proj.weight), gated.proj.bias), gated(rows))]
    for side in (3, 20):
        x = torch.randn(2, 64, side, side).to(device, dtype, memory_format=LAST)
        pairs.append((kernels().group_norm(norm, x), norm(x)))
        activated = F.silu(norm(x + offset[:, :, None, None]))
        pairs.append((kernels().group_norm(norm, x, offset, silu=True), activated))
    near = 1e-3 if dtype == torch.float32 else 5e-2
    return all(torch.allclose(found, wanted, atol=near, rtol=near) for found, wanted in pairs)


@cache
def kernels() -> ModuleType:
    """`ldm.runtime.kernels.triton_layers`, imported when needed: Triton comes only with PyTorch for GPUs."""
    from ldm.runtime.kernels import triton_layers

    return triton_layers


def fits(x: Tensor, *others: Tensor) -> bool:
    """Whether the tensors are on a GPU, of one type that the kernels support, and no gradients are wanted."""
    right = x.device.type == DEVICE and x.dtype in DTYPES
    right = right and all(other.dtype == x.dtype and other.device == x.device for other in others)
    return right and not learns(x, *others)


class TritonGroupNorm(FusedGroupNorm):
    """A group norm by the Triton kernels."""

    def fits(self, *tensors: Tensor) -> bool:
        return fits(*tensors, self.weight) and self.num_channels <= WIDEST * self.num_groups

    def kernel(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        return kernels().group_norm(self, x, offset, silu)


class TritonGEGLU(FusedGEGLU):
    """A GEGLU by the Triton kernel."""

    def fits(self, *tensors: Tensor) -> bool:
        return fits(*tensors, self.proj.weight)

    def kernel(self, x: Tensor, bias: Tensor) -> Tensor:
        return kernels().geglu(x, bias)
