"""Prompts of any length with weighted words, in the syntax of AUTOMATIC1111's web interface.

`(word)` has weight 1.1, `(word:1.4)` weight 1.4, `[word]` weight 1/1.1; nested weights multiply. A backslash makes a
bracket literal; `BREAK` starts a new chunk. A prompt with too many tokens is split into chunks, after a comma if one is
among the last 20 tokens, and the encodings of the chunks are concatenated.

B prompts, K chunks, M tokens of a chunk (77), T text channels
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.text import TextEncoders, check_texts, padded
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import Conditioning

LONGEST = 100_000  # largest number of characters of a prompt
BACKTRACK = 20  # largest number of tokens moved to the next chunk, so that it starts after a comma
HEAVIEST = 1000  # largest weight of a word: far above meaningful weights, far below an overflow
BREAK = "BREAK"
_PIECES = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\]|[^\\()\[\]:]+|:")


@dataclass(frozen=True)
class TokenReport:
    """The number of tokens of a prompt for one text encoder, and the text that did not fit."""

    prompt: str
    encoder: str  # the text encoder's component name
    tokens: int  # number of tokens, without start and end
    room: int  # number of tokens that fit into all chunks
    cut: str = ""  # the text that was left out


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt and their weights; an unclosed bracket extends to the end, an unopened one is text.

    Raises:
        LdmError: a weight is above 1,000, by its number or by nested brackets.
    """
    texts: list[tuple[str, int, int]] = []  # (text, index of innermost round bracket, number of open square brackets)
    around = [0]  # for each round bracket the index of the enclosing one; index 0 is the whole prompt
    factors = [1.0]  # the weight factor of each round bracket
    inner = square = 0
    for match in _PIECES.finditer(prompt):
        piece, number = match[0], match[1]
        if piece == "(":
            around.append(inner)
            factors.append(1.1)
            inner = len(around) - 1
        elif (piece == ")" or number is not None) and inner:
            factors[inner] = float(number or 1.1)
            inner = around[inner]
        elif piece == "[":
            square += 1
        elif piece == "]" and square:
            square -= 1
        else:
            texts.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, inner, square))
    for bracket in range(1, len(around)):
        factors[bracket] *= factors[around[bracket]]
    parts = ((text, factors[bracket] * (1 / 1.1) ** depth) for text, bracket, depth in texts)
    merged = [("".join(text for text, _ in group), weight) for weight, group in groupby(parts, lambda part: part[1])]
    for text, weight in merged:
        if not abs(weight) <= HEAVIEST:
            raise LdmError(f"a weight of {weight:.4g} in a prompt, for {text[:40]!r}; at most {HEAVIEST} makes sense")
    return merged


@dataclass(frozen=True)
class Chunk:
    """The tokens of one chunk and their weights, without start, end and padding."""

    ids: list[int]
    weights: list[float]


def split_into_chunks(tokenizer: Tokenizer, parts: Sequence[tuple[str, float]], size: int) -> list[Chunk]:
    """The weighted parts of a prompt as chunks of at most `size` tokens; at least one."""
    comma = tokenizer.id_of(",</w>")
    chunks: list[Chunk] = []
    ids: list[int] = []
    weights: list[float] = []
    last_comma = -1

    def finish(count: int) -> None:
        nonlocal ids, weights, last_comma
        chunks.append(Chunk(ids[:count], weights[:count]))
        ids, weights, last_comma = ids[count:], weights[count:], -1

    for text, weight in parts:
        for number, section in enumerate(re.split(rf"\b{BREAK}\b", text)):
            if number:
                finish(len(ids))
            for piece in tokenizer.pieces(section):
                if len(ids) == size:
                    near = piece != (comma,) and last_comma >= 0 and size - last_comma <= BACKTRACK
                    finish(last_comma + 1 if near else size)
                if len(ids) + len(piece) > size:
                    finish(len(ids))
                if piece == (comma,):
                    last_comma = len(ids)
                ids += piece
                weights += [weight] * len(piece)
    if ids or not chunks:
        finish(len(ids))
    return chunks


