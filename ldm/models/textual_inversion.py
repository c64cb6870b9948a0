"""Textual inversion: words of a prompt that stand for learned token vectors (Gal et al. 2022, arXiv 2208.01618).

A word gets new token ids, which follow those of the table of token embeddings; the table's own rows and all else of the
text towers are shared with the encoders that are given.

N vectors of a word, W channels of a text tower, B texts, M tokens
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor, nn

from ldm.models.clip_text import Embeddings
from ldm.models.surgery import rebuilt, replaced
from ldm.models.text import TextEncoders
from ldm.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class LearnedWord:
    """A word of prompts, and its learned vectors."""

    names: tuple[str, ...]  # in prompts, in upper or lower case
    vectors: tuple[Tensor, ...]  # (N, W) for each text tower


class LongerTable(nn.Embedding):
    """A table of token embeddings (its weight is shared), followed by the vectors of learned words.

    Vectors that are a parameter are in training, and stay the parameter that they are.
    """

    vectors: Tensor  # (all N, W)

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.weight = table.weight  # the same parameter, so that it moves and changes with the table's
        if isinstance(vectors, nn.Parameter):
            self.vectors = vectors
        else:
            self.register_buffer("vectors", vectors.to(table.weight), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        learned = ids >= self.num_embeddings
        vectors = self.vectors[(ids - self.num_embeddings).clamp(min=0)]
        return torch.where(learned[..., None], vectors, super().forward(ids.masked_fill(learned, 0)))


class WordTokenizer(Tokenizer):
    """A tokenizer that also knows learned words; each stands for the ids of its vectors, which stay together.

    A word is found in upper and lower case, where no letter, digit or underscore continues it; of several, the longest.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[tuple[tuple[str, ...], range]]) -> None:
        """`words` are the names and the ids of each."""
        vars(self).update(vars(tokenizer))  # the same vocabulary and rules
        self._ids = {plain(name): tuple(ids) for names, ids in words for name in names}
        self._names = {ids.start: names[0] for names, ids in words}
        self.words = {tuple(ids): names[0] for names, ids in words}  # ids -> first name
        self._words = finder(self._ids)

    def _split(self, text: str) -> list[str]:
        """Plain text and learned words in turn."""
        return self._words.split(plain(text))

    def pieces(self, text: str) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for number, part in enumerate(self._split(text)):
            if number % 2:
                found.append(self._ids[part])
            else:
                found += [(token,) for token in super().encode([part])[0]]
        return found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[token for piece in self.pieces(text) for token in piece] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        for learned, group in groupby(ids, lambda token: token >= min(self._names)):
            if learned:
                parts += [self._names[token] for token in group if token in self._names]
            else:
                parts.append(super().decode(list(group)))
        return " ".join(parts)

    def learned(self, text: str) -> list[str]:
        """The first names of the learned words in a text, each once."""
        return list(dict.fromkeys(self._names[self._ids[part][0]] for part in self._split(text)[1::2]))


def plain(text: str) -> str:
    """A text as the tokenizer reads it: in lower case, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def finder(names: Iterable[str]) -> re.Pattern[str]:
    """The regular expression that finds learned words in plain texts; its group is the word's plain name."""
    longest_first = sorted(map(plain, names), key=len, reverse=True)
    # ComfyUI writes embedding: before a name
    return re.compile(rf"(?:\bembedding:\s?)?({'|'.join(map(_pattern, longest_first))})")


def _pattern(name: str) -> str:
    """The regular expression that finds a plain name."""
    before, after = (r"\b" if re.match(r"\w", end) else "" for end in (name[0], name[-1]))
    return before + re.escape(name) + after


def with_words(encoders: TextEncoders, words: Sequence[LearnedWord]) -> TextEncoders:
    """Text encoders that also know learned words; all weights are shared with the given ones."""
    named = [(word.names, len(word.vectors[0])) for word in words]
    return with_vectors(encoders, named, [torch.cat(rows) for rows in zip(*(w.vectors for w in words), strict=True)])


def with_vectors(
    encoders: TextEncoders, words: Sequence[tuple[tuple[str, ...], int]], vectors: Sequence[Tensor]
) -> TextEncoders:
    """`with_words` of the names and the number N of vectors of each word, and of all words' vectors (all N, W) for each
    text tower."""
    towers, tokenizers = nn.ModuleList(), []
    for number, (config, tower) in enumerate(zip(encoders.configs, encoders.towers, strict=True)):
        ends = list(accumulate((count for _, count in words), initial=config.vocab_size))
        ids = [(names, range(*bounds)) for (names, _), bounds in zip(words, pairwise(ends), strict=True)]
        tokenizers.append(WordTokenizer(encoders.tokenizers[number], ids))
        towers.append(rebuilt(tower, partial(_longer, vectors[number])))
    found = replaced(encoders, towers=towers)
    found.tokenizers = tuple(tokenizers)
    return found


def tables(encoders: TextEncoders) -> list[nn.Embedding]:
    """The table of token embeddings of each text tower."""
    return [
        next(module.token_embedding for module in tower.modules() if isinstance(module, Embeddings))
        for tower in encoders.towers
    ]


def _longer(vectors: Tensor, module: nn.Module) -> dict[str, nn.Module]:
    """The replacement of a tower's table by a longer one."""
    if not isinstance(module, Embeddings):
        return {}
    return {"token_embedding": LongerTable(module.token_embedding, vectors)}
