"""CLIP's tokenizer, built offline from the byte-pair vocabulary that the package open_clip_torch ships.

Radford et al. 2021 (arXiv 2103.00020), section 2.4. The rules are those of transformers' `CLIPTokenizer`.
"""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from ldm.errors import LdmError

VOCAB_SIZE = 49408  # of CLIP: 512 bytes, 48,894 merges, start and end
START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 512  # every byte within a word, and at its end


def clip_tokenizer(pad_token: str = END, context: int = 77, vocab_size: int = VOCAB_SIZE) -> CLIPTokenizer:
    """CLIP's tokenizer for texts of `context` tokens, padded with `pad_token`: `<|endoftext|>` or, in SD 2's and SDXL's
    OpenCLIP towers, `!`.

    Merges are ordered by frequency, so a smaller `vocab_size` keeps the first of them: a coarser tokenizer of the same
    kind, for small models.

    Raises:
        LdmError: the vocabulary size is not between 514 and 49,408, or open_clip_torch is not installed.
    """
    if not BYTES + 2 <= vocab_size <= VOCAB_SIZE:
        raise LdmError(f"a CLIP vocabulary of {vocab_size} tokens cannot be built; choose from 514 to {VOCAB_SIZE}")
    merges = _merges()[: vocab_size - BYTES - 2]
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs: Any = merges  # the signature says list[str], but transformers takes pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token=pad_token, model_max_length=context)


@cache
def _merges() -> list[tuple[str, str]]:
    spec = importlib.util.find_spec("open_clip")  # found, not imported: importing it takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise LdmError("CLIP's vocabulary comes with open_clip_torch, which is missing: pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    pairs = [line.split() for line in lines[1 : VOCAB_SIZE - BYTES - 2 + 1]]
    return [(left, right) for left, right in pairs]


def _byte_letters() -> list[str]:
    """A visible character for each byte, in the order of the vocabulary: printable bytes first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
