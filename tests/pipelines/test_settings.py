"""The table of settings: every row comes in by every door or says why not, and one row is all that a setting needs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
from commands import run
from PIL import Image
from typer.testing import CliRunner

import pipelines.settings as settings
from ldm.cli import evaluate
from ldm.cli.main import app, generate_command
from ldm.errors import LdmError
from ldm.evaluation.plan import EvaluationPlan
from ldm.images import read_settings
from ldm.models import prompts
from ldm.models.tokenizer import Tokenizer
from ldm.patches.token_merging import MOST
from ldm.runtime.offload import OFFLOAD
from ldm.runtime.quantization import QUANTIZED
from ldm.sampling.noise import LARGEST_SEED
from ldm.sampling.schedulers import MOST_STEPS
from pipelines import Pipeline
from pipelines.request import records
from pipelines.settings import DOORS, LOADING, SETTINGS, Setting, at, find, number
from pipelines.tuning import DTYPES

EXAMPLES: dict[str, tuple[str, Any]] = {  # of values that are not the default: as a text, and as the pipeline takes it
    "negative": ("bad", "bad"), "n": ("2", 2), "batch": ("2", 2), "steps": ("3", 3), "scheduler": ("ddim", "ddim"),
    "spacing": ("9,3,1", (9.0, 3.0, 1.0)), "guidance": ("4.5", 4.5), "rescale": ("0.5", 0.5),
    "interval": ("0.1,0.8", (0.1, 0.8)), "threshold": ("0.9", 0.9), "perturbed": ("2", 2.0),
    "image_guidance": ("2", 2.0), "seed": ("7", 7), "width": ("72", 72), "height": ("72", 72), "clip_skip": ("1", 1),
    "weights": ("false", False), "chunks": ("false", False), "eta": ("0.5", 0.5), "rng": ("diffusers", "diffusers"),
    "reuse": ("2", 2), "merge": ("0.5", 0.5), "hires": ("1.5", 1.5), "hires_strength": ("0.5", 0.5),
    "hires_latents": ("true", True), "refiner_strength": ("0.5", 0.5), "original_size": ("96,72", (96, 72)),
    "crop": ("8,16", (8, 16)), "target_size": ("96,72", (96, 72)), "negative_original_size": ("96,72", (96, 72)),
    "negative_crop": ("8,16", (8, 16)), "negative_target_size": ("96,72", (96, 72)), "aesthetic_score": ("7", 7.0),
    "negative_aesthetic_score": ("1", 1.0), "strength": ("0.7", 0.7), "prompt_2": ("oil", "oil"),
    "negative_2": ("dull", "dull"), "refiner_at": ("0.5", 0.5), "size": ("72x64", (72, 64)),
    "prompt": ("a cat", "a cat"), "image": ("in.png", "in.png"), "mask": ("mask.png", "mask.png"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny.model("sdxl"))


@pytest.fixture
def sparkle(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A setting that is made up, and declared in the table alone."""
    row = Setting("sparkle", number(0, 1), "Glitter on every image.", 0.0, names=("glitter",))
    monkeypatch.setattr(settings, "SETTINGS", (*SETTINGS, row))
    return row


def test_one_row_adds_a_setting_everywhere(
    sparkle: Setting, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = typer.Typer(rich_markup_mode=None)
    command.command()(generate_command())
    shown = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200"}).output
    assert "--sparkle NUMBER" in shown and "Glitter on every image." in shown
    Path("p.jsonl").write_text('{"prompt": "a cat", "sparkle": 0.25}\n{"prompt": "a dog"}\n')
    options = ["--model", str(models / "sd15"), "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--json"]
    done = CliRunner().invoke(command, [*options, "--prompts", "p.jsonl", "--sparkle", "0.5"], catch_exceptions=False)
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["sparkle"] for record in made] == [0.25, 0.5]
    record, _ = read_settings(Path(made[0]["path"]))
    assert record is not None and record["sparkle"] == 0.25
    assert run(capsys, monkeypatch, "repro", made[0]["path"], "--device", "cpu")[1].startswith("identical")
    made_by = Pipeline(models / "sd15", device="cpu")("a cat", sparkle=0.75, steps=1, seed=0)
    assert made_by.settings[0]["sparkle"] == 0.75
    assert evaluate._sweep("sparkle=0.1,0.2") == ("sparkle", (0.1, 0.2))
    plan = EvaluationPlan(metrics=())
    evaluate._model(str(models / "sd15"), dict([evaluate._setting("sparkle=0.5")]), "cpu", plan)
    with pytest.raises(LdmError, match="sparkle 5: a number from 0 to 1 is needed"):
        evaluate._model(str(models / "sd15"), dict([evaluate._setting("sparkle=5")]), "cpu", plan)
    with pytest.raises(LdmError, match="setting glitter is not known; did you mean sparkle?"):
        find("glitter", "python")


