"""What settings, prompts, records and AUTOMATIC1111's text say of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.errors import LdmError
from pipelines.mixes import (
    Wanted,
    are_mixes,
    from_tags,
    joined_mixes,
    parse_mix,
    read_tags,
    summed,
    to_hashes,
    to_tags,
    wanted,
)


def asked(entries: tuple[Wanted, ...]) -> list[tuple[str, float, float]]:
    """Names, weights in the U-Net, weights in the text encoders."""
    return [(one.name, one.unet, one.text) for one in entries]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.safetensors", (("a.safetensors", 1.0),)),
        ("a.safetensors:0.8", (("a.safetensors", 0.8),)),
        ("a:-1", (("a", -1.0),)),
        ("a:0.5:0.8", (("a", {"unet": 0.8, "text": 0.5}),)),
        ("a:unet=0.8:te=0.5", (("a", {"unet": 0.8, "text": 0.5}),)),
        ("a:unet=0.8", (("a", {"unet": 0.8, "text": 1.0}),)),
        ("a:text=0.5", (("a", 0.5),)),
        ("C:\\a.safetensors:0.8", (("C:\\a.safetensors", 0.8),)),
    ],
)
def test_an_option(text: str, value: Any) -> None:
    assert parse_mix(text) == value
    assert are_mixes(value)


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:much", "a:1:2:3", "a:nan", "a:1001", "a:dyn=4", "a:te=1:text=2"])
def test_an_option_without_meaning(text: str) -> None:
    with pytest.raises(ValueError):
        parse_mix(text)


@pytest.mark.parametrize(
    ("value", "mixes"),
    [
        ({"a": 0.8, Path("b.pt"): np.float32(0.5)}, [[("a", 0.8, 0.8), ("b.pt", 0.5, 0.5)]]),
        ({"a": {"unet": 0.8, "text": 0}}, [[("a", 0.8, 0.0)]]),
        (["a", "b"], [[("a", 1.0, 1.0), ("b", 1.0, 1.0)]]),
        ([("a", 0.5), "b"], [[("a", 0.5, 0.5), ("b", 1.0, 1.0)]]),
        ((("a", 0.5), ("a", 0.25)), [[("a", 0.75, 0.75)]]),
        (Path("a"), [[("a", 1.0, 1.0)]]),
        ([{"a": 1}, None], [[("a", 1.0, 1.0)], []]),
        ({}, [[]]),
        (joined_mixes([parse_mix("a:0.5"), parse_mix("b")]), [[("a", 0.5, 0.5), ("b", 1.0, 1.0)]]),
    ],
)
def test_values_in_python(value: Any, mixes: Any) -> None:
    assert are_mixes(value)
    assert [asked(mix) for mix in wanted(value, len(mixes))] == mixes


@pytest.mark.parametrize(
    "value",
    [
        5, ["a", 0.5], {"a": "much"}, {"a": True}, {"a": float("nan")}, {"a": 2000}, {"": 1}, {5: 1}, [("a", None)],
        {"a": {"unet": 1}}, {"a": {"unet": 1, "text": 1, "vae": 1}}, {"a": {"unet": 1, "text": 1, "path": 5}}, [{}, 5],
    ],
)  # fmt: skip
def test_values_without_meaning(value: Any) -> None:
    assert not are_mixes(value)


def test_a_mix_for_each_prompt() -> None:
    assert [asked(mix) for mix in wanted({"a": 1}, 2)] == [[("a", 1.0, 1.0)]] * 2
    with pytest.raises(LdmError, match="2 mixes for 3 prompts; give one mix, or one for each prompt"):
        wanted([{"a": 1}, None], 3)


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("a cat <lora:x:0.8>", "a cat ", [("x", 0.8, 0.8)]),
        ("<lora:x>a<lyco:y y:0.5:-1> cat", "a cat", [("x", 1.0, 1.0), ("y y", -1.0, 0.5)]),
        ("a <lora:sub/x.pt:te=0.5:unet=0.2>", "a ", [("sub/x.pt", 0.2, 0.5)]),
        ("a <hypernet:x:1>, a < b, <lora>", "a <hypernet:x:1>, a < b, <lora>", []),
    ],
)
def test_a_prompt_names_adapters(prompt: str, text: str, found: Any) -> None:
    read, entries = read_tags(prompt)
    assert (read, asked(entries)) == (text, found)


@pytest.mark.parametrize("tag", ["<lora:x:much>", "<lora:>", "<lora:x:1:1:4>", "<lora:x:lbw=IN04>", "<lora:x:inf>"])
def test_a_tag_without_meaning(tag: str) -> None:
    with pytest.raises(LdmError, match=r"in a prompt: write <lora:NAME:WEIGHT>") as caught:
        read_tags(f"a cat {tag}")
    assert tag in str(caught.value)


def test_weights_of_the_same_name_add() -> None:
    _, entries = read_tags("<lora:x:0.5> <lora:y> <lora:x:0.25:1>")
    assert asked(summed(entries)) == [("x", 1.5, 0.75), ("y", 1.0, 1.0)]


def test_the_text_of_other_programs() -> None:
    record = {
        "a,b": {"unet": 0.8, "text": 0.8, "autov3": "0123456789ab", "by_name": True},
        "c": {"unet": 1.0, "text": 0.25, "autov3": "cdef01234567", "by_name": True},
        "folder": {"unet": -1.0, "text": -1.0, "autov3": "", "by_name": True},
    }
    tags, hashes = to_tags(record), to_hashes(record)
    assert tags == "<lora:a,b:0.8><lora:c:0.25:1><lora:folder:-1>"
    assert hashes == "ab: 0123456789ab, c: cdef01234567"
    assert from_tags(f"a cat{tags}", hashes) == ("a cat", record, set())
    assert from_tags("a cat", "") == ("a cat", {}, set())
    assert from_tags("a cat<lora:x>", "y: 0123")[2] == {"y"}
