"""Captions and size conditioning of a batch, with parts left out as classifier-free guidance needs it.

What is left out of a sample is a function of the seed, the sample's key and its epoch, so it differs between epochs.

B batch, M tokens, K text encoders
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.data.keyed import uniform
from ldm.data.loader import Batch
from ldm.families import Family
from ldm.models.text import TextEncoders
from ldm.models.unet import Conditioning


@dataclass(frozen=True)
class DropOut:
    """How often something is left out (Ho and Salimans 2022, arXiv 2207.12598)."""

    caption: tuple[float, ...] = (0.1,)  # for each text encoder, or one number for all
    together: bool = False  # from all text encoders, or from none
    size: float = 0.0  # the size conditioning: zeros in its place

    def captions(self, seed: int, keys: Sequence[str], epochs: Sequence[int], encoders: int) -> Tensor:
        """Whose caption is left out of which text encoder: (B, K)."""
        rates = self.caption if len(self.caption) == encoders else self.caption[:1] * encoders
        rows = [
            [
                uniform(seed, "drop caption", key, epoch, 0 if self.together else k) < rate
                for k, rate in enumerate(rates)
            ]
            for key, epoch in zip(keys, epochs, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.bool).view(len(rows), encoders)

    def sizes(self, seed: int, keys: Sequence[str], epochs: Sequence[int]) -> Tensor:
        """Whose size conditioning is left out: (B,)."""
        return torch.tensor(
            [uniform(seed, "drop size", key, epoch) < self.size for key, epoch in zip(keys, epochs, strict=True)]
        )


@dataclass(frozen=True)
class Prompt:
    """What the U-Net is to be told about a batch, before it is encoded."""

    texts: list[list[str]]  # B of them for each of the K text encoders
    dropped: Tensor  # (B, K): whose text is left out
    size: Tensor | None  # (B, 6 or 5) size conditioning


def prompt(batch: Batch, family: Family, drop: DropOut, seed: int, default_score: float) -> Prompt:
    """A batch's captions and size conditioning, with parts left out.

    A caption that is left out is an empty one; in SDXL's base family, zeros stand in the place of its encoding.
    """
    dropped = drop.captions(seed, batch.keys, batch.epochs, len(family.text))
    texts = [
        [
            "" if gone and not family.zero_empty_prompt else text
            for text, gone in zip(batch.captions, column, strict=True)
        ]
        for column in dropped.T.tolist()
    ]
    return Prompt(texts, dropped, size_ids(batch, drop.sizes(seed, batch.keys, batch.epochs), family, default_score))


def encode(encoders: TextEncoders, texts: Sequence[Sequence[str]]) -> Conditioning:
    """Texts, those of each text encoder, to text (B, M, T) and pooled text (B, P)."""
    return encoders.encode([encoders.tokenize_for(k, column) for k, column in enumerate(texts)])


def conditioning(encoded: Conditioning, prompt: Prompt, family: Family) -> Conditioning:
    """Encoded texts with zeros for what is left out, where the family has zeros there, and the size conditioning."""
    cond = replace(encoded, size=None if prompt.size is None else prompt.size.to(encoded.text.device))
    if not family.zero_empty_prompt or not bool(prompt.dropped.any()):
        return cond
    keep = (~prompt.dropped).to(cond.text)  # (B, K)
    widths = torch.tensor([config.width for config in family.text], device=keep.device)
    text = cond.text * keep.repeat_interleave(widths, dim=1)[:, None, :]
    return replace(cond, text=text, pooled=None if cond.pooled is None else cond.pooled * keep[:, -1:])


def size_ids(batch: Batch, dropped: Tensor, family: Family, default_score: float) -> Tensor | None:
    """The size conditioning (B, 6), the refiner's (B, 5) with its aesthetic score, or none for families without."""
    if not family.unet.size_ids:
        return None
    ids = batch.size
    if family.refiner:
        scores = torch.where(batch.scores.isnan(), torch.full_like(batch.scores, default_score), batch.scores)
        ids = torch.cat([ids[:, :4], scores[:, None]], dim=1)
    return ids * (~dropped).to(ids)[:, None]
