"""Text encoders: prompts to the conditioning of the U-Net, by one or two CLIP text towers.

SD 1.x uses the last layer of CLIP ViT-L; SD 2.x the last but one of OpenCLIP ViT-H (the model omits the last layer);
SDXL concatenates the last but one layers of CLIP ViT-L and OpenCLIP ViT-bigG, and also uses bigG's pooled text; SDXL's
refiner has bigG only.

B prompts, M tokens (77), T text channels (all towers concatenated), P channels of the pooled text
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
    """Check that every prompt is a string that tokenizers accept.

    Raises:
        LdmError: a prompt is not a string, or holds half a surrogate pair.
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
    """The tokens of a text (at most `context` - 2) with start, end and padding."""
    row = [tokenizer.start_id, *ids, tokenizer.end_id]
    return row + [tokenizer.pad_id] * (context - len(row))


class TextEncoders(nn.Module):
    """One or two text towers and their tokenizers.

    With `pooled` (SDXL), text is the last but one layer of each tower without layer norm, and the last tower gives the
    pooled text. Otherwise, text is the single tower's last layer after the final layer norm.
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
        """Token ids (B, M) for each tower; longer prompts are cut to M tokens.

        Raises:
            LdmError: a prompt is not a valid string.
        """
        return [self.tokenize_for(number, prompts) for number in range(len(self.configs))]

    def tokenize_for(self, number: int, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, M) for tower `number`, see `tokenize`."""
        check_texts(prompts)
        config, tokenizer = self.configs[number], self.tokenizers[number]
        rows = tokenizer.encode(prompts)
        return torch.tensor([padded(row[: config.context - 2], tokenizer, config.context) for row in rows])

    def encode(self, tokens: Sequence[Tensor], clip_skip: int = 0) -> Conditioning:
        """Token ids (B, M) for each tower to text (B, M, T) and, with `pooled`, pooled text (B, P).

        `clip_skip` is the number of further last layers that are left out (as in diffusers; other programs start at 1).

        Raises:
            LdmError: `clip_skip` is larger than a tower allows.
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
