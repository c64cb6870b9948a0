"""Everything of a user's that is ignored, dropped, cut or guessed, with the line that says so.

Each row has what is not used as it is, the file that decides it, and the line. Rows of PROVOKED are brought about here;
those of ELSEWHERE in the named test, which needs a run or a machine of its own.
"""

from __future__ import annotations

import json
import logging
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safety
import tiny
import torch
from commands import run
from images import GRAY, encoded, make_tar, place_image, png
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.cli.info import describe
from ldm.data.sources import open_images
from ldm.errors import LdmError
from ldm.training.config import load
from ldm.weights.sources import open_source, verify_source
from pipelines import Pipeline
from pipelines.a1111 import from_parameters

ROOT = Path(__file__).parents[1]
IMAGE = png(place_image(64, 64))

ELSEWHERE = (  # what, where, the test file, and a part of the line that it looks for
    ("images too small for their bucket", "ldm/data/plan.py", "tests/data/test_plan.py", "are too small (upscale"),
    ("images beside others of another size", "ldm/data/given.py", "tests/data/test_beside.py", "of another size"),
    ("images in no folder with a number", "ldm/data/folder_rules.py", "tests/data/test_visits.py",
     "in no folder with a number"),
    ("masks of images without an alpha channel", "ldm/data/sources.py", "tests/data/test_beside.py",
     "have no alpha channel"),
    ("repeats in a stream", "ldm/data/streams.py", "tests/data/test_visits.py", "repeats are not read of a stream"),
    ("captions longer than the text encoder reads", "ldm/training/run.py", "tests/training/test_train.py",
     "tokens; the rest of them is not read"),
    ("a damaged checkpoint, and the one before it taken", "ldm/training/checkpoint.py",
     "tests/training/test_train.py", "the one before is taken"),
    ("tensors of an adapter that match nothing", "ldm/weights/adapters/reading.py",
     "tests/weights/adapters/test_adapter_bad_input.py", "match nothing in the model and are left out"),
    ("what a model for few steps was made for", "pipelines/adapters.py", "tests/pipelines/test_adapters_in_use.py",
     "these are the defaults"),
    ("embeddings that do not fit the model", "pipelines/embeddings.py",
     "tests/pipelines/test_embeddings_in_prompts.py", "embeddings are left out"),
    ("residuals averaged by a file's name", "ldm/weights/control_models.py", "tests/weights/test_control_models.py",
     "shuffle"),
    ("the size of a condition image", "pipelines/control.py", "tests/pipelines/test_control_runs.py", "is resized to"),
    ("control models without a condition image", "pipelines/control.py", "tests/pipelines/test_control_runs.py",
     "the last ones are not used"),
    ("the size of an image to be filtered", "ldm/cli/preprocess.py", "tests/conditions/test_conditions.py",
     "is resized from"),
    ("an image without people", "ldm/conditions/networks.py", "tests/conditions/test_conditions.py",
     "no person was found"),
    ("images that an evaluation cannot read", "ldm/evaluation/report.py", "tests/evaluation/test_evaluation.py",
     "report.notes"),
)  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def data(tmp_path: Path, files: dict[str, bytes], **options: str) -> None:
    """Open a folder of a good image and of these files."""
    root = tmp_path / "data"
    root.mkdir()
    for name, content in {"good.png": IMAGE, **files}.items():
        (root / name).write_bytes(content)
    open_images(str(root), tmp_path / "cache", captions="optional", **options)


def shard(tmp_path: Path, files: dict[str, bytes]) -> None:
    open_images(str(make_tar(tmp_path / "a.tar", files)), tmp_path / "cache", captions="optional")


def with_chunk(kind: bytes, content: bytes) -> bytes:
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return IMAGE[:33] + chunk + IMAGE[33:]


def broken_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.png").write_bytes(IMAGE)
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    open_images(str(tmp_path / "data"), tmp_path / "cache", captions="optional")


