"""Prompt syntax of the web interfaces that means nothing here: named in one warning."""

from __future__ import annotations

import time

import pytest
import tiny

from pipelines import Pipeline
from pipelines.syntax import foreign


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a [cat:dog:0.5] b", ["[cat:dog:0.5]"]),
        ("[red:0.3], [blue::10], [a|b]", ["[red:0.3]", "[blue::10]", "[a|b]"]),
        ("[(cat:1.2):dog:.5]", ["[(cat:1.2):dog:.5]"]),
        ("a AND b:0.5 AND c", ["AND"]),
        ("<lora:x:0.8> a, <lyco:y>", ["<lora:x:0.8>", "<lyco:y>"]),
        ("(embedding:bad_1:1.2), embedding: x", ["embedding:bad_1"]),
        ("a (cat:1.2), [dog], [(red:1.3)], a BREAK b", []),
        (r"\[a|b\], BRAND, time 10:30, a < b > c, [ratio: three]", []),
    ],
)
def test_syntax_is_found(prompt: str, found: list[str]) -> None:
    assert foreign([prompt]) == found


def test_long_prompts_are_searched_at_once() -> None:
    start = time.process_time()
    for piece in ("[", "[:", "[|", "<a:", "[a:1", "[:" + "1" * 50_000 + "x", "<" + "a" * 50_000, " ", "[: "):
        foreign([piece * (100_000 // len(piece)), "[" + piece.strip("[") * (90_000 // len(piece)) + "x]"])
    assert time.process_time() - start < 60  # CPU time; it would be minutes


def test_one_warning_names_it(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(tiny.model("sd15"))
    settings = {"steps": 1, "seed": 1, "output": "latents", "negative": "<lora:x:0.8>"}
    pipeline(["a [cat:dog:0.5] b", "[cat:dog:0.5] AND b"], **settings)
    (record,) = caplog.records
    assert record.getMessage() == (
        "prompt syntax of other programs, which is read as plain words here: [cat:dog:0.5], AND, <lora:x:0.8>"
    )
    caplog.clear()
    pipeline("a [cat:dog:0.5] b", weights=False, **settings)  # asked to be words
    pipeline("a (cat:1.2) [dog]", **settings | {"negative": "bad"})
    assert not caplog.records
