"""Perturbed-attention guidance (PAG): the middle of a U-Net whose self-attentions are the identity for some images.

Ahn et al. 2024 (arXiv 2403.17377), section 4: with its attention map replaced by the identity, each token sees itself
alone. Guidance pushes the prediction away from this perturbed one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.attention import Kernel
from ldm.models.layers import TransformerBlock
from ldm.models.surgery import twin
from ldm.models.unet import UNet


def perturb_attention(unet: UNet, groups: int) -> UNet:
    """A U-Net on the same weights that perturbs the last of the `groups` equal parts of a batch."""
    model = twin(unet)
    for module in model.mid_block.modules():
        if isinstance(module, TransformerBlock):
            module.attn1.kernel = _identity_for_last(module.attn1.kernel, groups)
    return model


def _identity_for_last(kernel: Kernel, groups: int) -> Kernel:
    """A kernel whose result for the last of the groups of a batch is `v`, and that of `kernel` for the others."""

    def perturbed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = len(q) - len(q) // groups
        return torch.cat([kernel(q[:keep], k[:keep], v[:keep]), v[keep:]])

    return perturbed