GIF = encoded(Image.new("RGB", (16, 16)), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
DATA: dict[tuple[str, str, str], Callable[[Path], object]] = {
    ("a caption without an image", "ldm/data/folder.py", "1 .txt files have no image of their name: old.txt"):
        lambda path: data(path, {"old.txt": b"x"}),
    ("a caption beside an image that the metadata lists", "ldm/data/folder.py",
     "1 .txt files are not read, because the metadata lists captions: good.txt"):
        lambda path: data(path, {"good.txt": b"x", "metadata.csv": b"file_name,text\ngood.png,y\n"}),
    ("one caption of two images", "ldm/data/folder.py", "1 .txt files are captions of several images"):
        lambda path: data(path, {"good.jpg": encoded(place_image(64, 64), "JPEG"), "good.txt": b"x"}),
    ("files that are no images", "ldm/data/folder.py", "1 other files are not read, by ending: 1 .psd"):
        lambda path: data(path, {"a.psd": b""}),
    ("columns that may be captions", "ldm/data/folder.py", "the metadata has the columns file_name, alt: name the one"):
        lambda path: data(path, {"metadata.csv": b"file_name,alt\ngood.png,y\n"}),
    ("a link to nothing", "ldm/data/folder.py", "leads to nothing: what it stood for is not used"): broken_link,
    ("all frames but the first", "ldm/images.py", "1 images (b.gif): of an animation or of several pages the first"):
        lambda path: data(path, {"b.gif": GIF}),
    ("transparency", "ldm/images.py", "transparent parts, by an alpha channel, become white"):
        lambda path: data(path, {"b.png": png(place_image(64, 64).convert("RGBA"))}),
    ("a colour profile of another kind of colours", "ldm/images.py", "a colour profile that is damaged, or for other"):
        lambda path: data(path, {"b.png": encoded(place_image(64, 64), "PNG", icc_profile=GRAY)}),
    ("high dynamic range", "ldm/images.py", "colours of high dynamic range (PQ or HLG) are read as if"):
        lambda path: data(path, {"b.png": with_chunk(b"cICP", bytes([9, 16, 0, 1]))}),
    ("an image that cannot be used", "ldm/data/image_set.py", "1 of 2 images cannot be used and are left out (b.png: "):
        lambda path: data(path, {"b.png": b"no image"}),
    ("other files in shards", "ldm/data/tar.py", "files in the shards are not read: 1 .cls"):
        lambda path: shard(path, {"0.png": IMAGE, "0.cls": b"1"}),
    ("captions without images in shards", "ldm/data/tar.py", "1 samples of the shards have captions and no image"):
        lambda path: shard(path, {"0.png": IMAGE, "1.txt": b"x"}),
    ("hidden files in shards", "ldm/data/tar.py", "1 files in the shards start with a dot and are ignored"):
        lambda path: shard(path, {"0.png": IMAGE, ".x": b""}),
}  # fmt: skip


# --- models -----------------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, variant: str | None = None) -> Path:
    tiny.model("sd15").save_pretrained(tmp_path / "m", variant=variant)
    return tmp_path / "m"


def unused_component(tmp_path: Path) -> str:
    index = folder(tmp_path) / "model_index.json"
    (tmp_path / "m" / "ldm_manifest.json").unlink()
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"safety_checker": ["x", "StableDiffusionSafetyChecker"]})
    )
    return str(describe(open_source(tmp_path / "m"))["unused"])


