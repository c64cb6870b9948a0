"""`ldm train-adapter`: an adapter from a folder of images, with settings chosen for it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from runs import _fresh_accelerator as _fresh_accelerator

from ldm.cli import train_adapter as door
from ldm.cli.train_adapter import WEIGHTS, AdapterJob, defaults, fitting, saving, train_adapter
from ldm.errors import LdmError
from ldm.families import SD15
from ldm.weights import sources
from ldm.weights.embeddings import open_embedding
from ldm.weights.tensors import read_header

FEW = ["adapter.steps=2", "data.upscale=4", "data.workers=0", "data.crops=1", "trackers=[]", "adapter.rank=2"]


def test_one_line(models: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r"
    few = [*FEW, "adapter.prior.images=2", "adapter.prior.steps=2"]
    job = AdapterJob(str(shapes), str(models / "sd15"), str(output), trigger="sks", class_prompt="a shape")
    train_adapter(job, few)
    told = capsys.readouterr()
    assert "ldm: 50 images: ldm train" in told.err
    assert told.out.splitlines() == [str(output / "adapter" / name) for name in ("adapter.safetensors", "sheet.png")]
    with Image.open(output / "adapter" / "sheet.png") as sheet:
        assert sheet.size == (64 * len(WEIGHTS), 64)
    metadata = read_header(output / "adapter" / "adapter.safetensors")[1]
    assert '"sks' in metadata["ss_tag_frequency"]
    assert len(list((output / "data").glob("class-*/images/*.png"))) == 2
    before = (output / "adapter" / "adapter.safetensors").read_bytes()
    train_adapter(job, few)  # done: nothing happens
    assert (output / "adapter" / "adapter.safetensors").read_bytes() == before


def test_what_is_chosen(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [defaults(count, AdapterJob("", str(models / "sd15"), "")) for count in (1, 1000)]
    assert {"adapter.batch=1", "adapter.steps=300", "adapter.sizes=[{size: 64}]"} < set(small[0])
    assert {"adapter.batch=16", "adapter.steps=300"} < set(small[1])
    monkeypatch.setattr(sources, "open_source", lambda *_, **__: SimpleNamespace(family=SD15))
    few, many = (defaults(count, AdapterJob("", "sd15", "")) for count in (1, 1000))
    assert {"adapter.batch=1", "adapter.steps=400", "adapter.sizes=[{size: 512}]"} < set(few)
    assert {"adapter.batch=4", "adapter.steps=3000"} < set(many)


def test_what_is_chosen_fits(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "stages=[adapter]",
        f"model.source={models / 'sd15'}",
        *defaults(10, AdapterJob("", str(models / "sd15"), "")),
    ]
    monkeypatch.setattr(door, "memory", lambda device: 10**12)
    assert fitting(given, saving("adapter")) == []
    monkeypatch.setattr(door, "memory", lambda device: 1)
    assert fitting(given, saving("adapter")) == saving("adapter")[-1]


def test_bad_input(models: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmError, match="empty holds no images"):
        train_adapter(AdapterJob(str(tmp_path / "empty"), str(models / "sd15"), str(tmp_path / "r")), FEW)
    with pytest.raises(LdmError, match="data.source: .*nowhere does not exist"):
        train_adapter(AdapterJob(str(tmp_path / "nowhere"), str(models / "sd15"), str(tmp_path / "r")), FEW)
    same = AdapterJob(str(shapes), str(models / "sd15"), str(tmp_path / "r"), trigger="A dog", class_prompt="a dog")
    with pytest.raises(LdmError, match="adapter.prior.prompt and data.trigger are the same, 'a dog'"):
        train_adapter(same, FEW)


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
        assert sheet.size == (64, 2 * 64)
    with pytest.raises(LdmError, match="r holds a run of textual-inversion; choose another --output"):
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
