"""Gradient checkpointing, added to networks from outside: the backward pass computes activations again.

Chen et al. 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models.clip_text import TextLayer
from ldm.models.layers import ResnetBlock, SpatialAttention, TransformerBlock


def checkpointed(module: nn.Module) -> None:
    """Make every residual block and transformer block of a network recompute its activations in the backward pass."""
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer  # of the image encoder; slow to import

    for part in module.modules():
        if isinstance(part, (ResnetBlock, SpatialAttention, TransformerBlock, TextLayer, CLIPEncoderLayer)):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
