"""The tokenizer against transformers' and open_clip's, on texts of all kinds and from files of all ages."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from ldm.errors import LdmError
from ldm.models.tokenizer import END, Tokenizer, clip_tokenizer
from ldm.weights.tokenizer import read_tokenizer, write_tokenizer

TEXTS = [
    "a photo of a cat",
    "",
    " ",
    "A  Painting\tof THE sea, by Hokusai; it's 3 o'clock & we'll go!!",
    "naïve café – 東京 🙂 <|endoftext|> ½ ﬁ İstanbul",
    "cafe\u0301 \u1e9b\u0323 Å ﷺ ß ẞ Σας",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☕️ e\u0301\u200d",
    "IT'S he'S we'LL I'D you'RE they'VE I'M don'T 's'tre 'tis o''clock",
    "zero\x00one\x01\x1b[31m\x7f\x85two\u2028three\u00a0four\ufeff\u200bfive\r\nsix",
    "<|startoftext|>a<|ENDOFTEXT|>b<|endoftext|><|endoftext|> <| endoftext |> </w> dog</w>",
    "!! hello!world ! a!b",
    "1234567890 ٣٤ ⅷ ² x2y3 3.14 1,000",
    "under_score-dash/slash\\back #tag @me http://a.b/c?d=e&f=g",
    "привет мир שלום עולם مرحبا नमस्ते สวัสดี 안녕하세요 こんにちは",
    "\U0010ffff\ue000\ufffd",
    "word " * 200,
    "x" * 5000,
    "<my-dog> is <My-Dog>s [PAD] lstripped rstripped wholeword whole-word",
]


@cache
def random_texts() -> list[str]:
    """Characters of every kind in any order, with special tokens in between."""
    draw = random.Random(0)
    pieces = [*"aZ09'!.,_-<>|[]()/ \t\n\x00\x1f", "é", "ß", "İ", "東", "🙂", "\u0301", "\u200d", END, "'LL", "<my-dog>"]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 60))) for _ in range(300)]
    plane = [chr(n) for n in range(0x3000) if not 0xD800 <= n < 0xE000]
    return texts + ["".join(draw.choices(plane, k=80)) for _ in range(300)]


def same(theirs: Any, *all_ours: Tokenizer) -> None:
    """That tokenizers do the same as one of transformers."""
    texts = TEXTS + random_texts()
    wanted = theirs(texts, add_special_tokens=False, verbose=False).input_ids
    decoded = [theirs.decode(ids) for ids in wanted]
    for ours in all_ours:
        assert len(ours) == len(theirs)
        assert ours.vocabulary() == theirs.get_vocab()
        assert (ours.start, ours.end, ours.unknown, ours.pad) == (
            theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token,
        )  # fmt: skip
        assert (ours.start_id, ours.end_id, ours.pad_id) == (
            theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id,
        )  # fmt: skip
        for token in (",</w>", "cat</w>", "nonsense", END):
            assert ours.id_of(token) == theirs.convert_tokens_to_ids(token)
        for text, ids, other, again in zip(texts, ours.encode(texts), wanted, decoded, strict=True):
            assert ids == other, repr(text)
            assert ours.decode(ids) == again, repr(text)


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("size", [1000, 49408])
@pytest.mark.parametrize(("pad_token", "pad_id"), [(END, None), ("!", 0)])
def test_equals_transformers(tmp_path: Path, pad_token: str, pad_id: int | None, size: int, whole: bool) -> None:
    """From the files that we write: all of them, or those that were there before transformers 5 alone."""
    ours = clip_tokenizer(pad_token, vocab_size=size)
    assert len(ours) == size
    assert ours.pad_id == (size - 1 if pad_id is None else pad_id)
    write_tokenizer(ours, tmp_path)
    assert (tmp_path / "merges.txt").read_text().splitlines()[1] == "i n"
    if not whole:
        (tmp_path / "tokenizer.json").unlink()
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 77
    again = read_tokenizer(tmp_path)
    assert again.context == 77
    same(theirs, ours, again)


MY_DOG = {"content": "<my-dog>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
MARKS = {name: MY_DOG | {"content": END} for name in ("eos_token", "unk_token", "pad_token")}
MARKS["bos_token"] = MY_DOG | {"content": "<|startoftext|>"}
FOLDERS: dict[str, dict[str, Any]] = {  # what stands in the files besides the vocabulary
    "as CLIP was published": {
        "tokenizer_config.json": {name: {"__type": "AddedToken"} | token for name, token in MARKS.items()}
        | {"errors": "replace", "do_lower_case": True, "add_prefix_space": False, "model_max_length": 77},
        "special_tokens_map.json": MARKS | {"pad_token": END},
    },
    "nothing": {},
    "another pad token": {
        "tokenizer_config.json": {"model_max_length": 77, "pad_token": "[PAD]"},
        "special_tokens_map.json": {"pad_token": "!"},
    },
    "a pad token of its own": {"special_tokens_map.json": {"pad_token": MY_DOG | {"content": "[PAD]"}}},
    "further tokens": {"added_tokens.json": {"<my-dog>": 1001, "lstripped": 1000, "dog": 1002}},
    "further special tokens": {
        "special_tokens_map.json": {"additional_special_tokens": ["<my-dog>", "whole"]},
        "added_tokens.json": {"<my-dog>": 1000},
    },
    "transformers 4": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "998": MARKS["bos_token"] | {"special": True},
                "999": MARKS["eos_token"] | {"special": True},
                "1000": MY_DOG | {"special": False},
                "1001": MY_DOG | {"content": "lstripped", "lstrip": True, "special": False},
                "1002": MY_DOG | {"content": "rstripped", "rstrip": True, "normalized": False, "special": True},
                "1003": MY_DOG | {"content": "whole", "single_word": True, "special": False},
            },
            "bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": "<my-dog>",
            "model_max_length": 1000000000000000019884624838656,
        },
        "special_tokens_map.json": {"pad_token": "!"},  # which is not read
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_files_of_all_ages_are_read_as_transformers_does(tmp_path: Path, name: str) -> None:
    write_tokenizer(clip_tokenizer(vocab_size=1000), tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).unlink()
    for file, content in FOLDERS[name].items():
        (tmp_path / file).write_text(json.dumps(content))
    ours = read_tokenizer(tmp_path)
    same(CLIPTokenizer.from_pretrained(tmp_path), ours)
    assert ours.context == FOLDERS[name].get("tokenizer_config.json", {}).get("model_max_length", 77) or (
        ours.context is None
    )
    write_tokenizer(ours, tmp_path / "ours")
    same(CLIPTokenizer.from_pretrained(tmp_path / "ours"), ours, read_tokenizer(tmp_path / "ours"))


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    write_tokenizer(clip_tokenizer("!", vocab_size=1000), tmp_path / "ours")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    theirs.add_tokens(["<my-dog>", AddedToken("whole", single_word=True)])
    theirs.add_tokens(["lstripped"], special_tokens=True)
    theirs.save_pretrained(tmp_path / "theirs")
    same(theirs, read_tokenizer(tmp_path / "theirs"))


def test_equals_open_clip_where_the_rules_agree() -> None:
    reference = open_clip.get_tokenizer("ViT-H-14")
    ours = clip_tokenizer("!")
    for prompt in ("a photo of a cat", "it's 3 o'clock, we'll go", "naïve café 東京"):
        ids = [ours.start_id, *ours.encode([prompt])[0], ours.end_id]
        assert ids + [0] * (77 - len(ids)) == reference(prompt)[0].tolist()


def test_small_vocabularies_are_the_first_merges_of_the_large_one() -> None:
    small, large = clip_tokenizer(vocab_size=1000), clip_tokenizer()
    assert (small.start_id, small.end_id) == (998, 999)
    for tokenizer in (small, large):
        assert tokenizer.decode(tokenizer.encode(["a photo of a cat"])[0]) == "a photo of a cat"
    with pytest.raises(LdmError, match="514"):
        clip_tokenizer(vocab_size=513)


def test_missing_files_are_noticed(tmp_path: Path) -> None:
    missing = "the tokenizer's files are missing: tokenizer.json, or vocab.json and merges.txt"
    with pytest.raises(LdmError, match=missing):
        read_tokenizer(tmp_path)
    write_tokenizer(clip_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").rename(tmp_path / "gone")
    with pytest.raises(LdmError, match=missing):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "[]", "tokenizer.json holds a JSON list"),
        ("tokenizer.json", "{}", "the tokenizer cannot be read"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": []}}', "the tokenizer cannot be read"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}', "the tokenizer cannot be read"),
        ("tokenizer.json", '{"model": {"vocab": [1], "merges": [2]}}', "the tokenizer cannot be read"),
        ("vocab.json", "null", "vocab.json holds a JSON NoneType"),
        ("vocab.json", '{"a": "b"}', "the tokenizer cannot be read"),
        ("merges.txt", "#version: 0.2\none two three\n", "the tokenizer cannot be read"),
        ("merges.txt", b"\xff\xfe", "the tokenizer cannot be read"),
        ("tokenizer_config.json", '{"bos_token": 5}', "the tokenizer cannot be read"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "are not CLIP's"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "the tokenizer cannot be read"),
        ("special_tokens_map.json", '{"eos_token": {}}', "the tokenizer cannot be read"),
        ("added_tokens.json", '{"a": []}', "the tokenizer cannot be read"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, file: str, content: str | bytes, message: str) -> None:
    write_tokenizer(clip_tokenizer(vocab_size=1000), tmp_path)
    if file != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    if file == "tokenizer_config.json":
        (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LdmError, match=message):
        read_tokenizer(tmp_path)
