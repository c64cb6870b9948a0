"""The guidance scale as an input of a U-Net that was distilled with guidance (latent consistency models)."""

from __future__ import annotations

import copy

from ldm.models.surgery import replaced
from ldm.models.unet import UNet


def embed_guidance(unet: UNet, scale: float) -> UNet:
    """A U-Net that reads this guidance scale; its time embedding is a `GuidedTimeEmbedding`.

    Luo et al. 2023 (arXiv 2310.04378), section 4.3: guidance then costs no second prediction.
    """
    embedding = copy.copy(unet.time_embedding)
    embedding.scale = scale  # type: ignore[assignment]
    return replaced(unet, time_embedding=embedding)