def beside(tmp_path: Path) -> None:
    tiny.model("sd15").save_pretrained(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    save_file(tensors, tmp_path / "m.safetensors")  # without our own description
    (tmp_path / "m.yaml").write_text("model:\n  params:\n    parameterization: eps\n")
    with pytest.raises(LdmError, match="do not fit the model"):  # because it is tiny
        open_source(tmp_path / "m.safetensors", family="sd15")


MODELS: dict[tuple[str, str, str], Callable[[Path], object]] = {
    ("components without effect on images", "ldm/weights/folder.py", "['safety_checker']"): unused_component,
    ("the only variant, which was not asked for", "ldm/weights/folder.py", "fp16 is read, the only variant"):
        lambda path: open_source(folder(path, "fp16")),
    ("a configuration beside a checkpoint", "ldm/weights/single_file.py", "m.yaml is read too, because it lies beside"):
        beside,
    ("what digests would show", "ldm/weights/sources.py", "agree with it"):
        lambda path: "; ".join(verify_source(open_source(folder(path)))),
}  # fmt: skip


# --- calls ------------------------------------------------------------------------------------------------------------


def call(tmp_path: Path, prompt: str = "a cat", **settings: Any) -> None:
    """Settings of a call, checked."""
    Pipeline(tiny.model("sd15"), device="cpu", dtype=torch.float32).request(prompt, **settings)


def made(tmp_path: Path, prompt: str, **settings: Any) -> None:
    pipeline = Pipeline(tiny.model("sd15"), device="cpu", dtype=torch.float32)
    pipeline.words = frozenset({"cat"})  # as of a model that knows few words
    pipeline(prompt, steps=1, guidance=1, **settings)


def image(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path / "i.png")
    return path / "i.png"


def holes() -> Image.Image:
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((255, 255, 255, 255), (0, 0, 16, 16))
    mask.paste((0, 0, 0, 0), (32, 32, 48, 48))
    return mask


TEXT = "a\nSteps: 3, Sampler: Euler, VAE: x"
CALLS: dict[tuple[str, str, str], Callable[[Path], object]] = {
    ("prompt syntax of other programs", "pipelines/syntax.py", "read as plain words here: [a:b:0.5], --ar"):
        lambda path: made(path, "[a:b:0.5] cat --ar 16:9"),
    ("the end of a long prompt", "pipelines/pipeline.py", "the prompt has 100 tokens, of which text_encoder reads 75"):
        lambda path: made(path, "a " * 100, chunks=False),
    ("words unknown to the model", "pipelines/pipeline.py", "words that this model never saw in training: dog"):
        lambda path: made(path, "cat dog"),
    ("settings without effect", "pipelines/request.py",
     "without effect here: crop (it needs SDXL), hires_strength (it needs hires), negative (it needs a guidance scale "
     "above 1), strength (it needs an image)"):
        lambda path: call(path, guidance=1, negative="x", strength=0.5, crop=(8, 8), hires_strength=0.5),
    ("the shape of an image to start from", "pipelines/request.py", "has 128×64 pixels and is stretched to 64×64"):
        lambda path: call(path, image=image(path, (9, 9, 9), (128, 64)), size=(64, 64)),
    ("its transparency", "pipelines/request.py", "the image to start from: transparent parts, by an alpha channel"):
        lambda path: call(path, image=image(path, (9, 9, 9, 0))),
    ("margins that do not fit the model", "pipelines/margins.py", "margins 4,4,1,4 are enlarged to 4,4,4,4, so that"):
        lambda path: call(path, image=image(path, (9, 9, 9)), margins=(4, 4, 1, 4)),
    ("holes in a mask", "pipelines/request.py", "the mask's transparent parts count as black"):
        lambda path: call(path, image=image(path, (9, 9, 9)), mask=holes()),
    ("settings in a web interface's text", "pipelines/a1111.py", "that ldm does not read; it may differ: VAE"):
        lambda path: from_parameters(TEXT),
    ("lines after them", "pipelines/a1111.py", "goes on after its settings, which ldm does not read: Template: x"):
        lambda path: from_parameters(f"{TEXT}\nTemplate: x"),
    ("a watermark that other programs do not read", "pipelines/finishing.py", "reads it in images of 64×64 pixels"):
        lambda path: Pipeline(tiny.model("sd15"), watermark=True).request("a cat", size="64"),
    ("what a safety checker has blurred", "pipelines/finishing.py", "flagged the image of seed 7: blurred"):
        lambda path: Pipeline(tiny.model("sd15"), safety=safety.saved(path, -2.0))("cat", seed=7, steps=1),
}  # fmt: skip


# --- files of settings: errors ----------------------------------------------------------------------------------------


def configuration(path: Path, text: str, *overrides: str) -> None:
    (path / "c.yaml").write_text(text)
    load(path / "c.yaml", overrides)


FILES: dict[tuple[str, str, str], Callable[[Path], object]] = {
    ("a key that comes twice", "ldm/training/config.py", "seed is there twice"):
        lambda path: configuration(path, "seed: 1\noutput: x\nseed: 2\n"),
    ("a key that is given twice", "ldm/training/config.py", "seed is given twice, as 1 and 2; the last one counts"):
        lambda path: configuration(path, "", "seed=1", "seed=2"),
    ("an unknown key", "ldm/training/config.py", "sede is not known"): lambda path: configuration(path, "sede: 1\n"),
}  # fmt: skip
PROVOKED = {**DATA, **MODELS, **CALLS, **FILES}


@pytest.mark.parametrize("row", PROVOKED, ids=lambda row: row[0])
def test_nothing_is_passed_over_in_silence(
    row: tuple[str, str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, where, line = row
    assert (ROOT / where).is_file()
    said = ""
    with caplog.at_level(logging.WARNING):
        try:
            said = str(PROVOKED[row](tmp_path))
        except LdmError as error:
            assert row in FILES
            said = str(error)
    assert line in said + "".join(f"{record.getMessage()}\n" for record in caplog.records)


def test_conversion_says_what_it_does_not_write(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny.model("sd15").save_pretrained(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    extra = {"model_ema.decay": torch.zeros(1)}
    save_file(tensors | extra, tmp_path / "m.safetensors", metadata(tmp_path / "m.safetensors"))
    assert run(capsys, monkeypatch, "convert", tmp_path / "m.safetensors", tmp_path / "m")[0] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "not part of the model, and not written: model_ema",
        "metadata of the files are not written: modelspec.author, ss_steps",
    ]


def metadata(path: Path) -> dict[str, str]:
    """The header's metadata without our digest, with some of other programs."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    return {key: value for key, value in header.items() if key != "ldm.sha256"} | {
        "modelspec.author": "somebody", "ss_steps": "100",
    }  # fmt: skip


def test_lists_of_prompts_that_are_tables_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed\na cat,1\n")
    code, _, err = run(capsys, monkeypatch, "generate", "--prompts", tmp_path / "p.csv")
    assert code == 1 and "p.csv: prompts are read from a text file, one a line, or from .jsonl" in err


def test_every_file_with_a_warning_is_in_the_table() -> None:
    """Of the files that read what is the user's; runtime and training warn of the machine and of the run."""
    listed = {where for _, where, *_ in (*PROVOKED, *ELSEWHERE)} | {"ldm/cli/convert.py"}
    warning = set()
    for part in ("ldm/conditions", "ldm/data", "ldm/weights", "ldm/cli", "pipelines"):
        for path in (ROOT / part).rglob("*.py"):
            if re.search(r"\blog\.warning\(", path.read_text()):
                warning.add(path.relative_to(ROOT).as_posix())
    machine = {"pipelines/run.py", "pipelines/tuning.py", "ldm/data/streams.py"}  # memory, defaults; as the folder's
    assert warning - machine <= listed


def test_the_tests_named_elsewhere_look_for_the_line() -> None:
    for _, where, test, line in ELSEWHERE:
        assert (ROOT / where).is_file()
        assert line in (ROOT / test).read_text()
