"""IP-Adapters and image encoders for tiny models, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.families import Family
from ldm.models.image_prompt import ImagePromptAdapter, ImagePromptConfig, attentions
from ldm.models.unet import UNet
from ldm.weights.image_prompt import original

WIDTH, PROJECTED, PATCHES = 48, 40, 17  # of the image encoder: channels, embedding, patches with the class token


def config(family: Family, kind: str) -> ImagePromptConfig:
    shape: dict[str, Any] = {"features": PROJECTED if kind == "base" else WIDTH, "text_dim": family.unet.text_dim}
    if kind == "plus":
        shape |= {"tokens": 6, "width": 32, "heads": 2, "depth": 4, "inner": 128}
    return ImagePromptConfig(kind, **shape)


def adapter(family: Family, kind: str = "base", seed: int = 0) -> ImagePromptAdapter:
    """An adapter with random weights, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        widths = [layer.to_q.in_features for layer, _ in attentions(UNet(family.unet))]
    made = ImagePromptAdapter(config(family, kind), widths).eval()
    for parameter in made.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return made


def tensors(made: ImagePromptAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter by the authors' names."""
    own = dict(made.named_parameters())
    links = original(own)
    return {link.theirs: link.to_theirs([own[name].detach() for name in link.ours]).contiguous() for link in links}


def groups(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same in two groups, as pickles have them and diffusers takes them."""
    found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in state.items():
        group, _, rest = name.partition(".")
        found[group][rest] = tensor
    return found


def saved(path: Path, family: Family, kind: str = "base", seed: int = 0) -> dict[str, Tensor]:
    """Write an adapter's file; returns its tensors."""
    state = tensors(adapter(family, kind, seed))
    save_file(state, path)
    return state


def encoder() -> CLIPVisionModelWithProjection:
    """A tiny image encoder with random weights."""
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32,
            patch_size=8, projection_dim=PROJECTED,
        )
    ).eval()  # fmt: skip
