"""`tools/prepare_emoji.py` on packages with three emoji: which drawings it takes, and what it says of them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "prepare_emoji.py"
PACKAGES = (
    "iconify-json-fluent-emoji@1.2.7", "iconify-json-fluent-emoji-flat@1.2.6", "iconify-json-noto@1.2.9",
    "iconify-json-noto-v1@1.2.5", "iconify-json-twemoji@1.2.5", "iconify-json-emojione@1.2.3",
    "iconify-json-fxemoji@1.2.2", "iconify-json-streamline-emojis@1.2.4",
    "iconify-json-fluent-emoji-high-contrast@1.2.6",
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Unpacked packages: a fox, a hand with one skin tone, and a trademark that Microsoft has not released."""
    folder = tmp_path / "packages"
    rows = [
        {"hexcode": "1F98A", "label": "fox", "tags": ["animal", "fox face"], "group": 3},
        {"hexcode": "1F44B", "label": "waving hand", "tags": ["bye"], "group": 1,
         "skins": [{"hexcode": "1F44B-1F3FD", "label": "waving hand: medium skin tone", "tone": 3}]},
        {"hexcode": "1F4CE", "label": "paperclip", "tags": [], "group": 7},
        {"hexcode": "1F1EB-1F1F7", "label": "flag: France", "tags": [], "group": 9},
    ]  # fmt: skip
    english = folder / "emojibase-data@17.0.0" / "en"
    (english / "shortcodes").mkdir(parents=True)
    (english / "data.json").write_text(json.dumps(rows))
    shortcodes = {"1F98A": ["fox", "fox_face"], "1F44B": "wave", "1F4CE": "paperclip"}
    (english / "shortcodes" / "emojibase.json").write_text(json.dumps(shortcodes))
    assets = folder / "lobehub-fluent-emoji-3d@1.1.0" / "assets"
    assets.mkdir(parents=True)
    for code in ("1f98a", "1f44b", "1f44b-1f3fd", "1f4ce", "1f1eb-1f1f7"):
        Image.new("RGBA", (64, 32), (255, 0, 0, 255)).save(assets / f"{code}.webp", lossless=True)
    for package in PACKAGES:
        (folder / package).mkdir()
        names = ("fox", "waving-hand", "waving-hand-medium-skin-tone") * ("flat" in package)
        icons = {"icons": {name: {"body": "<path/>"} for name in names}}
        (folder / package / "icons.json").write_text(json.dumps(icons))
    return folder


def prepare(out: Path, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(out), "--cache", str(cache), "--size", "32", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOOL.parent.parent)


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as file:
            found |= {member.name: file.extractfile(member).read() for member in file}
    return found


def test_styles_and_skin_tones_are_chosen(cache: Path, tmp_path: Path) -> None:
    result = prepare(tmp_path / "all", cache, "--styles", "fluent 3d")
    assert result.returncode == 0, result.stderr
    found = members(tmp_path / "all")
    keys = {name.removesuffix("_fluent-3d.png") for name in found if name.endswith(".png")}
    assert keys == {"1f98a", "1f44b", "1f44b-1f3fd"}  # neither the flag nor what no open set has
    assert json.loads(found["1f98a_fluent-3d.json"])["caption"] == [
        "fox, fluent 3d style", "fluent 3d emoji of fox", "fox, animal, fox face, fluent 3d style",
        "animal, fox face, fluent 3d style", "fluent 3d fox", "a fox, fluent 3d style", "fox face, fluent 3d style",
        "fox", "a fox", "fox face",
    ]  # fmt: skip
    image = Image.open(io.BytesIO(found["1f98a_fluent-3d.png"]))
    assert image.size == (32, 32)
    assert image.getpixel((16, 16)) == (255, 0, 0)
    assert image.getpixel((16, 5)) == (255, 255, 255)  # twice as wide as high, on white
    notice = (tmp_path / "all" / "NOTICE.md").read_text()
    assert "| fluent 3d | Microsoft | MIT |" in notice
    assert "Twitter" not in notice

    result = prepare(tmp_path / "plain", cache, "--styles", "fluent 3d", "--no-tones")
    assert result.returncode == 0, result.stderr
    assert set(members(tmp_path / "plain")) == {name for name in found if "1f3fd" not in name}


def test_drawings_of_two_kinds_do_not_get_into_one_folder(cache: Path, tmp_path: Path) -> None:
    assert prepare(tmp_path / "out", cache, "--styles", "fluent 3d", "--no-tones").returncode == 0
    before = members(tmp_path / "out")
    assert prepare(tmp_path / "out", cache, "--styles", "fluent 3d", "--no-tones").returncode == 0
    result = prepare(tmp_path / "out", cache, "--styles", "fluent 3d")
    assert result.returncode == 1
    assert "holds other drawings" in result.stderr
    assert result.stderr.count("\n") == 1
    assert members(tmp_path / "out") == before
    result = prepare(tmp_path / "new", cache, "--styles", "fluent 3d,notto")
    assert result.stderr == "prepare_emoji: style 'notto' is not known; did you mean noto?\n"


def test_a_few_drawings_as_plain_folders(cache: Path, tmp_path: Path) -> None:
    options = (
        "--styles",
        "fluent 3d",
        "--no-tones",
        "--few",
        "1",
        "--labels",
        "fox|waving hand",
        "--caption",
        "a {label}",
    )
    result = prepare(tmp_path / "few", cache, *options)
    assert result.returncode == 0, result.stderr
    folders = [tmp_path / "few" / name for name in ("train", "held-out")]
    captions = [[path.read_text() for path in folder.glob("*.txt")] for folder in folders]
    assert sorted(map(len, captions)) == [1, 1]
    assert {*captions[0], *captions[1]} == {"a fox", "a waving hand"}
    assert all(Image.open(path.with_suffix(".png")).size == (32, 32) for f in folders for path in f.glob("*.txt"))
    result = prepare(tmp_path / "few", cache, *options[:-1], "the {label}")
    assert "holds other drawings" in result.stderr