class PromptReader:
    """Parses prompts and splits them into chunks of tokens, with a cache of the results."""

    def __init__(self, weights: bool = True) -> None:
        """Without `weights`, brackets are text, and all parts of a prompt have weight 1."""
        self.weights = weights
        self._parts: dict[str, list[tuple[str, float]]] = {}
        self._chunks: dict[tuple[Tokenizer, int, str], list[Chunk]] = {}

    def parts(self, prompt: str) -> list[tuple[str, float]]:
        """The parts of a prompt and their weights.

        Raises:
            LdmError: the prompt is not a string, is longer than 100,000 characters, or has a weight above 1,000.
        """
        if prompt not in self._parts:
            check_texts([prompt])
            if len(prompt) > LONGEST:
                raise LdmError(f"a prompt of {len(prompt)} characters; at most {LONGEST} are read")
            self._parts[prompt] = parse_weights(prompt) if self.weights else [(prompt, 1.0)]
        return self._parts[prompt]

    def chunks(self, tokenizer: Tokenizer, prompt: str, size: int) -> list[Chunk]:
        """A prompt as chunks of at most `size` tokens; at least one. Raises the errors of `parts`."""
        key = (tokenizer, size, prompt)
        if key not in self._chunks:
            self._chunks[key] = split_into_chunks(tokenizer, self.parts(prompt), size)
        return self._chunks[key]


def count_chunks(encoders: TextEncoders, prompts: Sequence[Sequence[str]], reader: PromptReader) -> list[int]:
    """The number of chunks of each of B prompts; for `prompts` and `reader` see `encode_prompts`."""
    columns = [
        [len(reader.chunks(tokenizer, prompt, config.context - 2)) for prompt in texts]
        for config, tokenizer, texts in zip(encoders.configs, encoders.tokenizers, prompts, strict=True)
    ]
    return [max(row) for row in zip(*columns, strict=True)]


def encode_prompts(
    encoders: TextEncoders,
    prompts: Sequence[Sequence[str]],
    *,
    clip_skip: int = 0,
    chunks: bool = True,
    reader: PromptReader | None = None,
) -> tuple[Conditioning, list[TokenReport]]:
    """Encode prompts: text (B, K·M, T), pooled text (B, P) of the first chunk, a report for each prompt and encoder.

    Args:
        encoders: the text encoders.
        prompts: a list of B prompts for each text encoder.
        clip_skip: the number of last layers left out, see `TextEncoders.encode`.
        chunks: split long prompts into chunks; otherwise long prompts are cut, and the report holds the text cut off.
        reader: parses the prompts and caches the results; by default a new one that reads brackets as weights.

    Raises:
        LdmError: a prompt is longer than 100,000 characters, a weight is above 1,000, or `clip_skip` is out of range.
    """
    reader = reader or PromptReader()
    reports: list[TokenReport] = []
    towers: list[list[list[Chunk]]] = []
    for config, tokenizer, texts in zip(encoders.configs, encoders.tokenizers, prompts, strict=True):
        rows = []
        for prompt in texts:
            row = reader.chunks(tokenizer, prompt, config.context - 2)
            kept = row if chunks else row[:1]
            cut = tokenizer.decode([token for chunk in row[len(kept) :] for token in chunk.ids])
            count = sum(len(chunk.ids) for chunk in row)
            reports.append(TokenReport(prompt, config.component, count, len(kept) * (config.context - 2), cut))
            rows.append(kept)
        towers.append(rows)
    number = max(len(row) for rows in towers for row in rows)
    encoded = []
    for index in range(number):
        here = [[row[index] if index < len(row) else Chunk([], []) for row in rows] for rows in towers]
        tokens = [
            torch.tensor([padded(chunk.ids, tokenizer, config.context) for chunk in rows])
            for config, tokenizer, rows in zip(encoders.configs, encoders.tokenizers, here, strict=True)
        ]
        cond = encoders.encode(tokens, clip_skip)
        encoded.append(Conditioning(_weighted(cond.text, here, encoders), cond.pooled))
    return Conditioning(torch.cat([cond.text for cond in encoded], dim=1), encoded[0].pooled), reports


def _weighted(text: Tensor, chunks: Sequence[Sequence[Chunk]], encoders: TextEncoders) -> Tensor:
    """Token vectors (B, M, T) times their weights, rescaled to keep the mean of each prompt and encoder."""
    parts = []
    for part, rows in zip(text.split([config.width for config in encoders.configs], dim=-1), chunks, strict=True):
        if all(weight == 1 for chunk in rows for weight in chunk.weights):
            parts.append(part)
            continue
        factors = torch.ones(part.shape[:2], dtype=torch.float32)
        for row, chunk in enumerate(rows):
            factors[row, 1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, dtype=torch.float32)
        scaled = part * factors[:, :, None].to(part)
        before, after = part.mean(dim=(1, 2), keepdim=True), scaled.mean(dim=(1, 2), keepdim=True)
        changed = (factors != 1).any(dim=1)[:, None, None].to(part.device)
        parts.append(torch.where(changed, scaled * (before / after), part))
    return torch.cat(parts, dim=-1)
