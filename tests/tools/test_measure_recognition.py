"""The questions of tools/measure_recognition.py, and their score."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ldm.errors import LdmError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("measure_recognition", TOOLS / "measure_recognition.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Shards of 12 concepts in each of two groups, drawn in one style, and the package with the groups."""
    rows = [
        {"label": f"{thing} {number}", "group": group}
        for group, thing in enumerate(("face", "tree"))
        for number in range(12)
    ]
    folder = tmp_path / "data"
    (folder / "packages/emojibase-data@17.0.0/en").mkdir(parents=True)
    (folder / "packages/emojibase-data@17.0.0/en/data.json").write_text(json.dumps([*rows, {"label": "a tone"}]))
    png = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(png, "PNG")
    for part, some in (("train", rows[::2]), ("held-out", rows[1::2])):
        with tarfile.open(folder / f"{part}-0000.tar", "w") as tar:
            for row in some:
                facts = json.dumps({"label": row["label"], "style": "noto"}).encode()
                for suffix, content in (("png", png.getvalue()), ("json", facts)):
                    member = tarfile.TarInfo(f"{row['label']}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def test_questions_are_asked_and_scored(
    tool: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = tool.groups(data / "packages")
    asked = tool.questions(data, group, 5)
    assert asked == tool.questions(data, group, 5)
    assert sorted(one["kind"] for one in asked) == ["held out"] * 5 + ["seen"] * 5
    for one in asked:
        assert one["label"] in one["options"] and len(set(one["options"])) == 10
        assert len({label.split()[0] for label in one["options"]}) == 1  # of one group
    seen: list[tuple[str, int]] = []

    def pipeline(prompts: list[str], seed: list[int], **options: Any) -> Any:
        seen.extend(zip(prompts, seed, strict=True))
        return SimpleNamespace(images=[Image.new("RGB", (96, 96), "white")] * len(prompts))

    tool.ask(pipeline, asked, tmp_path / "out", {})
    assert seen == [(f"{one['label']}, noto style", number) for number, one in enumerate(asked)]
    assert Image.open(tmp_path / "out/sheet-00.png").size == (1000, 10 * tool.ROW)
    letters = [tool.LETTERS[one["options"].index(one["label"])] for one in asked]
    first = next(number for number, one in enumerate(asked) if one["kind"] == "seen")
    letters[first] = "b" if letters[first] == "a" else "a"
    (tmp_path / "answers.txt").write_text("".join(f"{number} {letter}\n" for number, letter in enumerate(letters)))
    capsys.readouterr()
    tool.score(tmp_path / "out", [tmp_path / "answers.txt"], None)
    assert re.search(r"answers.txt .*80 \[38, 96\].*100 \[57, 100\]", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "message"),
    [("0 a\n1 k", "'1 k' is not NUMBER LETTER"), ("0 a\n", "question 1 has no answer"), (None, "cannot be read")],
)
def test_answers_that_cannot_be_used(tool: Any, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "answers.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LdmError, match=message):
        tool.read_answers(path, 2)


def test_without_the_package_there_are_no_groups(tool: Any, tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="holds no package emojibase-data"):
        tool.groups(tmp_path)
