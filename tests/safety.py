"""Small safety checkers for tests: diffusers' own class with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "hidden_act": "quick_gelu",
}  # fmt: skip


def checker(threshold: float | None = None, seed: int = 0) -> Any:
    """A checker whose concepts have this threshold: above 1 nothing is flagged, below -1 everything."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(seed)
    made = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=16)).eval()
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(made, name).normal_()
        made.concept_embeds_weights.fill_(0.0 if threshold is None else threshold)
        made.special_care_embeds_weights.fill_(0.0)
    return made


def saved(folder: Path, threshold: float | None = None, seed: int = 0) -> Path:
    """The folder of a checker."""
    checker(threshold, seed).save_pretrained(folder)
    return folder
