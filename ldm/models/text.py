"""Text encoders: prompts to the conditioning of the U-Net, by one or two CLIP text towers.

SD 1.x reads CLIP ViT-L's last layer; SD 2.x OpenCLIP ViT-H's last but one (the last is left out of the model); SDXL
joins the last but one of CLIP ViT-L and OpenCLIP ViT-bigG, and takes the latter's pooled text too; its refiner has bigG
only.

B prompts, M tokens (77), T text channels (all towers side by side), P channels of the pooled text
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.clip_text import TextEncoderConfig, TextTower, build_tower
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import Conditioning


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


def padded(ids: Sequence[int], tokenizer: Tokenizer, context: int) -> list[int]:
    """Tokens of a text, at most `context` - 2, with start, end and padding."""
    row = [tokenizer.start_id, *ids, tokenizer.end_id]
    return row + [tokenizer.pad_id] * (context - len(row))


class TextEncoders(nn.Module):
    """One or two towers and their tokenizers.

    With `pooled` (SDXL) each tower gives its last but one layer as it is, and the last tower the pooled text; without,
    the single tower gives its last layer behind the final layer norm.
    """

    def __init__(self, configs: Sequence[TextEncoderConfig], tokenizers: Sequence[Tokenizer], pooled: bool) -> None:
        super().__init__()
        self.configs = tuple(configs)
        self.tokenizers = tuple(tokenizers)
        self.pooled = pooled
        for config, tokenizer in zip(self.configs, self.tokenizers, strict=True):
            highest = max(tokenizer.vocabulary().values())
            if highest >= config.vocab_size:
                raise LdmError(
                    f"{config.component}: the tokenizer has {highest + 1} tokens, the text encoder only "
                    f"{config.vocab_size} embeddings; they do not belong together"
                )
        self.towers = nn.ModuleList(
            build_tower(config, tokenizer.end_id)
            for config, tokenizer in zip(self.configs, self.tokenizers, strict=True)
        )

    def tokenize(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids (B, M) for each tower; what does not fit into M tokens is cut.

        Raises:
            LdmError: a prompt is no text.
        """
        return [self.tokenize_for(number, prompts) for number in range(len(self.configs))]

    def tokenize_for(self, number: int, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, M) for one of the towers, as `tokenize`."""
        check_texts(prompts)
        config, tokenizer = self.configs[number], self.tokenizers[number]
        rows = tokenizer.encode(prompts)
        return torch.tensor([padded(row[: config.context - 2], tokenizer, config.context) for row in rows])

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
        for config, module, row in zip(self.configs, self.towers, tokens, strict=True):
            tower = cast("TextTower", module)
            ids = row.to(next(tower.parameters()).device)
            layer = config.layers - clip_skip - self.pooled
            if self.pooled and config.projection:
                hidden, last = tower(ids, layer, config.layers)
                pooled = tower.end(last, ids)
            else:
                (hidden,) = tower(ids, layer)
            texts.append(hidden if self.pooled else tower.final_layer_norm(hidden))
        return Conditioning(torch.cat(texts, dim=-1), pooled)

    def forward(self, prompts: Sequence[str], clip_skip: int = 0) -> Conditioning:
        """Prompts to text (B, M, T) and, with `pooled`, pooled text (B, P)."""
        return self.encode(self.tokenize(prompts), clip_skip)
