"""The built-in model: found by name, used where none is named, and able to draw."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import run
from PIL import Image, ImageFilter

from ldm.errors import LdmError
from ldm.evaluation.networks.extractors import open_text_extractor
from ldm.families import EMOJI
from ldm.images import read_settings
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.builtin import FOLDER, builtin, known_words, vocabulary
from ldm.weights.components import fingerprint
from ldm.weights.sources import open_source, verify_source
from pipelines import Pipeline
from pipelines.tuning import default_dtype

MOST = 36 * 10**6  # bytes of weights
# words of different concepts, and styles, that the model was trained with
PROMPTS = [
    "red heart, twemoji style",
    "grinning face, noto style",
    "sunflower, fluent flat style",
    "fox, fluent 3d style",
]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(dtype=torch.float32, device="cpu")


@pytest.fixture
def ldm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_it_is_whole_small_and_of_its_family() -> None:
    opened = open_source("emoji")
    assert opened.family.name == "emoji"
    assert opened.family.unet == EMOJI.unet
    assert (opened.family.steps, opened.family.guidance) == (EMOJI.steps, EMOJI.guidance)
    assert any("all weights are finite" in line for line in verify_source(opened))
    models = (path for name in ("emoji", "emoji-refiner") for path in (FOLDER / name).rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in models) <= MOST
    assert {path.name for path in (FOLDER / "emoji").iterdir()} >= {"README.md", "NOTICE.md", "words.txt", "clip"}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "fp32-avx2"), (torch.bfloat16, "bf16-avx512-bf16")], ids=["fp32", "bf16"]
)
def test_an_image_looks_as_recorded(dtype: torch.dtype, kind: str) -> None:
    """For the default dtype of each kind of processor. To record anew: GOLDEN=write pytest tests/pipelines."""
    if dtype == torch.bfloat16 != default_dtype(torch.device("cpu")):
        pytest.skip("bf16 is emulated on this processor, which computes in fp32 by default")
    image = Pipeline(dtype=dtype, device="cpu")("fox, fluent 3d style", seed=0).images[0]
    path = Path(__file__).parents[1] / "recorded" / f"golden-{kind}.png"
    if os.environ.get("GOLDEN") == "write":
        image.save(path, optimize=True)
    with Image.open(path) as recorded:
        found, wanted = (
            [np.asarray(one, float) for one in (whole, whole.filter(ImageFilter.GaussianBlur(2)))]
            for whole in (image, recorded.convert("RGB"))
        )
    assert 10 * np.log10(255**2 / max(np.square(found[0] - wanted[0]).mean(), 1e-6)) > 30  # PSNR, dB
    assert np.abs(found[1] - wanted[1]).mean() < 2  # of 255, blurred


def test_its_images_are_what_was_asked_for(pipeline: Pipeline) -> None:
    """Its own pair, which never saw an image that it made, tells which prompt each belongs to; and colours fit."""
    result = pipeline(PROMPTS, seed=0)
    assert {image.size for image in result.images} == {(96, 96)}
    judge = open_text_extractor("clip:emoji")
    images = judge(torch.stack([judge.prepare(image) for image in result.images]))["features"]
    assert (images @ judge.texts(PROMPTS).T).argmax(dim=1).tolist() == list(range(len(PROMPTS)))
    heart, face, *_ = (np.asarray(image, float)[40:56, 40:56].reshape(-1, 3).mean(0) for image in result.images)
    assert heart[0] > heart[1] + 60 and heart[0] > heart[2] + 60
    assert face[0] > face[2] + 60 and face[1] > face[2] + 30


def test_its_refiner_takes_what_it_lacks_from_it(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, refiner = (LatentDiffusion.from_pretrained(name, dtype=torch.float32) for name in ("emoji", "emoji-refiner"))
    assert refiner.family.name == "emoji-refiner"
    for ours, theirs in (
        (base.autoencoder, refiner.autoencoder),
        (base.text_encoders.towers[-1], refiner.text_encoders.towers[-1]),
    ):
        assert fingerprint({"part": ours}) == fingerprint({"part": theirs})
    assert not list((FOLDER / "emoji-refiner").glob("vae/*.safetensors"))
    assert any("all weights are finite" in line for line in verify_source(open_source("emoji-refiner")))
    both = Pipeline(refiner="emoji-refiner", dtype=torch.float32, device="cpu")
    alone, finished, taken_over = (
        np.asarray(made(PROMPTS[0], seed=0, **settings).images[0], float)
        for made, settings in ((pipeline, {}), (both, {}), (both, {"refiner_at": 0.8}))
    )
    for changed in (finished, taken_over):
        assert 0.5 < np.abs(changed - alone).mean() < 20  # another image, and nearly the same one
    copy = tmp_path / "builtin"
    shutil.copytree(FOLDER, copy)
    monkeypatch.setattr("ldm.weights.builtin.FOLDER", copy)
    weights = copy / "emoji/vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(LdmError, match="vae"):
        open_source("emoji-refiner")
    with pytest.raises(LdmError, match="vae, text_encoder_2, tokenizer_2 missing; a whole model is needed"):
        open_source(FOLDER / "emoji-refiner")


def test_it_starts_from_images_and_fills_them_in(pipeline: Pipeline) -> None:
    start = pipeline("red heart, twemoji style", seed=1).images[0]
    changed = pipeline("blue heart, twemoji style", image=start, strength=0.7, seed=2).images[0]
    mask = Image.new("L", start.size)
    mask.paste(255, (0, 0, 48, 96))
    filled = pipeline("green apple, noto style", image=start, mask=mask, seed=3).images[0]
    before, after = np.asarray(start), np.asarray(filled)
    assert np.array_equal(before[:, 56:], after[:, 56:])
    assert not np.array_equal(before[:, :40], after[:, :40])
    assert not np.array_equal(before, np.asarray(changed))


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a dog on a skyscraper at dawnbreak", "skyscraper, dawnbreak"),
        ("ein Hund am Strand", "ein, hund, strand"),
        ("красное сердце", "красное, сердце"),
        ("赤いハート", "赤いハート"),
        ("rocket " * 300, None),
        ("", None),
        ("red heart, twemoji style", None),
    ],
)
def test_any_prompt_gives_an_image_and_unknown_words_a_note(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture, prompt: str, unknown: str | None
) -> None:
    assert len(pipeline([prompt, prompt], seed=1, steps=2).images) == 2
    notes = [record.message for record in caplog.records if "never saw" in record.message]
    assert notes == ([f"words that this model never saw in training: {unknown}"] if unknown else [])


def test_the_command_without_a_model(ldm: Any, tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()  # a folder that is no model
    code, out, err = ldm("generate", "red heart, twemoji style", "--seed", 1, "--out", "heart.png")
    assert (code, out, err) == (0, "heart.png\n", "")
    record, _ = read_settings(tmp_path / "heart.png")
    assert record is not None
    assert (record["model"], record["source"], record["steps"]) == ("emoji", "emoji", EMOJI.steps)
    assert record["guidance"]["scale"] == EMOJI.guidance
    assert ldm("repro", "heart.png")[0] == 0
    code, out, _ = ldm("info", "emoji", "--json")
    assert (code, json.loads(out)["family"], json.loads(out)["layout"]) == (0, "emoji", "diffusers folder")


def test_a_model_here_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert builtin("emoji") == FOLDER / "emoji"
    tiny.model("sd15").save_pretrained("emoji")
    assert builtin("emoji") is None
    assert open_source("emoji").family.text[0].width == 32
    assert Pipeline(device="cpu").model.family.name == "emoji"  # where none is named
    assert (builtin("emojis"), builtin(None), builtin(3)) == (None, None, None)
    with pytest.raises(LdmError, match="nonsense does not exist; give a model folder"):
        open_source("nonsense")


def test_words() -> None:
    assert vocabulary(["Red heart, noto style", "heart: 1st O’Neill_x"]) == [
        "heart", "neill", "noto", "o", "red", "st", "style", "x",
    ]  # fmt: skip
    known = known_words(FOLDER / "emoji")
    assert known is not None
    assert {"heart", "fluent", "style"} <= known
    assert "skyscraper" not in known


def test_a_model_without_a_list_of_words_notes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.model("sdxl").save_pretrained(tmp_path / "model")
    for source in (tmp_path / "model", LatentDiffusion.from_pretrained(tmp_path / "model")):
        Pipeline(source, device="cpu")("gibberish", steps=1, seed=0)
    assert not caplog.records
