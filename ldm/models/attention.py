"""The base of all attention layers with exchangeable kernels (U-Net, autoencoder and others).

A kernel is a function `(q, k, v) -> out` on tensors (B, heads, N, D): softmax(q kᵀ / √D) v, without mask or dropout.
Each layer holds its kernel as an attribute; `ldm.runtime.attention.set_attention` exchanges the kernels of a model.

B batch, N query tokens, M key tokens, D channels of one head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, which chooses a kernel itself."""
    return F.scaled_dot_product_attention(q, k, v)


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula step by step, with the whole attention matrix in memory; the fastest kernel for training on a CPU
    with short sequences."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v


class AttentionLayer(nn.Module):
    """An attention layer with `heads` heads of `dim / heads` channels, and its kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.kernel: Kernel = sdpa

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Split (B, N, heads·D) into heads, run the kernel, join the heads: (B, N, heads·D)."""
        q, k, v = (x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return self.kernel(q, k, v).transpose(1, 2).flatten(2)


def attention_layers(model: nn.Module) -> Iterator[AttentionLayer]:
    """All attention layers of a model, in order of their names."""
    return (module for module in model.modules() if isinstance(module, AttentionLayer))