def test_names_are_given_once_and_doors_exist() -> None:
    names = [name for row in (*SETTINGS, *LOADING) for name in (row.name, *row.names)]
    assert len(set(names)) == len(names)
    for row in (*SETTINGS, *LOADING):
        assert row.closed.keys() <= DOORS.keys() and all(row.closed.values()) and row.help.endswith(".")
        assert "python" not in row.closed


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_a_setting_comes_in_by_every_door_or_says_why_not(row: Setting, pipeline: Pipeline, tmp_path: Path) -> None:
    text, value = EXAMPLES[row.name]
    assert row.parse(text) == row.check(value) == value
    if row.name in ("image", "mask"):
        value = str(tmp_path / "in.png")
        Image.new("RGB", (64, 64), "white").save(value)
    given = {"prompt": "a cat", "seed": 1, "steps": 3, row.name: value}
    if row.name in ("strength", "mask"):
        given["image"] = Image.new("RGB", (64, 64))
    if row.name.startswith("hires_"):
        given["hires"] = 2
    refined = Pipeline(pipeline.model, refiner=tiny.model("sdxl-refiner")) if "refiner" in row.name else pipeline
    steps = {"steps": 10} if "refiner" in row.name else {}
    request = refined.request(**{"scheduler": "ddim", **given, **steps})
    if "record" not in row.closed and row.kind is not settings.IMAGE:  # files are recorded by who has them
        (record,) = records(request.part(slice(1)), pipeline.model.family)
        assert settings.expanded(record)[row.name] == value
    for door in ("list", "eval"):
        if door in row.closed:
            with pytest.raises(LdmError, match=row.closed[door].split(";")[0]):
                find(row.name, door)
        else:
            settings.checked({row.name: value}, door)
    if row.name != "prompt":  # its argument
        assert row.name in inspect.signature(generate_command()).parameters


@pytest.mark.parametrize("row", LOADING, ids=lambda row: row.name)
def test_how_a_model_is_loaded_is_in_the_table(row: Setting) -> None:
    known = inspect.signature(Pipeline.__init__).parameters.keys() | {"family", "variant", "components", "allow_pickle"}
    assert row.name in known
    assert ("shell" in row.closed) != (row.name in inspect.signature(generate_command()).parameters)


def test_every_keyword_of_a_pipeline_is_a_row() -> None:
    keywords = inspect.signature(Pipeline.__init__).parameters.keys() - {"self", "options"}
    assert keywords <= {row.name for row in LOADING}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "0", "0: a whole number from 1 to 1000 is needed"),
        ("steps", "many", "'many': a whole number from 1 to 1000 is needed"),
        ("merge", "0.9", "0.9: a number from 0 to 0.75 is needed"),
        ("interval", "1,0", "(1.0, 0.0): two rising numbers"),
        ("rng", "dice", "'dice': ldm or diffusers is needed"),
        ("size", "big", "'big': WIDTHxHEIGHT"),
    ],
)
def test_bounds_are_said_in_one_line_everywhere(
    name: str, text: str, message: str, pipeline: Pipeline, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    row = find(name, "python")
    value = text if row.kind.structured or not text[0].isdigit() else json.loads(text)
    with pytest.raises(LdmError) as caught:
        pipeline.request("a cat", **{name: value})
    assert str(caught.value).startswith(f"{name} {message}")
    code, out, err = run(capsys, monkeypatch, "generate", "a cat", row.option, text)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(f"ldm: {row.option} {message}")
    Path("p.jsonl").write_text(json.dumps({"prompt": "a cat", name: value}))
    err = run(capsys, monkeypatch, "generate", "--prompts", "p.jsonl")[2]
    assert err.startswith(f"ldm: p.jsonl, line 1: {name} {message}")
    with pytest.raises(LdmError) as caught:
        settings.checked(dict([evaluate._setting(f"{name}={text}")]), "eval")
    assert str(caught.value).startswith(f"{name} {message}")


def test_bounds_are_those_of_what_computes() -> None:
    assert settings.MOST_STEPS == MOST_STEPS
    assert settings.LARGEST_SEED == LARGEST_SEED
    assert at("python")["merge"].kind.allowed(MOST) and not at("python")["merge"].kind.allowed(MOST + 0.01)
    loading = at("python", LOADING)
    for name, values in (("dtype", DTYPES), ("quantize", QUANTIZED), ("offload", OFFLOAD)):
        assert all(loading[name].kind.allowed(value) for value in values)


def test_a_prompt_is_parsed_and_tokenised_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command to the U-Net; tokenised once by each of SDXL's two tokenizers."""
    monkeypatch.chdir(tmp_path)
    parsed: list[str] = []
    tokenised: list[str] = []
    parse, encode = prompts.parse_weights, Tokenizer.encode
    monkeypatch.setattr(prompts, "parse_weights", lambda prompt: parsed.append(prompt) or parse(prompt))
    monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: tokenised.extend(texts) or encode(self, texts))
    options = ["--model", models / "sdxl", "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--seed", "1"]
    assert run(capsys, monkeypatch, "generate", "a cat", "a dog", "--negative", "bad", "-n", "2", *options)[0] == 0
    assert sorted(parsed) == ["a cat", "a dog", "bad"]
    words = [text for text in tokenised if text in parsed]  # tokenizers are tried with another text as they are read
    assert sorted(words) == ["a cat", "a cat", "a dog", "a dog", "bad", "bad"]


def test_help_names_the_methods() -> None:
    shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "300"}).output
    for method in ("DeepCache", "Token merging (ToMe)", "(PAG)", "Dynamic thresholding", "Lin et al."):
        assert method in shown
