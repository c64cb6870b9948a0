"""Forced choice: which of ten things does an image show? Answered by people, and by a contrastive pair.

    python tools/measure_recognition.py ask emoji --data emoji --out questions [-n 100] [--steps 20] [--guidance 3]
    python tools/measure_recognition.py score questions [answers.txt …] [--clip clip:emoji]

`ask` makes an image for each of n training captions and n held-out (concept, style) combinations, which a fixed seed
chooses, and writes sheets of ten questions: the image, and ten labels of the same style and group of emoji (food,
animals …), of which one was the prompt's. Answers are lines `NUMBER LETTER`. `score` prints the share that is right,
with Wilson's interval at 95 %. With two models, the questions are the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure_styles import Drawing, caption, drawings, features_of, images_of, percent
from PIL import Image, ImageDraw, ImageFont
from prepare_emoji import LABELS
from rich.console import Console
from rich.table import Table

from ldm.errors import LdmError
from ldm.evaluation.networks.extractors import TextExtractor, open_text_extractor
from ldm.files import read_json, write_json
from pipelines import Pipeline

OPTIONS, PER_SHEET = 10, 10
LETTERS = "abcdefghij"
KEY = "key.json"
SIDE, ROW = 192, 208  # pixels of a shown image, and of a question


def main() -> None:
    """Ask, or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    asking = tasks.add_parser("ask")
    asking.add_argument("model")
    asking.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py wrote")
    asking.add_argument("--cache", type=Path, help="folder of the packages; default: DATA/packages")
    asking.add_argument("--out", type=Path, required=True)
    asking.add_argument("-n", type=int, default=100, help="questions of each kind")
    asking.add_argument("--steps", type=int)
    asking.add_argument("--guidance", type=float)
    scoring = tasks.add_parser("score")
    scoring.add_argument("questions", type=Path)
    scoring.add_argument("answers", type=Path, nargs="*")
    scoring.add_argument("--clip")
    options = parser.parse_args()
    try:
        if options.task == "score":
            score(options.questions, options.answers, options.clip and open_text_extractor(options.clip))
            return
        settings = {name: value for name in ("steps", "guidance") if (value := getattr(options, name)) is not None}
        asked = questions(options.data, groups(options.cache or options.data / "packages"), options.n)
        ask(Pipeline(options.model), asked, options.out, settings)
    except LdmError as error:
        raise SystemExit(f"measure_recognition: {error}") from None


def groups(cache: Path) -> dict[str, int]:
    """The group of each label.

    Raises:
        LdmError: emojibase's package is not there.
    """
    path = cache / LABELS[0] / "en" / "data.json"
    if not path.exists():
        raise LdmError(f"{cache} holds no package {LABELS[0]}; tools/prepare_emoji.py fetches it")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {row["label"]: row["group"] for row in rows if "group" in row}


def questions(data: Path, group: Mapping[str, int], count: int) -> list[dict[str, Any]]:
    """Questions of both kinds in random order: kind, style, label and ten options."""
    parts = {"seen": drawings(data, "train"), "held out": drawings(data, "held-out")}
    labels = defaultdict(set)
    for drawing in parts["seen"] + parts["held out"]:
        labels[drawing.style, group.get(drawing.label)].add(drawing.label)
    chance, found = random.Random(0), []
    for kind, some in parts.items():
        fit = [one for one in some if len(_others(one, labels, group)) >= OPTIONS - 1]
        for one in chance.sample(sorted(fit, key=lambda one: (one.label, one.style)), min(count, len(fit))):
            shown = [one.label, *chance.sample(_others(one, labels, group), OPTIONS - 1)]
            chance.shuffle(shown)
            found.append({"kind": kind, "style": one.style, "label": one.label, "options": shown})
    chance.shuffle(found)
    return found


def _others(one: Drawing, labels: Mapping[tuple[str, int | None], set[str]], group: Mapping[str, int]) -> list[str]:
    return sorted(labels[one.style, group.get(one.label)] - {one.label})


def ask(pipeline: Pipeline, asked: Sequence[Mapping[str, Any]], out: Path, settings: Mapping[str, Any]) -> None:
    """Make the images, seed i for question i, and write them, the sheets and the key."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    made = images_of(pipeline, [caption(one["label"], one["style"]) for one in asked], settings, "images")
    for number, image in enumerate(made):
        image.save(_image(out, number))
    for start in range(0, len(asked), PER_SHEET):
        rows = list(zip(asked, made, strict=True))[start : start + PER_SHEET]
        _sheet(rows, start).save(out / f"sheet-{start // PER_SHEET:02d}.png")
    write_json(out / KEY, {"questions": list(asked)})
    print(f"{len(asked)} questions: {out}/sheet-*.png")


def _image(out: Path, number: int) -> Path:
    return out / "images" / f"{number:04d}.png"


def _sheet(rows: Sequence[tuple[Mapping[str, Any], Image.Image]], first: int) -> Image.Image:
    """Questions below each other, and in each the image, its number, and the options in two columns."""
    sheet = Image.new("RGB", (1000, ROW * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for row, (question, image) in enumerate(rows):
        top = row * ROW
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (50, top + 8))
        draw.text((5, top + 90), str(first + row), "black", font)
        for place, (letter, label) in enumerate(zip(LETTERS, question["options"], strict=True)):
            column, line = divmod(place, OPTIONS // 2)
            draw.text((270 + 370 * column, top + 20 + 34 * line), f"{letter})  {label}", "black", font)
    return sheet


def score(folder: Path, answers: Sequence[Path], judge: TextExtractor | None) -> None:
    """Print the shares of right answers of each file and of the pair.

    Raises:
        LdmError: an answer cannot be read, or a question has none.
    """
    asked = read_json(folder / KEY)["questions"]
    table = Table("answers by", *(kinds := ("seen", "held out")))
    given = {path.name: read_answers(path, len(asked)) for path in answers}
    if judge:
        given["the pair"] = _by_pair(folder, asked, judge)
    for name, letters in given.items():
        right = [
            one["options"][LETTERS.index(letter)] == one["label"] for one, letter in zip(asked, letters, strict=True)
        ]
        table.add_row(
            name,
            *(percent([hit for one, hit in zip(asked, right, strict=True) if one["kind"] == kind]) for kind in kinds),
        )
    Console().print(table)


def read_answers(path: Path, count: int) -> list[str]:
    """The letter for each question.

    Raises:
        LdmError: a line cannot be read, or a question has no answer.
    """
    found: dict[int, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    for line in filter(str.strip, lines):
        number, _, letter = line.strip().lower().replace(":", " ").partition(" ")
        if not number.isdigit() or letter.strip() not in set(LETTERS):
            raise LdmError(f"{path}: {line!r} is not NUMBER LETTER, such as 12 c")
        found[int(number)] = letter.strip()
    if missing := set(range(count)) - found.keys():
        raise LdmError(f"{path}: question {min(missing)} has no answer")
    return [found[number] for number in range(count)]


def _by_pair(folder: Path, asked: Sequence[Mapping[str, Any]], judge: TextExtractor) -> list[str]:
    """The option whose caption is nearest to the image, of each question."""
    features = features_of(judge, [Image.open(_image(folder, number)) for number in range(len(asked))])
    letters = []
    for one, feature in zip(asked, features, strict=True):
        texts = judge.texts([caption(label, one["style"]) for label in one["options"]])
        letters.append(LETTERS[int((texts @ feature).argmax())])
    return letters


if __name__ == "__main__":
    main()
