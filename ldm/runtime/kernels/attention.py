"""Attention on the CPU: see `attention.cpp`.

B batch, N query tokens, M key tokens, D channels of one head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LdmError
from ldm.runtime.kernels.compiled import call, fits, learns, threads


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, as PyTorch's own: (B, heads, N, D), with k and v (B, heads, M, D).

    It computes on the CPU in fp32, or in bf16 with sums in fp32; where gradients are wanted, PyTorch's own kernel does.

    Raises:
        LdmError: the tensors are of another type or elsewhere, or the kernel cannot be compiled.
    """
    if learns(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    if not fits(q, k, v):
        raise LdmError(f"the kernel is for fp32 and bf16 on the CPU, not for {q.dtype} on {q.device.type}")
    batch, heads, queries, channels = q.shape
    keys = k.shape[2]
    right = k.shape == v.shape == (batch, heads, keys, channels)
    if channels % 2 or not keys or not right:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = torch.empty(batch, queries, heads, channels, dtype=q.dtype).transpose(1, 2)  # as the next layer reads it
    tensors = (q, k, v, out)
    call(
        "attend", q.dtype, *tensors, *(step for tensor in tensors for step in tensor.stride()[:3]), batch, heads,
        queries, keys, channels, channels**-0.5, threads(batch * heads * queries * keys * channels // 10),
    )  # fmt: skip
    return out
