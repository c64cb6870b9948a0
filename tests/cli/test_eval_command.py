"""`ldm eval` on a family trained for seconds: the whole report, the same twice, on two processes, and after a kill."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from commands import run
from launched import Program, on_two
from PIL import Image, ImageDraw

from ldm.training.config import load
from ldm.training.run import train

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small images with captions."""
    folder, draw = tmp_path_factory.mktemp("shapes"), random.Random(0)
    for number in range(60):
        colour, shape = draw.choice(list(COLOURS)), draw.choice(["circle", "square"])
        image = Image.new("RGB", (32, 32), "white")
        left, top = draw.randint(2, 14), draw.randint(2, 14)
        kind = ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle
        kind((left, top, left + 14, top + 14), fill=COLOURS[colour])
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {colour} {shape} at {left} {top}")
    return folder


@pytest.fixture(scope="module")
def family(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run's folder: autoencoder, text pair and base."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = ["autoencoder.steps=10", "text.steps=10", "base.steps=5", "base.preview_every=1000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        config = load(CONFIG, [f"data.source={shapes}", f"output={folder}", "stages=[autoencoder,text,base]", *steps])
        train(config, None, lambda *_: None)
    yield folder
    torch.set_num_threads(threads)
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="module")
def command(family: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of the run, compared by its own pair."""
    pair = f"clip:{family / 'text'}"
    return [
        "eval", str(family / "base" / "model"), str(family / "text" / "model"), "--data", str(shapes), "-n", "44",
        "--metrics", "fid,kid,precision,coverage,cmmd,clip-score,r-precision,memorisation,rfid,psnr,ssim",
        "--features", pair, "--clip", pair, "--copies", pair, "--training", str(shapes), "--with", "steps=1",
        "--sweep", "guidance=1,3", "--sweep", "scheduler=ddim,lms", "--device", "cpu", "--with", "dtype=fp32",
        "--cache", str(tmp_path_factory.mktemp("cache")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("evaluation") / "whole"
    program = Program("-m", "ldm", *command, "--out", folder, COLUMNS="100")
    out, err = program.communicate()
    assert program.returncode == 0, err
    return folder, out


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "report.json").read_bytes(), (folder / "report.html").read_bytes()


def test_the_report_is_whole(whole: tuple[Path, str], command: list[str]) -> None:
    folder, out = whole
    report = json.loads((folder / "report.json").read_text())
    metrics = [row["metric"] for table in report["tables"] for row in table["rows"]]
    assert sorted(metrics) == sorted(command[command.index("--metrics") + 1].split(","))
    assert {row["metric"] for row in report["sweeps"][0]["rows"][0]} == set(metrics) - {"rfid", "psnr", "ssim"}
    assert [sweep["values"] for sweep in report["sweeps"]] == [[1, 3], ["ddim", "lms"]]
    assert "<h2>Along scheduler</h2>" in (folder / "report.html").read_text()
    assert [gallery["title"] for gallery in report["galleries"]][:3] == [
        "Samples", "Best by CLIP score", "Worst by CLIP score",
    ]  # fmt: skip
    assert all(table["extractor"] is None or len(table["extractor"]["digest"]) == 64 for table in report["tables"])
    assert report["sides"][0]["settings"]["steps"] == 1
    assert "NaN" not in (folder / "report.json").read_text()
    assert out.rstrip().endswith("report.html")
    assert "FD" in out


def test_it_is_the_same_again(whole: tuple[Path, str], command: list[str], capsys: Any, monkeypatch: Any) -> None:
    folder, out = whole
    before = files(folder)
    monkeypatch.setenv("COLUMNS", "100")
    assert run(capsys, monkeypatch, *command, "--out", folder) == (0, out, "")
    assert files(folder) == before


def test_two_processes_find_the_same(whole: tuple[Path, str], command: list[str], tmp_path: Path) -> None:
    done = on_two("-m", "ldm", *command, "--out", tmp_path / "two", "--cache", tmp_path / "cache")
    assert done.stdout.count("report.html") == 1
    assert files(tmp_path / "two") == files(whole[0])


def test_killed_and_continued_is_the_same(
    whole: tuple[Path, str], command: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    folder = tmp_path / "killed"
    arguments = [*command, "--out", str(folder), "--cache", str(tmp_path / "cache")]
    process = Program("-m", "ldm", *arguments)
    while len(list((folder / "images").rglob("*.png"))) < 50 and process.poll() is None:
        time.sleep(0.01)  # all of A, which have been looked at, and some of B
    process.kill()
    process.communicate()
    assert list((folder / "found").rglob("*.safetensors"))
    assert not (folder / "report.json").exists()
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    assert files(folder) == files(whole[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist; name a model"),
        (["MODEL", "--metrics", "fid"], "compares with other images: name them (data=, --data)"),
        (["MODEL", "--metrics", "clip-score"], "clip-score needs a network for images and texts"),
        (["MODEL", "--data", "SHAPES", "--metrics", "fdi"], "did you mean fid?"),
        (["MODEL", "--data", "SHAPES", "--with", "steps"], "--with 'steps': write KEY=VALUE"),
        (
            ["MODEL", "--data", "SHAPES", "--with", "stesp=3", "--metrics", "psnr"],
            "did you mean steps (num_inference_steps)?",
        ),
        (
            ["MODEL", "--data", "SHAPES", "--with-b", "seed=3", "--metrics", "psnr"],
            "--with seed is not taken here",
        ),
        (["MODEL", "--data", "SHAPES", "--with-b", "steps=3", "--metrics", "psnr"], "only one is given"),
        (
            ["MODEL", "--data", "SHAPES", "--sweep", "prompt=1,2", "--metrics", "psnr"],
            "prompt is not taken here",
        ),
        (["SHAPES", "--data", "SHAPES", "--with", "steps=3", "--metrics", "fid"], "leave out --with steps"),
        (["MODEL", "--data", "SHAPES", "--with", "steps=0", "--metrics", "psnr"], "steps 0: a whole"),
        (
            ["MODEL", "--data", "SHAPES", "--with", "refiner=5", "--metrics", "psnr"],
            "refiner 5: the name of a model",
        ),
        (
            ["MODEL", "--data", "SHAPES", "--with", "allow_pickle=maybe", "--metrics", "psnr"],
            "allow_pickle 'maybe': true or false is needed",
        ),
        (["MODEL", "--data", "SHAPES", "--sweep", "guidance=1,x"], "--sweep 'guidance=1,x'"),
        (
            ["MODEL", "--data", "SHAPES", "--sweep", "size=64,128", "--metrics", "psnr"],
            "--sweep size: all images",
        ),
        (["MODEL", "--data", "SHAPES", "--sweep", "scheduler=euler,euler", "--metrics", "psnr"], "each value once"),
        (["MODEL", "--data", "SHAPES", "--sweep", "scheduler=euler,oiler", "--metrics", "psnr"], "'oiler'"),
        (["MODEL", "--data", "SHAPES", "--sweep", "steps=1", "--sweep", "steps=2"], "each setting once"),
        (["MODEL", "--data", "SHAPES", "--sweep", "guidance=-5", "--metrics", "psnr"], "guidance"),
        (["MODEL", "--data", "SHAPES", "--metrics", "fid", "--features", "inception:missing.pt"], "missing.pt"),
        (["MODEL", "--data", "SHAPES", "--metrics", "fid", "--features", "nonsense"], "nonsense"),
        (["MODEL", "--data", "SHAPES", "-n", "1"], "n is 1"),
        (["MODEL", "MODEL", "MODEL", "--data", "SHAPES"], "3 models or folders"),
        (["MODEL", "--data", "SHAPES", "--metrics", "psnr", "--out", "file.txt/x"], "cannot be made"),
        (["MODEL", "--prompts", "missing.txt", "--clip", "clip:PAIR"], "missing.txt cannot be read"),
    ],
)
def test_wrong_input_gets_one_line(
    arguments: list[str], message: str, family: Path, shapes: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    known = {"MODEL": str(family / "base" / "model"), "SHAPES": str(shapes), "clip:PAIR": f"clip:{family / 'text'}"}
    code, out, err = run(capsys, monkeypatch, "eval", *[known.get(word, word) for word in arguments], "--device", "cpu")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1, err
    assert message in err
