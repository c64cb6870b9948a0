"""The attention layers of the U-Net, the autoencoder and their siblings, each with the kernel that it computes by.

A kernel is a function `(q, k, v) -> out` on tensors (B, heads, N, D): softmax(q kᵀ / √D) v, without mask or dropout.
Each layer holds its kernel as an attribute; `ldm.runtime.attention.set_attention` puts in another one from outside.

B batch, N query tokens, M key tokens, D channels of one head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice among its kernels."""
    return F.scaled_dot_product_attention(q, k, v)


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as it is written, all weights in memory. On a CPU the fastest way to train on short sequences."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v


class AttentionLayer(nn.Module):
    """A layer with `heads` heads of `dim / heads` channels, and the kernel that they are computed by."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.kernel: Kernel = sdpa

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Split (B, N, heads·D) into heads, run the kernel, join again: (B, N, heads·D)."""
        q, k, v = (x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return self.kernel(q, k, v).transpose(1, 2).flatten(2)


def attention_layers(model: nn.Module) -> Iterator[AttentionLayer]:
    """All attention layers of a model, in order of their names."""
    return (module for module in model.modules() if isinstance(module, AttentionLayer))
