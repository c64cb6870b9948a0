"""Text encoders: prompts to the conditioning of the U-Net, by one or two CLIP text towers of transformers.

SD 1.x reads CLIP ViT-L's last layer; SD 2.x OpenCLIP ViT-H's last but one (the last is left out of the model); SDXL
joins the last but one of CLIP ViT-L and OpenCLIP ViT-bigG, and takes the latter's pooled text too; its refiner has bigG
only.

B prompts, M tokens (77), T text channels (all towers side by side), P channels of the pooled text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.errors import LdmError, check_whole
from ldm.models.tokenizer import END, VOCAB_SIZE
from ldm.models.unet import Conditioning


@dataclass(frozen=True)
class TextEncoderConfig:
    """The shape of a CLIP text tower."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # channels inside the feed-forward layers
    activation: str = "quick_gelu"  # OpenAI's CLIP; "gelu" is OpenCLIP
    projection: int = 0  # channels of the pooled text; 0: the tower has no projection and gives none
    vocab_size: int = VOCAB_SIZE
    context: int = 77  # tokens of a text
    pad_token: str = END  # "!" (id 0) in the OpenCLIP towers

    def __post_init__(self) -> None:
        for name, high in (
            ("width", 16384), ("layers", 256), ("heads", 1024), ("hidden", 65536), ("vocab_size", 2**24),
            ("context", 4096),
        ):  # fmt: skip
            check_whole("text encoder", name, getattr(self, name), 1, high)
        if self.width % self.heads:
            raise LdmError(f"text encoder: {self.width} channels do not divide into {self.heads} heads")
        if self.activation not in ("quick_gelu", "gelu"):
            raise LdmError(f"text encoder: activation {self.activation!r}; known are 'quick_gelu' and 'gelu'")
        if not isinstance(self.projection, int) or not 0 <= self.projection <= 65536:
            raise LdmError(f"text encoder: projection is {self.projection!r}; it must be from 0 to 65536")

    @property
    def component(self) -> str:
        """The name of its folder in a diffusers model: the tower that gives the pooled text is the second one."""
        return "text_encoder_2" if self.projection else "text_encoder"

    @property
    def open_clip(self) -> bool:
        """Whether it is one of OpenCLIP's towers, which original checkpoints hold in OpenCLIP's own layout."""
        return self.activation == "gelu"


def build_tower(config: TextEncoderConfig, end_id: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    """transformers' module for one tower; `end_id` is the token whose place gives the pooled text."""
    tower_config = CLIPTextConfig(
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection or config.width,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context,
        bos_token_id=end_id - 1,
        eos_token_id=end_id,
    )
    return CLIPTextModelWithProjection(tower_config) if config.projection else CLIPTextModel(tower_config)


def check_texts(prompts: Sequence[str]) -> None:
    """Raise unless every prompt is a text that tokenizers take.

    Raises:
        LdmError: one is not.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise LdmError(f"prompt {prompt!r}: a text is needed")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise LdmError(
                f"a prompt has half a character at place {error.start}; it was cut or decoded wrongly"
            ) from None


def padded(ids: Sequence[int], tokenizer: CLIPTokenizer, context: int) -> list[int]:
    """Tokens of a text, at most `context` - 2, with start, end and padding.

    A tokenizer that is told to cut and pad remembers it, for other threads that are just using it too.
    """
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (context - len(row))


class TextEncoders(nn.Module):
    """One or two towers and their tokenizers.

    With `pooled` (SDXL) each tower gives its last but one layer as it is, and the last tower the pooled text; without,
    the single tower gives its last layer behind the final layer norm.
    """

    def __init__(self, configs: Sequence[TextEncoderConfig], tokenizers: Sequence[CLIPTokenizer], pooled: bool) -> None:
        super().__init__()
        self.configs = tuple(configs)
        self.tokenizers = tuple(tokenizers)
        self.pooled = pooled
        for config, tokenizer in zip(self.configs, self.tokenizers, strict=True):
            highest = max(tokenizer.get_vocab().values())
            if highest >= config.vocab_size:
                raise LdmError(
                    f"{config.component}: the tokenizer has {highest + 1} tokens, the text encoder only "
                    f"{config.vocab_size} embeddings; they do not belong together"
                )
        self.towers = nn.ModuleList(
            build_tower(config, tokenizer.eos_token_id)
            for config, tokenizer in zip(self.configs, self.tokenizers, strict=True)
        )

    def tokenize(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids (B, M) for each tower; what does not fit into M tokens is cut.

        Raises:
            LdmError: a prompt is no text.
        """
        check_texts(prompts)
        tokens = []
        for config, tokenizer in zip(self.configs, self.tokenizers, strict=True):
            rows = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
            tokens.append(torch.tensor([padded(row[: config.context - 2], tokenizer, config.context) for row in rows]))
        return tokens

    def encode(self, tokens: Sequence[Tensor], clip_skip: int = 0) -> Conditioning:
        """Token ids (B, M) for each tower to text (B, M, T) and, with `pooled`, pooled text (B, P).

        `clip_skip` leaves out that many more of the last layers (diffusers counts alike; other programs start at 1).

        Raises:
            LdmError: more layers are skipped than a tower has.
        """
        fewest = min(config.layers for config in self.configs)
        if not isinstance(clip_skip, int) or not 0 <= clip_skip <= fewest - 1 - self.pooled:
            raise LdmError(f"clip_skip {clip_skip!r}: choose from 0 to {fewest - 1 - self.pooled} for this model")
        texts, pooled = [], None
        for module, ids in zip(self.towers, tokens, strict=True):
            tower = cast("CLIPTextModel", module)
            out = tower(ids.to(tower.device), output_hidden_states=True)
            hidden = out.hidden_states[-1 - clip_skip - self.pooled]
            texts.append(hidden if self.pooled else tower.final_layer_norm(hidden))
            pooled = out.text_embeds if self.pooled and "text_embeds" in out else None
        return Conditioning(torch.cat(texts, dim=-1), pooled)

    def forward(self, prompts: Sequence[str], clip_skip: int = 0) -> Conditioning:
        """Prompts to text (B, M, T) and, with `pooled`, pooled text (B, P)."""
        return self.encode(self.tokenize(prompts), clip_skip)
