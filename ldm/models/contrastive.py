"""A contrastive pair like CLIP: the model's text encoders and an image encoder, with a common embedding space.

Radford et al. 2021 (arXiv 2103.00020). The image encoder is transformers' vision transformer. Position embeddings are
interpolated, so it takes images of any shape whose sides are multiples of the patch.

B images or texts, K text encoders, M tokens, D channels of the common space, H×W height and width of images
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.clip_text import TextEncoderConfig, TextTower
from ldm.models.text import TextEncoders

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's normalisation of [0, 1]
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # scale of the logits (Radford et al. 2021, section 2.5)


@dataclass(frozen=True)
class ImageEncoderConfig:
    """The shape of a CLIP image tower."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: int = 32  # side of a patch in pixels
    size: int = 224  # side in pixels of the square images for which the position embeddings are stored
    embed_dim: int = 512  # channels of the common space of images and texts

    def __post_init__(self) -> None:
        for name, high in (
            ("width", 16384), ("layers", 256), ("heads", 1024), ("patch", 1024), ("size", 8192), ("embed_dim", 65536),
        ):  # fmt: skip
            check_whole("image encoder", name, getattr(self, name), 1, high)
        if self.width % self.heads:
            raise LdmError(f"image encoder: {self.width} channels do not divide into {self.heads} heads")
        self.check_sides(self.size)

    def check_sides(self, *sides: int) -> None:
        """Check that images with these sides, in pixels, consist of whole patches.

        Raises:
            LdmError: a side is not a multiple of the patch.
        """
        for side in sides:
            if side % self.patch:
                raise LdmError(
                    f"image encoder: a side of {side} pixels does not divide into patches of {self.patch}; "
                    "choose a patch that divides the sides of all images"
                )


class TextHeads(nn.Module):
    """The projections of the text encoders' final states into the common space, and the scales of the logits.

    A text encoder with a projection uses it; the others get a projection here, which the U-Net does not use.
    """

    def __init__(self, configs: Sequence[TextEncoderConfig], embed_dim: int) -> None:
        """Raises:
        LdmError: a text encoder projects to another number of channels.
        """
        super().__init__()
        for config in configs:
            if config.projection not in (0, embed_dim):
                raise LdmError(
                    f"embed_dim is {embed_dim}, but {config.component} projects to {config.projection} channels; "
                    f"embed_dim must be {config.projection} with this model"
                )
        self.projections = nn.ModuleList(
            nn.Identity() if config.projection else nn.Linear(config.width, embed_dim, bias=False) for config in configs
        )
        for layer in self.projections:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # as in CLIP
        self.log_scales = nn.Parameter(torch.full((len(configs),), math.log(FIRST_SCALE)))


class ContrastivePair(nn.Module):
    """Text encoders and an image encoder with a common embedding space."""

    def __init__(self, config: ImageEncoderConfig, text_encoders: TextEncoders) -> None:
        """Raises:
        LdmError: a text encoder projects to another number of channels than `embed_dim`.
        """
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # takes seconds

        super().__init__()
        self.config = config
        self.text_encoders = text_encoders
        self.heads = TextHeads(text_encoders.configs, config.embed_dim)
        self.image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                patch_size=config.patch,
                image_size=config.size,
                projection_dim=config.embed_dim,
                hidden_act="gelu",
            )
        )

    def forward(self, pixels: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] and token ids (B, M) for each text encoder to unit vectors of the images
        (B, D) and of the texts (K, B, D), and the scales of the logits (K,)."""
        return self.embed_images(pixels), self.embed_texts(tokens), self.heads.log_scales.exp()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to unit vectors (B, D)."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        normal = ((pixels + 1) / 2 - mean) / std
        embeds = self.image_encoder(normal, interpolate_pos_encoding=True).image_embeds
        return F.normalize(embeds.float(), dim=-1)

    def embed_texts(self, tokens: Sequence[Tensor]) -> Tensor:
        """Token ids (B, M) for each text encoder to unit vectors (K, B, D), from the state at the end of each text."""
        vectors = []
        encoders = self.text_encoders
        for config, module, project, row in zip(
            encoders.configs, encoders.towers, self.heads.projections, tokens, strict=True
        ):
            tower = cast("TextTower", module)
            ids = row.to(next(tower.parameters()).device)
            (last,) = tower(ids, config.layers)
            vectors.append(F.normalize(project(tower.end(last, ids)).float(), dim=-1))
        return torch.stack(vectors)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to unit vectors (B, D), comparable with the vectors of texts.

        Raises:
            LdmError: a side is not a multiple of the patch.
        """
        self.config.check_sides(*pixels.shape[2:])
        return self.embed_images(pixels.to(self.image_encoder.device))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors (B, D), by the last text encoder (in SDXL the one with pooled text)."""
        return self.embed_texts(self.text_encoders.tokenize(texts))[-1]
