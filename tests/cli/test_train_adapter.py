"""`ldm train-adapter`: an adapter from a folder of images, with settings chosen for it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import on_two
from PIL import Image
from runs import _fresh_accelerator as _fresh_accelerator

from ldm.cli import train_adapter as door
from ldm.cli.train_adapter import AdapterJob, choice, defaults, fitting, saving, tokens, train_adapter
from ldm.errors import LdmError
from ldm.families import SD15
from ldm.sheets import layout
from ldm.training.config import Config, dump, load
from ldm.weights import sources
from ldm.weights.embeddings import open_embedding
from ldm.weights.tensors import read_header

FEW = ["adapter.steps=2", "data.upscale=4", "data.workers=0", "data.crops=1", "trackers=[]", "adapter.rank=2"]

HANDED_OUT = """
import os
from ldm.cli.train_adapter import handed_out
from ldm.errors import LdmError

def refuse():
    raise LdmError(f"refused by {os.environ['RANK']}")

found = handed_out(lambda: f"chosen by {os.environ['RANK']}")
try:
    handed_out(refuse)
except LdmError as error:
    print(f"{found}; {error}\\n", end="", flush=True)
"""


def test_one_line(
    models: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "WEIGHTS", (0.0, 1.2))
    output = tmp_path / "r"
    few = [*FEW, "adapter.prior.images=2", "adapter.prior.steps=2"]
    job = AdapterJob(str(shapes), str(models / "sd15"), str(output), trigger="sks", class_prompt="a shape")
    train_adapter(job, few)
    told = capsys.readouterr()
    assert told.err.startswith("ldm: choosing settings\n")
    assert "ldm: 50 images: ldm train" in told.err
    assert told.out.splitlines() == [str(output / "adapter" / name) for name in ("adapter.safetensors", "sheet.png")]
    with Image.open(output / "adapter" / "sheet.png") as sheet:
        assert sheet.size == layout((64, 64), ["LoRA weight 0.0", "LoRA weight 1.2"], ["sks"]).size
    metadata = read_header(output / "adapter" / "adapter.safetensors")[1]
    assert '"sks' in metadata["ss_tag_frequency"]
    assert len(list((output / "data").glob("class-*/images/*.png"))) == 2
    before = (output / "adapter" / "adapter.safetensors").read_bytes()
    train_adapter(job, few)  # done: nothing happens
    assert (output / "adapter" / "adapter.safetensors").read_bytes() == before


def config(models: Path, *overrides: str) -> Config:
    return load(None, ["stages=[adapter]", f"model.source={models / 'sd15'}", *overrides])


def test_what_is_chosen(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [defaults(count, config(models), "adapter") for count in (1, 1000)]
    assert {"adapter.batch=1", "adapter.steps=300", "adapter.sizes=[{size: 64}]"} < set(small[0])
    assert {"adapter.batch=16", "adapter.steps=300"} < set(small[1])
    monkeypatch.setattr(sources, "open_source", lambda *_, **__: SimpleNamespace(family=SD15))
    few, many = (defaults(count, config(models), "adapter") for count in (1, 1000))
    assert {"adapter.batch=1", "adapter.steps=400", "adapter.sizes=[{size: 512}]"} < set(few)
    assert {"adapter.batch=4", "adapter.steps=3000"} < set(many)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "adapter.batch=4" in defaults(3, config(models), "adapter")
    assert "adapter.batch=4" in defaults(1, config(models, "adapter.prior.prompt=a dog"), "adapter")


def test_what_is_chosen_fits(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = config(models)
    given = ["stages=[adapter]", f"model.source={models / 'sd15'}", *defaults(10, base, "adapter")]
    own = ["adapter.optimizer={learning_rate: 1e-3}", "adapter.checkpointing=false"]
    monkeypatch.setattr(door, "memory", lambda device: 10**12)
    assert fitting(given, [], saving(base, "adapter")) == given
    assert not capsys.readouterr().err
    monkeypatch.setattr(door, "memory", lambda device: 1)
    chosen = fitting(given, own, saving(base, "adapter"))
    assert chosen[-4:] == ["adapter.micro_batch=1", "adapter.quantize=int8-weights", *own]
    assert load(None, chosen).adapter.optimizer.schedule == "constant"  # the user's section as a whole
    assert "GB of memory are forecast and 0.0 GB are free: it may not fit" in capsys.readouterr().err
    assert all("quantize" not in key for more in saving(config(models, "adapter.dora=true"), "adapter") for key in more)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": "dogs"}, r"runs holds a run whose data.source is 'cats', not 'dogs'; choose another --output"),
        ({"trigger": "dog"}, r"data.trigger is 'cat', not 'dog'"),
        ({"model": "emoji"}, "model.source is '.*sd15', not 'emoji'"),
    ],
)
def test_another_run_in_the_output(
    changed: dict[str, str], message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("cats", "dogs", "runs"):
        Path(folder).mkdir()
    job = AdapterJob("cats", str(models / "sd15"), "runs", trigger="cat")
    Path("runs/adapter/checkpoints/step-00000001").mkdir(parents=True)
    Path("runs/config.yaml").write_text(dump(load(None, job.settings())))
    same = replace(job, images=str(tmp_path / "cats"), trigger="")
    assert choice(same, [], load(None, same.settings())) == ("runs/config.yaml", same.settings())
    with pytest.raises(LdmError, match=message):
        train_adapter(replace(job, **changed), [])


def test_what_ended_before_it_trained_may_be_begun_again(models: Path, shapes: Path, tmp_path: Path) -> None:
    """Without captions, which is found once the folder is made; then with a trigger word."""
    (tmp_path / "bare").mkdir()
    shutil.copy(next(shapes.glob("*.png")), tmp_path / "bare")
    job = AdapterJob(str(tmp_path / "bare"), str(models / "sd15"), str(tmp_path / "r"))
    with pytest.raises(LdmError, match="1 of 1 images have no caption"):
        train_adapter(job, FEW)
    again = replace(job, trigger="sks")
    assert 'data.trigger="sks"' in choice(again, FEW, load(None, again.settings()))[1]


def test_a_new_word_has_a_vector_for_each_token(models: Path) -> None:
    job = AdapterJob("cats", str(models / "sd15"), "runs", "textual-inversion", trigger="<a>", initial="a cat")
    for words, vectors in (("a cat", 4), ("antidisestablishmentarianism of electroencephalography", 8)):
        count = tokens(config(models).model, words)
        (word,) = getattr(load(None, job.settings(count)), "textual-inversion").words.values()
        assert word.vectors == max(count, 4) >= vectors


def test_the_first_process_chooses_for_all(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(HANDED_OUT)
    said = on_two(script).stdout.splitlines()
    assert said == ["chosen by 0; refused by 0"] * 2


def test_bad_input(models: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmError, match="empty holds no images"):
        train_adapter(AdapterJob(str(tmp_path / "empty"), str(models / "sd15"), str(tmp_path / "r")), FEW)
    with pytest.raises(LdmError, match="data.source: .*nowhere does not exist"):
        train_adapter(AdapterJob(str(tmp_path / "nowhere"), str(models / "sd15"), str(tmp_path / "r")), FEW)
    same = AdapterJob(str(shapes), str(models / "sd15"), str(tmp_path / "r"), trigger="A dog", class_prompt="a dog")
    with pytest.raises(LdmError, match="adapter.prior.prompt and data.trigger are the same, 'a dog'"):
        train_adapter(same, FEW)
    with pytest.raises(LdmError, match='data: a section given as a whole leaves out data.source=".*"; set its keys'):
        train_adapter(same, ["data={holdout: 3}"])


def test_a_new_word(
    models: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "WEIGHTS", (1.0,))
    (tmp_path / "few").mkdir()
    for path in sorted(shapes.iterdir())[:8]:
        shutil.copy(path, tmp_path / "few")
    output, few = tmp_path / "r", [one.replace("adapter.", "textual-inversion.") for one in FEW[:-1]]
    job = AdapterJob(
        str(tmp_path / "few"), str(models / "sd15"), str(output), "textual-inversion", trigger="<sks>", initial="dog"
    )
    train_adapter(job, few)
    folder = output / "textual-inversion"
    assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in ("embeddings", "sheet.png")]
    assert open_embedding(folder / "embeddings" / "_sks_.safetensors").vectors[""].shape[0] == 4
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size == layout((64, 64), ["seed 0"], ["without the word: <sks>", "with the word: <sks>"]).size
    with pytest.raises(LdmError, match=r"r holds a run whose stages is \['textual-inversion'\], not"):
        train_adapter(replace(job, kind="lora", initial=""), [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "textual_inversion", "trigger": "x"}, "--kind 'textual_inversion' is not known; did you mean text"),
        ({"kind": "textual-inversion"}, "--trigger names the new word"),
        ({"initial": "dog"}, "--initial is for a new word"),
        ({"kind": "textual-inversion", "trigger": "x", "class_prompt": "a dog"}, "--class-prompt is for a LoRA"),
    ],
)
def test_kinds(given: dict[str, str], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        train_adapter(AdapterJob("images", "emoji", "r", **given), [])


def test_what_the_door_cannot_do() -> None:
    with pytest.raises(LdmError, match="--output is empty"):
        train_adapter(AdapterJob("images", "emoji", ""), [])
    with pytest.raises(LdmError, match="stages: --kind chooses what is trained here"):
        train_adapter(AdapterJob("images", "emoji", "r"), ["stages=[base]"])
