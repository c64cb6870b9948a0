"""CLIP's tokenizer: texts to token ids and back. CLIP's vocabulary comes with the package open_clip_torch.

Radford et al. 2021 (arXiv 2103.00020), section 2.4. The rules are those of transformers' `CLIPTokenizer`: the
library `tokenizers` normalises a text, splits it into words, and merges the letters of each word into tokens.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ldm.errors import LdmError

VOCAB_SIZE = 49408  # CLIP's vocabulary: 512 bytes, 48,894 merges, start and end
START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 512  # tokens of single bytes: each byte within a word, and at the end of a word
_WORD_END = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """A vocabulary, its merges, and the special tokens.

    Several threads may use one tokenizer, because no call changes it.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        start: str = START,
        end: str = END,
        unknown: str = END,
        pad: str = END,
        added: Iterable[AddedToken] = (),
        context: int | None = None,
    ) -> None:
        """Args:
            vocab: the id of each token.
            merges: pairs of tokens that are merged, the most frequent first.
            start: the token before a text.
            end: the token after a text.
            unknown: the token for words that are not in the vocabulary.
            pad: the padding token.
            added: tokens that are matched in a text before words are split, in this order; tokens that are not in the
                vocabulary get the next ids. The four tokens above are appended if they are missing.
            context: the number of tokens of a text, with start and end; None if the tokenizer's files do not state it.

        Raises:
            Exception: the library rejects the vocabulary and the merges.
        """
        self.start, self.end, self.unknown, self.pad = start, end, unknown, pad
        self.context = context
        self._rules = tokenizers.Tokenizer(
            models.BPE(
                vocab=dict(vocab),
                merges=list(merges),
                continuing_subword_prefix="",
                end_of_word_suffix=_WORD_END,
                fuse_unk=False,
                unk_token=unknown,
            )
        )
        self._rules.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._rules.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._rules.decoder = decoders.ByteLevel()
        found = list(added)
        there = {token.content for token in found}
        own = [name for name in dict.fromkeys((start, end, unknown, pad)) if name not in there]
        self._rules.add_tokens([*found, *(AddedToken(name, special=True) for name in own)])
        self.start_id, self.end_id, self.pad_id = (self.id_of(name) for name in (start, end, pad))
        self._rules.post_processor = processors.RobertaProcessing(  # used by other programs, not by `encode`
            (end, self.end_id), (start, self.start_id), trim_offsets=False, add_prefix_space=False
        )

    def __len__(self) -> int:
        return self._rules.get_vocab_size()

    def vocabulary(self) -> dict[str, int]:
        """The id of each token, with the added tokens."""
        return self._rules.get_vocab()

    def id_of(self, token: str) -> int:
        """The id of a token, or the id of the unknown token."""
        number = self._rules.token_to_id(token)
        return self.id_of(self.unknown) if number is None else number

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without start, end and padding, and not cut."""
        return [encoding.ids for encoding in self._rules.encode_batch(list(texts), add_special_tokens=False)]

    def pieces(self, text: str) -> list[tuple[int, ...]]:
        """The token ids of a text; those that must stay in one chunk together are one tuple."""
        return [(token,) for token in self.encode([text])[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, in lower case and with single spaces."""
        return self._rules.decode(list(ids), skip_special_tokens=False).replace(_WORD_END, " ").strip()

    def to_json(self) -> str:
        """The tokenizer in the format of `tokenizer.json`."""
        return self._rules.to_str(pretty=True)


def clip_tokenizer(pad_token: str = END, context: int = 77, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """CLIP's tokenizer for texts of `context` tokens, padded with `pad_token`: `<|endoftext|>` or, in SD 2's and SDXL's
    OpenCLIP towers, `!`.

    A smaller `vocab_size` keeps the first merges, which are the most frequent ones: a coarser tokenizer for small
    models.

    Raises:
        LdmError: the vocabulary size is not between 514 and 49,408, or open_clip_torch is not installed.
    """
    if not BYTES + 2 <= vocab_size <= VOCAB_SIZE:
        raise LdmError(f"a CLIP vocabulary of {vocab_size} tokens cannot be built; choose from 514 to {VOCAB_SIZE}")
    merges = _merges()[: vocab_size - BYTES - 2]
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return Tokenizer(vocab, merges, pad=pad_token, context=context)


@cache
def _merges() -> list[tuple[str, str]]:
    spec = importlib.util.find_spec("open_clip")  # find the package's files without importing it, which takes seconds
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
