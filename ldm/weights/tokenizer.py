"""The files of a tokenizer, read as transformers reads them.

tokenizer.json             the whole tokenizer; or else
vocab.json, merges.txt     the vocabulary, and the pairs of tokens that are merged
tokenizer_config.json      the special tokens, the number of tokens of a text, and perhaps `added_tokens_decoder`, the
                           list of added tokens; else added tokens are in the files below, or in tokenizer.json
special_tokens_map.json    the special tokens
added_tokens.json          further tokens and their ids
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ldm.errors import LdmError, first_line
from ldm.files import read_json, write_json
from ldm.models.tokenizer import END, START, VOCAB_SIZE, Tokenizer

WHOLE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # options for finding a token in a text
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_USUAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, from `tokenizer.json` or from `vocab.json` and `merges.txt`.

    Raises:
        LdmError: files are missing or damaged, or the tokenizer is not of CLIP's kind.
    """
    names = (CONFIG, SPECIAL, ADDED, WHOLE, VOCABULARY)
    files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    if WHOLE not in files and not (VOCABULARY in files and (folder / MERGES).is_file()):
        raise LdmError(f"{folder}: the tokenizer's files are missing: {WHOLE}, or {VOCABULARY} and {MERGES}")
    try:
        tokenizer = _tokenizer(folder, files)
        cat = tokenizer.encode(["a photo of a cat"])[0]
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        raise LdmError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from None
    size = len(tokenizer)
    if (
        size < 514
        or (tokenizer.start, tokenizer.end) != (START, END)
        or (size >= VOCAB_SIZE and cat != [320, 1125, 539, 320, 2368])
    ):
        raise LdmError(f"{folder}: the tokenizer's files are not CLIP's ({size} tokens)")
    return tokenizer


def _tokenizer(folder: Path, files: dict[str, Any]) -> Tokenizer:
    config = files.get(CONFIG, {})
    names, added = _special_tokens(config, files)
    if WHOLE in files:
        vocab, pairs = files[WHOLE]["model"]["vocab"], files[WHOLE]["model"]["merges"]
    else:
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        vocab, pairs = files[VOCABULARY], [line for line in lines if line and not line.startswith("#version")]
    context = config.get("model_max_length", config.get("max_len"))
    return Tokenizer(
        vocab,
        [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs],
        start=names["bos_token"],
        end=names["eos_token"],
        unknown=names["unk_token"],
        pad=names["pad_token"],
        added=added,
        context=context if isinstance(context, int) and context < 10**6 else None,  # some files state 10³⁰
    )


def _special_tokens(config: dict[str, Any], files: dict[str, Any]) -> tuple[dict[str, str], list[AddedToken]]:
    """The special tokens by their names in the files, and all added tokens in order.

    If a token is described twice, a list of all added tokens takes precedence, then the later description.
    """
    named = _USUAL | {name: config[name] for name in _NAMED if config.get(name) is not None}
    more = [*(config.get("extra_special_tokens") or config.get("additional_special_tokens") or ())]
    if "added_tokens_decoder" in config:
        listed = {int(number): _added(token) for number, token in config["added_tokens_decoder"].items()}
    else:
        stated = files.get(SPECIAL, {})
        named |= {name: stated[name] for name in _NAMED if stated.get(name) is not None}
        special = {_content(token) for token in [*named.values(), *more]}
        listed = {
            number: AddedToken(token, normalized=token not in special, special=token in special)
            for token, number in files.get(ADDED, {}).items()
        }
        listed |= {token["id"]: _added(token) for token in files.get(WHOLE, {}).get("added_tokens", ())}
        more += [*(stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or ())]
    tokens = {token.content: token for _, token in sorted(listed.items())}
    others = [_special(token) for token in [*(named[name] for name in _NAMED if name in named), *more]]
    tokens |= {token.content: token for token in others if token.content not in tokens}
    names = {name: _content(token) for name, token in named.items()}
    for name in names.values():
        tokens[name].special = True
    return names, list(tokens.values())


def _content(token: str | dict[str, Any]) -> str:
    """A token's text; `token` is the text itself or a file's description of the token."""
    return token["content"] if isinstance(token, dict) else token


def _added(json: dict[str, Any]) -> AddedToken:
    """A token, from a file's description."""
    return AddedToken(json["content"], **{flag: json[flag] for flag in _FLAGS if flag in json})


def _special(token: str | dict[str, Any]) -> AddedToken:
    """A special token, from its text or from a file's description."""
    return _added(token | {"special": True}) if isinstance(token, dict) else AddedToken(token, special=True)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`, as published models have them, and transformers 5's `tokenizer.json`.

    Raises:
        LdmError: the files cannot be written.
    """
    names = {
        "bos_token": tokenizer.start, "eos_token": tokenizer.end, "unk_token": tokenizer.unknown,
        "pad_token": tokenizer.pad,
    }  # fmt: skip
    length = {} if tokenizer.context is None else {"model_max_length": tokenizer.context}
    whole = tokenizer.to_json()
    model = json.loads(whole)["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WHOLE).write_text(whole, encoding="utf-8")
        (folder / VOCABULARY).write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        write_json(folder / CONFIG, {"backend": "tokenizers", **names, **length, "tokenizer_class": "CLIPTokenizer"})
        write_json(folder / SPECIAL, names)
    except OSError as error:
        raise LdmError(f"the tokenizer cannot be written: {error.strerror}") from None
