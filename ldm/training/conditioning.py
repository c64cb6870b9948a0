"""Captions and time ids of a batch, with conditioning dropout for classifier-free guidance.

What is dropped from a sample is a function of the seed, the sample's key and its epoch, so it differs between epochs.

B batch, M tokens, K text encoders
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm.data.keyed import uniform
from ldm.data.loader import Batch
from ldm.families import Family
from ldm.models.text import TextEncoders
from ldm.models.unet import Conditioning


@dataclass(frozen=True)
class ConditioningDropout:
    """Rates of conditioning dropout (Ho and Salimans 2022, arXiv 2207.12598)."""

    caption: tuple[float, ...] = (0.1,)  # for each text encoder, or one rate for all
    together: bool = False  # whether a caption is dropped for all text encoders together
    size: float = 0.0  # rate of dropped time ids, which become zeros
    image: float = 0.0  # rate of dropped images that the network reads beside the text
    both: float = 0.0  # rate of captions and images that are dropped together, besides those

    def captions(self, seed: int, keys: Sequence[str], epochs: Sequence[int], encoders: int) -> Tensor:
        """A mask of the captions that are dropped, for each text encoder: (B, K)."""
        rates = self.caption if len(self.caption) == encoders else self.caption[:1] * encoders
        rows = [
            [
                uniform(seed, "drop caption", key, epoch, 0 if self.together else k) < rate
                or self._both(seed, key, epoch)
                for k, rate in enumerate(rates)
            ]
            for key, epoch in zip(keys, epochs, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.bool).view(len(rows), encoders)

    def sizes(self, seed: int, keys: Sequence[str], epochs: Sequence[int]) -> Tensor:
        """A mask of the time ids that are dropped: (B,)."""
        return torch.tensor(
            [uniform(seed, "drop size", key, epoch) < self.size for key, epoch in zip(keys, epochs, strict=True)]
        )

    def images(self, seed: int, keys: Sequence[str], epochs: Sequence[int]) -> Tensor:
        """A mask of the images that are dropped: (B,)."""
        return torch.tensor(
            [
                uniform(seed, "drop image", key, epoch) < self.image or self._both(seed, key, epoch)
                for key, epoch in zip(keys, epochs, strict=True)
            ]
        )

    def _both(self, seed: int, key: str, epoch: int) -> bool:
        """Whether caption and image of a sample are dropped together."""
        return uniform(seed, "drop both", key, epoch) < self.both


@dataclass(frozen=True)
class Prompt:
    """Texts, time ids and further inputs of a batch after conditioning dropout, before the texts are encoded."""

    texts: list[list[str]]  # for each of the K text encoders, B texts
    dropped: Tensor  # (B, K): mask of the texts that are dropped
    size: Tensor | None  # (B, 6 or 5) time ids
    more: Mapping[str, Tensor] = field(default_factory=dict)  # (B, …) each: inputs beside the text, by name


def prompt(batch: Batch, family: Family, dropout: ConditioningDropout, seed: int, default_score: float) -> Prompt:
    """A batch's captions and time ids, with conditioning dropout.

    A dropped caption is an empty one; in SDXL's base family, its encoding becomes zeros (`conditioning`).
    """
    dropped = dropout.captions(seed, batch.keys, batch.epochs, len(family.text))
    texts = [
        [
            "" if gone and not family.zero_empty_prompt else text
            for text, gone in zip(batch.captions, column, strict=True)
        ]
        for column in dropped.T.tolist()
    ]
    return Prompt(texts, dropped, time_ids(batch, dropout.sizes(seed, batch.keys, batch.epochs), family, default_score))


def encode(encoders: TextEncoders, texts: Sequence[Sequence[str]]) -> Conditioning:
    """Texts for each text encoder to text (B, M, T) and pooled text (B, P)."""
    return encoders.encode([encoders.tokenize_for(k, column) for k, column in enumerate(texts)])


def conditioning(encoded: Conditioning, prompt: Prompt, family: Family) -> Conditioning:
    """Encoded texts and time ids; dropped texts become zeros where the family has zeros for an empty prompt."""
    size = None if prompt.size is None else prompt.size.to(encoded.text.device)
    cond = replace(encoded, size=size, more=prompt.more)
    if not family.zero_empty_prompt or not bool(prompt.dropped.any()):
        return cond
    keep = (~prompt.dropped).to(cond.text)  # (B, K)
    widths = torch.tensor([config.width for config in family.text], device=keep.device)
    text = cond.text * keep.repeat_interleave(widths, dim=1)[:, None, :]
    return replace(cond, text=text, pooled=None if cond.pooled is None else cond.pooled * keep[:, -1:])


def time_ids(batch: Batch, dropped: Tensor, family: Family, default_score: float) -> Tensor | None:
    """The time ids (B, 6), the refiner's (B, 5) with its aesthetic score; None for families without time ids."""
    if not family.xl:
        return None
    ids = batch.size
    if family.refiner:
        scores = torch.where(batch.scores.isnan(), torch.full_like(batch.scores, default_score), batch.scores)
        ids = torch.cat([ids[:, :4], scores[:, None]], dim=1)
    return ids * (~dropped).to(ids)[:, None]
