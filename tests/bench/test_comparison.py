"""A measurement of `ldm bench` compared with an earlier one: the verdict, what else differs, and bad files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import run

from ldm.bench import command, measuring
from ldm.bench.comparison import Measurement, changes, other_conditions, ratio, slower
from ldm.bench.measuring import Seconds


def times(factor: float, rounds: int = 5) -> list[Seconds]:
    """Times of some rounds that differ by up to 4 %, all larger by a factor."""
    return [Seconds(*(factor * base * (1 + number / 100) for base in (0.1, 0.2, 0.3, 1.0))) for number in range(rounds)]


def of(versions: dict[str, str] | None = None, **factors: float) -> Measurement:
    """A measurement with such times of the sides that are named."""
    return Measurement({}, "a processor", versions or {"torch": "2"}, {side: times(by) for side, by in factors.items()})


def test_the_ratio_and_its_interval() -> None:
    assert ratio([1.0], [2.0]) == (2.0, 2.0, 2.0)
    middle, low, high = ratio([1.0, 1.0, 2.0], [2.0, 2.0, 2.0])
    assert (middle, low, high) == (2.0, 1.0, 2.0)  # of three rounds: all pairs
    middle, low, high = ratio([1 + n / 10 for n in range(10)], [2 + n / 10 for n in range(10)])
    assert 1.3 < low < 1.5 < middle < 1.8 < high < 2.2


@pytest.mark.parametrize(
    ("before", "now", "stages"),
    [
        (of(ldm=1), of(ldm=1), 0),
        (of(ldm=1), of(ldm=1.07), 0),  # within noise
        (of(ldm=1), of(ldm=0.5), 0),
        (of(ldm=1), of(ldm=1.2), 4),
        (of(ldm=1, diffusers=1), of(ldm=1.2, diffusers=1.2), 0),  # the machine is slower
        (of(ldm=1, diffusers=1), of(ldm=1.2, diffusers=0.9), 4),
        (of(ldm=1, diffusers=1), of({"torch": "3"}, ldm=1.2, diffusers=1.2), 4),  # both may suffer from a package
        (of(ldm=1, openvino=1), of(ldm=1.2, diffusers=1.2), 4),
    ],
)
def test_slower_beyond_noise(before: Measurement, now: Measurement, stages: int) -> None:
    assert len(slower(before, now, changes(before, now))) == stages


def test_what_else_differs() -> None:
    now = replace(of({"torch": "3", "diffusers": "1"}, ldm=1), device="another")
    assert other_conditions(of(ldm=1), now) == [
        "then on a processor, now on another",
        "then with diffusers none, now with 1",
        "then with torch 2, now with 3",
    ]


class Side:
    """A side's process that knows its times without computing."""

    factor = 1.0

    def __init__(self, *given: Any) -> None:
        self.rounds = iter(times(self.factor, 9))

    def wait(self) -> None:
        pass

    def image(self, steps: int) -> tuple[Seconds, float]:
        return next(self.rounds), 1.0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit code, what it says, and measurements that it refuses to compare."""
    tiny.model("sd15").save_pretrained(tmp_path / "model")
    monkeypatch.setitem(measuring.SIZES, "cpu", 64)
    monkeypatch.setattr(command, "others_busy", lambda: 0.0)
    monkeypatch.setattr(command, "products", lambda *_: 1)
    monkeypatch.setattr(command, "SideProcess", Side)
    old = tmp_path / "old.json"
    arguments = ["bench", tmp_path / "model", "--against", "", "--dtype", "fp32"]
    assert run(capsys, monkeypatch, *arguments, "--out", old)[0] == 0
    code, said, _ = run(capsys, monkeypatch, *arguments, "--compare", old)
    assert code == 0 and "not slower than before" in said and "times then" in said
    monkeypatch.setattr(Side, "factor", 2.0)
    code, said, err = run(capsys, monkeypatch, *arguments, "--compare", old)
    assert code == 1 and "2.00" in said
    assert err.startswith("ldm: slower than before: before 2.00 (1.9") and len(err.splitlines()) == 1
    code, _, err = run(capsys, monkeypatch, *arguments, "--compare", old, "--steps", 9)
    assert (code, err) == (1, f"ldm: --compare {old}: measured with steps 4, and this is 9\n")
    old.write_text(re.sub(r"\b1 thread\b|\b\d+ threads\b", "96 threads", old.read_text()))
    code, said, _ = run(capsys, monkeypatch, *arguments, "--compare", old)
    assert code == 0 and "then on" in said and "this is no test of the program" in said


GOOD = {
    "options": {"source": "emoji", "steps": 4, "batch": 1, "compile": False, "quantize": None}, "device": "a",
    "dtype": "fp32", "size": [64, 64], "versions": {}, "seconds": {"ldm": [asdict(times(1)[0])]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ({}, "no measurement of `ldm bench --out`: it has no options"),
        (GOOD | {"versions": 3}, "it has no versions"),
        (GOOD | {"options": {}}, "its options have no source"),
        (GOOD | {"seconds": {"diffusers": []}}, "it has no times of ldm"),
        (GOOD | {"seconds": {"ldm": [{"step": 1.0}]}}, "the times of ldm are none"),
        (GOOD | {"seconds": {"ldm": [dict.fromkeys(measuring.STAGES, "1")]}}, "the times of ldm are none"),
        (GOOD | {"seconds": {"ldm": [dict.fromkeys(measuring.STAGES, 0.0)]}}, "the times of ldm are none"),
    ],
)
def test_bad_files(
    content: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is measured, in one line that names the file."""
    monkeypatch.setattr(command, "SideProcess", None)
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    code, _, err = run(capsys, monkeypatch, "bench", "--compare", path)
    assert code == 1
    assert str(path) in err and message in err
    assert len(err.strip().splitlines()) == 1
