"""`ldm generate` and `ldm repro`: files with their record, lists of prompts, wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import adapter_files
import numpy as np
import pytest
import tiny
from commands import ldm
from launched import Program, on_two
from PIL import ExifTags, Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd_parsers import ParserManager

from ldm.errors import LdmError
from ldm.files import DIGEST
from ldm.images import load_image, read_settings, save_png
from pipelines.a1111 import from_parameters, to_parameters

__all__ = ["ldm"]  # a fixture


def test_images_and_their_record(ldm: Any, tmp_path: Path) -> None:
    code, out, err = ldm("generate", "a (cat:1.2)", "-n", 2, "--steps", 3, "--seed", 7, "--negative", "bad", "--grid")
    assert (code, err) == (0, "")
    assert out.split() == ["outputs/00000-7.png", "outputs/00001-8.png", "outputs/grid.png"]
    settings, parameters = read_settings(tmp_path / "outputs" / "00001-8.png")
    assert settings is not None
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a (cat:1.2)", 8, 3)
    assert re.match(
        r"a \(cat:1.2\)\nNegative prompt: bad\nSteps: 3, Sampler: PLMS, CFG scale: 7.5, Seed: 8", parameters
    )
    assert Image.open(tmp_path / "outputs" / "grid.png").size == (128, 64)
    assert ldm("generate", "another", "--steps", 1, "--seed", 1)[1] == "outputs/00002-1.png\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--scheduler", "euler-a", "--spacing", "trailing", "--eta", "0.5"],
        ["--scheduler", "dpm++2m-sde", "--spacing", "karras", "--rescale", "0.3", "--interval", "0.1,0.9"],
        ["--scheduler", "euler", "--spacing", "9,3,1,0.2", "--steps", "4", "--threshold", "0.9", "--perturbed", "1.5"],
        ["--clip-skip", "1", "--no-weights", "--rng", "diffusers", "--size", "72x64"],
        ["--hires", "1.5", "--hires-strength", "0.7"],
        ["--merge", "0.4", "--reuse", "2", "--scheduler", "euler"],
    ],
)
def test_an_image_can_be_made_again(ldm: Any, arguments: list[str]) -> None:
    assert ldm("generate", "a (cat:1.2)", "--steps", 3, "--seed", 7, "--out", "a.png", *arguments)[0] == 0
    code, out, _ = ldm("repro", "a.png", "--out", "b.png")
    assert (code, out) == (0, "identical: largest difference 0, mean 0.0000 of 255\n")
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))


def test_an_image_made_among_others_can_be_made_again(ldm: Any, tmp_path: Path) -> None:
    """To the bit, though numbers are rounded otherwise in a batch of another size."""
    made = ldm("generate", "a cat", "a dog", "-n", 2, "--steps", 3, "--seed", 7, "--dtype", "bf16")[1].split()
    records = [read_settings(tmp_path / path)[0] or {} for path in made]
    assert [(record["batch"], record["place"]) for record in records] == [(4, 0), (4, 1), (4, 2), (4, 3)]
    for path in made[1:3]:
        assert ldm("repro", path)[1].startswith("identical")


def test_images_from_images_and_refined_ones_can_be_made_again(ldm: Any, models: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("in.png")
    Image.fromarray(noise[:, :, 0] // 128 * 255).save("mask.png")
    cases = [
        ["--image", "in.png", "--strength", "0.7"],
        ["--image", "in.png", "--mask", "mask.png"],
        ["--refiner", models / "sdxl-refiner", "--refiner-at", "0.6"],
        ["--refiner", models / "sdxl-refiner"],
    ]
    for case in cases:
        code, _, err = ldm("generate", "a cat", "--steps", 5, "--seed", 3, "--out", "a.png", *case, model="sdxl")
        assert code == 0, err
        code, out, err = ldm("repro", "a.png")
        assert out.startswith("identical"), err
    edit = ["--image", "in.png", "--image-guidance", "2", "--steps", 3, "--out", "e.png"]
    assert ldm("generate", "make it blue", *edit, model="sd15-edit")[0] == 0
    assert ldm("repro", "e.png")[1].startswith("identical")
    Image.fromarray(noise[::-1]).save("in.png")
    assert (
        ldm("generate", "a cat", "--steps", 2, "--out", "b.png", "--image", "in.png", "--seed", 1, model="sdxl")[0] == 0
    )
    Image.fromarray(noise).save("in.png")
    code, _, err = ldm("repro", "b.png")
    assert code == 1
    assert "is gone or has changed; name it (--image)" in err


def test_an_image_with_a_component_from_elsewhere_can_be_made_again(ldm: Any, models: Path) -> None:
    """Of a file without an autoencoder, which the record names."""
    tiny.model("sd15", seed=1, shallow=True).save_pretrained("whole.safetensors")
    with safe_open("whole.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != DIGEST}
    kept = {name: t for name, t in load_file("whole.safetensors").items() if not name.startswith("first_stage_model.")}
    save_file(kept, "bare.safetensors", metadata)
    Path("vae").symlink_to(models / "sd15" / "vae")
    options = ["--model", "bare.safetensors", "--steps", 2, "--seed", 1]
    code, out, err = ldm("generate", "a cat", *options, model=None)
    assert (code, out) == (1, "") and "holds no autoencoder; name one (--component vae=PATH" in err
    for case in ("vae", "vae="):
        assert "NAME=PATH, such as vae=" in ldm("generate", "a cat", *options, "--component", case, model=None)[2]
    options += ["--component", "vae=vae"]
    plan = json.loads(ldm("generate", "a cat", *options, "--dry-run", model=None)[1])
    assert plan["model"]["components"]["vae"]["class"] == "AutoencoderKL"
    for out in ("a.png", "b.png"):
        assert ldm("generate", "a cat", *options, "--out", out, model=None)[0] == 0
    record, _ = read_settings(Path("a.png"))
    assert record is not None and record["components"] == {"vae": str(Path("vae").absolute())}
    assert ldm("repro", "a.png")[1].startswith("identical")
    Path("vae").rename("moved")
    assert "does not exist" in ldm("repro", "a.png")[2]
    assert ldm("repro", "a.png", "--component", "vae=moved")[1].startswith("identical")


def test_a_line_of_a_list_can_be_made_again(ldm: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("in.png")
    Path("p.jsonl").write_text('{"prompt": "a\u2028cat", "image": "in.png", "strength": 0.7, "guidance": null}\n')
    code, out, err = ldm("generate", "--prompts", "p.jsonl", "--steps", 3, "--rescale", 0.5)
    assert code == 0, err
    assert ldm("repro", out.strip())[1].startswith("identical")
    other = ldm("generate", "--prompts", "p.jsonl", "--steps", 3, "--rescale", 0.6)[1]
    assert other not in ("", out)  # another image, and so another file


def test_a_wrong_line_is_found_before_the_first_image(ldm: Any, tmp_path: Path) -> None:
    for wrong in (
        '"scheduler": 5',
        '"guidance": "much"',
        '"width": 33',
        '"image": "missing.png"',
        '"negative": [1]',
        '"prompt": null',
    ):
        Path("p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", ' + wrong + "}\n")
        code, out, err = ldm("generate", "--prompts", "p.jsonl", "--steps", 1)
        assert (code, out) == (1, "")
        assert err.startswith("ldm: p.jsonl, line 2: ")
    Path("p.jsonl").write_text("[" * 100_000)
    assert 'line 1: a JSON object with "prompt" is needed' in ldm("generate", "--prompts", "p.jsonl")[2]
    Path("p.txt").write_text("a cat\n\na (dog:5000)\n")
    assert "p.txt, line 3: a weight of 5000" in ldm("generate", "--prompts", "p.txt")[2]
    assert list(tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "latents"}, "has output, which this version of ldm does not know"),
        ({"self": 1}, "has self, which this version"),
        ({"source": 5}, "the image's record is damaged"),
        ({"dtype": ["fp32"]}, "the image's record is damaged"),
        ({"scheduler": 5}, "scheduler 5: a name"),
        ({"crop": 5}, "crop 5: two whole numbers"),
        ({"guidance": {"interval": [1]}}, "interval (1,): two rising numbers"),
        ({"strength": 0.5}, "was made from an image that its record does not name"),
        ({"batch": 2, "place": 2}, "the image's record is damaged"),
        ({"batch": "2"}, "the image's record is damaged"),
    ],
)
def test_damaged_records_are_refused(ldm: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert ldm("generate", "a cat", "--steps", 1, "--out", "a.png")[0] == 0
    record, parameters = read_settings(tmp_path / "a.png")
    save_png(Image.open("a.png").convert("RGB"), tmp_path / "b.png", {**(record or {}), **change}, parameters)
    code, out, err = ldm("repro", "b.png")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_an_image_of_another_run_is_not_replaced(ldm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs into one folder have counted the same images there before either had finished one."""
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    made = [ldm("generate", "a cat", "--steps", steps, "--seed", 1)[1].strip() for steps in (1, 2)]
    assert made == ["outputs/00000-1.png", "outputs/00001-1.png"]


def test_repro_notices_other_weights(ldm: Any, models: Path) -> None:
    assert ldm("generate", "a cat", "--steps", 2, "--seed", 1, "--out", "a.png")[0] == 0
    code, _, err = ldm("repro", "a.png", "--model", models / "sdxl")
    assert code == 1
    assert "was made with other weights" in err
    Image.new("RGB", (64, 64)).save("plain.png")
    assert "does not say how it was made" in ldm("repro", "plain.png")[2]


def test_a_folder_may_have_a_dot_in_its_name(ldm: Any) -> None:
    assert ldm("generate", "a cat", "--steps", 1, "--seed", 1, "--out", "sd1.5")[1] == "sd1.5/00000-1.png\n"


def test_a_list_of_prompts_goes_on_where_it_stopped(ldm: Any, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a cat", "steps": 2}\n\n{"prompt": "a dog", "seed": 5, "negative": "bad"}\n{"prompt": "a cow"}\n'
    )
    command = ["generate", "--prompts", "p.jsonl", "--steps", 3, "--out", "o"]
    code, out, _ = ldm(*command)
    assert code == 0
    paths = [Path(line) for line in out.splitlines()]
    assert [read_settings(path)[0]["seed"] for path in paths] == [0, 5, 2]  # type: ignore[index]
    assert [read_settings(path)[0]["steps"] for path in paths] == [2, 3, 3]  # type: ignore[index]
    before = paths[1].read_bytes()
    paths[1].unlink()
    again = ldm(*command)
    assert again[1] == f"{paths[1]}\n"
    assert paths[1].read_bytes() == before
    assert "nothing to do: all 3 images are there" in ldm(*command)[2]


def test_lines_that_differ_in_their_texts_are_made_together(ldm: Any, tmp_path: Path) -> None:
    """Wherever they stand; each keeps its own texts and seed."""
    lines = [
        {"prompt": "a", "negative": "x"}, {"prompt": "b", "steps": 1, "negative": "y"}, {"prompt": "c", "seed": 9},
        {"prompt": "d", "negative": "z"}, {"prompt": "e", "steps": 1, "negative": "v"},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = ldm("generate", "--prompts", "p.jsonl", "--steps", 2, "--guidance", 3)
    assert code == 0, err
    records = [read_settings(tmp_path / path)[0] or {} for path in sorted(out.split())]
    found = [tuple(one.get(name) for name in ("prompt", "negative", "seed", "steps", "batch")) for one in records]
    assert found == [("a", "x", 0, 2, 2), ("b", "y", 1, 1, 2), ("c", None, 9, 2, None), ("d", "z", 3, 2, 2),
                     ("e", "v", 4, 1, 2)]  # fmt: skip
    lines[-1]["negative"] = "(v:1e)(v:5000)"
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "p.jsonl, line 5: a weight of 5000" in ldm("generate", "--prompts", "p.jsonl", "--guidance", 3)[2]


def test_a_list_that_fills_the_disk_goes_on_later(ldm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so, and what is there is whole."""
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    command = ["generate", "--prompts", "p.txt", "--steps", 1, "--out", "o", "--batch", 2]
    room, fsync = iter([True]), os.fsync

    def full(file: int) -> None:
        if not next(room, False):
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr("ldm.images.os.fsync", full)
        code, out, err = ldm(*command)
    assert code == 1
    assert re.fullmatch(r"ldm: o/\d{6}-\w{8}\.png cannot be written: No space left on device\n", err)
    assert out.split() == [f"o/{path.name}" for path in (tmp_path / "o").iterdir()]
    assert len(out.split()) == 1
    assert read_settings(tmp_path / out.strip())[0]
    assert len(ldm(*command)[1].split()) == 3


def test_processes_share_a_list(ldm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\ne\n")
    made = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        made += ldm("generate", "--prompts", "p.txt", "--steps", 1, "--out", "o")[1].split()
    assert len(made) == len(set(made)) == 5


@pytest.fixture(scope="module")
def listed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of the command for a list of eight prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "p.txt"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(8)))
    return [
        "generate", "--model", str(models / "sd15"), "--dtype", "fp32", "--device", "cpu", "--steps", "12",
        "--batch", "1", "--scheduler", "euler-a", "--prompts", str(prompts), "--out",
    ]  # fmt: skip


def images(folder: Path) -> dict[str, bytes]:
    """Every image of a folder, whole: the pixels by name."""
    return {path.name: Image.open(path).tobytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def whole(listed: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The list's images, made by one process without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    alone = Program("-m", "ldm", *listed, folder)
    _, err = alone.communicate()
    assert alone.returncode == 0, err
    return images(folder)


def test_a_killed_list_goes_on(listed: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    for count, number in ((2, signal.SIGKILL), (5, signal.SIGINT)):
        process = Program("-m", "ldm", *listed, folder)
        while len(list(folder.glob("*.png"))) < count and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        assert "Traceback" not in process.communicate()[1]
        assert len(images(folder)) >= count
        assert images(folder).items() <= whole.items()
    last = Program("-m", "ldm", *listed, folder)
    last.communicate()
    assert last.returncode == 0
    assert images(folder) == whole


def test_launched_processes_share_a_list(listed: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    """What the README shows, with two real processes: together they make what one makes alone."""
    result = on_two("-m", "ldm", *listed, tmp_path / "two")
    assert len(set(result.stdout.split())) == 8
    assert images(tmp_path / "two") == whole


def test_the_plan_is_printed_and_nothing_made(ldm: Any, tmp_path: Path) -> None:
    code, out, _ = ldm("generate", "a cat", "--steps", 4, "--dry-run")
    plan = json.loads(out)
    assert code == 0
    assert len(plan["timesteps"]) == 5  # pndm repeats one
    assert (plan["images"], plan["settings"]["width"]) == (1, 64)
    assert list(tmp_path.iterdir()) == []
    Image.new("RGB", (90, 100)).save("in.png")
    settings = json.loads(ldm("generate", "a cat", "--image", "in.png", "--guidance", 0, "--dry-run")[1])["settings"]
    assert (settings["width"], settings["height"], settings["guidance"]["scale"]) == (88, 96, 0)
    assert "width 33" in ldm("generate", "a cat", "--size", 33, "--dry-run")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt"),
        (["a", "-n", "0"], "-n 0: a whole number from 1"),
        (["a", "-n", "1000000000"], "-n 1000000000: a whole number"),
        (["a", "(b:1e)(c:5000)"], "a weight of 5000 in a prompt, for 'c'"),
        (["a", "--size", "33"], "width 33: a multiple of 8"),
        (["a", "--size", "big"], "--size 'big'"),
        (["a", "--steps", "0"], "--steps 0: a whole"),
        (["a", "--guidance", "nan"], "--guidance nan: a number"),
        (["a", "--seed", "-3"], "seed"),
        (["a", "--scheduler", "eulre"], "choose euler"),
        (["a", "--spacing", "1,x"], "--spacing '1,x'"),
        (["a", "--interval", "1"], "--interval (1.0,): two rising numbers"),
        (["a", "--image", "missing.png"], "missing.png does not exist"),
        (["a", "--image", "broken.png"], "broken.png cannot be read as an image"),
        (["a", "--image", "bomb.png"], "pixels"),
        (["a", "--prompts", "latin.txt"], "is not UTF-8 text: byte 1"),
        (["a", "--prompts", "bad.jsonl"], "line 1: setting colour is not known"),
        (["a", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["a", "b", "--out", "one.png"], "2 images need a folder"),
        (["a", "--out", "no/one.png"], "does not exist; create it first"),
        (["a", "--image", ""], "--image '': a path or a PIL image is needed"),
        (["a", "--image", "in.png", "--strength", "0"], "--strength 0.0: a number above 0, at most 1, is needed"),
        (["a", "--out", "one.jpg"], "name a folder, or a file that ends in .png"),
        (["a", "--out", "broken.png/x"], "cannot be made"),
        (["x" * 100_001], "a prompt of 100001 characters"),
        (["a", "--device", "abacus"], "abacus"),
    ],
)
def test_wrong_input_gets_one_line(ldm: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    (tmp_path / "latin.txt").write_bytes("gr\u00fcn".encode("latin-1")[1:])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "colour": "red"}')
    if "bomb.png" in arguments:
        Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    before = set(tmp_path.rglob("*.png"))
    code, out, err = ldm("generate", *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err
    assert set(tmp_path.rglob("*.png")) == before


def test_options_of_other_programs(ldm: Any) -> None:
    theirs = ldm(
        "generate", "--prompt", "a cat", "--negative-prompt", "bad", "--num_inference_steps", 3, "--cfg-scale", 2,
        "--sampler", "DPM++ 2M Karras", "--W", 64, "--height", 72, "--seed", 1, "--clip_skip", 1, "--dry-run",
    )  # fmt: skip
    ours = ldm(
        "generate", "a cat", "--negative", "bad", "--steps", 3, "--guidance", 2, "--scheduler", "dpm++2m", "--spacing",
        "karras", "--size", "64x72", "--seed", 1, "--clip-skip", 1, "--dry-run",
    )  # fmt: skip
    assert theirs[0] == 0 and theirs == ours
    code, _, err = ldm("generate", "a", "--steps", 3, "--num-inference-steps", 5)
    assert (code, err) == (1, "ldm: --steps 3 and --num-inference-steps 5 are one setting; give one of them\n")
    assert ldm("generate", "a", "--cfg-scale", "x")[2].startswith("ldm: --cfg-scale 'x': a number from 0")
    assert ldm("generate", "a", "--batch-size", 4)[2].startswith("ldm: batch_size: give n, the images of each prompt")
    assert ldm("generate", "a", "--steps", 1, "--stop-at-clip-layer", -2, "--json")[1].count('"clip_skip": 1') == 1
    assert ldm("generate", "a", "--negative-promt", "x")[2].endswith("did you mean --negative-prompt?\n")
    assert "num-inference" not in ldm("generate", "--help")[1]


def test_schedulers_are_listed(ldm: Any) -> None:
    code, out, _ = ldm("schedulers", "--json")
    assert code == 0
    assert json.loads(out)["euler"]["class"] == "EulerDiscreteScheduler"
    assert "Euler a" in json.loads(out)["euler-a"]["names"] and "dpmpp_2m" in json.loads(out)["dpm++2m"]["names"]
    shown = ldm("schedulers")[1]
    assert "k_euler_a" not in shown and "SGM Uniform" in shown


# --- records of other programs, and images --------------------------------------------------------------------------


def test_the_text_of_other_programs() -> None:
    text = (
        "a cat, (red:1.2)\nsecond line\nNegative prompt: bad, ugly\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 123, Size: 512x768, Clip skip: 2, "
        'Lora hashes: "a: b, c: d"'
    )
    assert from_parameters(text) == {
        "prompt": "a cat, (red:1.2)\nsecond line", "negative": "bad, ugly", "steps": 20, "scheduler": "dpm++2m",
        "spacing": "karras", "guidance": 7.0, "seed": 123, "width": 512, "height": 768, "clip_skip": 1,
    }  # fmt: skip
    hires = "a\nSteps: 3, Sampler: Euler, Schedule type: Automatic, Denoising strength: 0.4, Hires upscale: 2"
    assert from_parameters(hires).items() >= {"hires": 2.0, "hires_strength": 0.4, "spacing": "default"}.items()
    start = time.process_time()
    from_parameters("a\nSteps: 3, " + "a " * 50_000)
    assert time.process_time() - start < 60  # CPU time; it would be minutes
    for wrong in (
        "hello",
        "a\nSteps: many",
        "a\nSteps: 3, Sampler: Guesswork",
        "a\nSteps: 3, Sampler: DPM++ 2S a Karras",  # ancestral, which ours is not
        "a\nSteps: 3, Schedule type: Turbo",
    ):
        with pytest.raises(LdmError):
            from_parameters(wrong)
    ours = {"prompt": "p", "negative": None, "steps": 5, "scheduler": "euler-a", "spacing": "karras", "seed": 1,
            "guidance": {"scale": 3.0}, "width": 8, "height": 16, "clip_skip": 0}  # fmt: skip
    assert from_parameters(to_parameters(ours)) == {
        "prompt": "p", "negative": None, "steps": 5, "scheduler": "euler-a", "spacing": "karras", "guidance": 3.0,
        "seed": 1, "width": 8, "height": 16,
    }  # fmt: skip


def test_names_with_commas_are_quoted_as_the_web_interface_quotes_them() -> None:
    ours: dict[str, Any] = {
        "prompt": "p", "negative": None, "steps": 5, "scheduler": "euler", "spacing": "default", "seed": 1,
        "guidance": {"scale": 3.0}, "width": 8, "height": 16, "clip_skip": 0, "version": "ldm 1",
    }  # fmt: skip
    for name in ("my, model: v2", 'a "b"', "Seed: 5, Steps: 9", "two\nlines"):
        text = to_parameters(ours | {"model": name})
        assert f"Model: {json.dumps(name)}, Version: ldm 1" in text and text.count("\n") == 1
        read = from_parameters(text)
        assert (read["steps"], read["seed"]) == (5, 1)
    assert "Model: v2, Version" in to_parameters(ours | {"model": "v2"})
    assert from_parameters('a\nSteps: 3, Sampler: "Euler a"')["scheduler"] == "euler-a"


WEB_TEXTS = {  # lines of settings as the web interfaces write them, and what they say
    "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 12345, Size: 512x768, Model hash: "
    "abc123def, Model: dreamshaper_8, Denoising strength: 0.4, Clip skip: 2, Hires upscale: 2, Hires steps: 10, "
    'Hires upscaler: 4x-UltraSharp, Lora hashes: "castle: deadbeef", TI hashes: "a: 1, b: 2", Version: v1.9.4': (
        {"scheduler": "euler-a", "spacing": "karras", "hires": 2.0, "hires_strength": 0.4, "clip_skip": 1},
        "Hires steps, Hires upscaler, Lora hashes",
    ),
    "Steps: 30, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7.0, Seed: 5, Size: 832x1216, VAE hash: "
    '63aeecb90f, VAE: sdxl_vae.safetensors, Hashes: {"model": "238ffac319", "embed:A": "23f5e3fc03"}, '
    'Hardware Info: "RTX 4090 24GB, 252GB RAM", Time taken: 10.5 sec.': (
        {"scheduler": "dpm++2m", "spacing": "karras", "width": 832},
        "VAE hash, VAE, Hashes, Hardware Info, Time taken",
    ),
    "Steps: 25, Sampler: DPM++ 2M SDE, Schedule type: Automatic, CFG scale: 7, Seed: 5, Size: 512x512, Civitai "
    'resources: [{"type":"checkpoint","modelName":"D: x"}, {"type":"lora","weight":0.8}], Civitai metadata: {}': (
        {"scheduler": "dpm++2m-sde", "spacing": "exponential"},
        "Civitai resources, Civitai metadata",
    ),
    "Steps: 6, Sampler: LCM, Schedule type: SGM Uniform, CFG scale: 1.5, Seed: 5, Size: 768x1024, Tiled Diffusion: "
    '{"Method": "MultiDiffusion", "Tile batch size": 4}, ControlNet 0: "Module: canny, Weight: 1.0", '
    "Version: f2.0.1v1.10.1-previous-544-g86d00326": (
        {"scheduler": "lcm", "spacing": "trailing"},
        "Tiled Diffusion, ControlNet 0",
    ),
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Face restoration: CodeFormer, Size: 512x512, ENSD: "
    "31337, Variation seed: 9, Refiner: sd_xl_refiner [7440042bbd], Refiner switch at: 0.8, NGMS: 0.2": (
        {"scheduler": "dpm++2m", "spacing": "karras"},
        "Face restoration, ENSD, Variation seed, Refiner, Refiner switch at, NGMS",
    ),
}


@pytest.mark.parametrize("line", WEB_TEXTS)
def test_texts_as_the_web_interfaces_write_them(line: str, caplog: pytest.LogCaptureFixture) -> None:
    expected, unread = WEB_TEXTS[line]
    read = from_parameters(f"a castle, (red:1.2)\nSteps: 1 of 5\nNegative prompt: ugly\nblurry\n{line}")
    assert read.items() >= expected.items()
    assert (read["prompt"], read["negative"]) == ("a castle, (red:1.2)\nSteps: 1 of 5", "ugly\nblurry")
    (record,) = caplog.records
    assert record.getMessage().endswith(f"it may differ: {unread}")


def test_lines_after_the_settings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert from_parameters("a\nSteps: 3, Sampler: Euler\nTemplate: a {b|c}")["steps"] == 3
    assert "the image's text goes on after its settings, which ldm does not read: Template: a {b|c}" in caplog.text


def test_the_text_in_a_jpeg_and_records_of_others(tmp_path: Path) -> None:
    text = "ein Fuchs, größer\nSteps: 3, Sampler: Euler a, Seed: 7"
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    for name in ("a.jpg", "a.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, exif=exif)
        assert read_settings(tmp_path / name) == (None, text)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "comfy.png", pnginfo=info)
    with pytest.raises(LdmError, match=r"comfy.png has a record of ComfyUI alone, which ldm does not read"):
        read_settings(tmp_path / "comfy.png")


def test_another_program_reads_what_we_write(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "prompt": "a fox, (red:1.2)\nin the snow", "negative": "blurry, ugly", "steps": 5, "scheduler": "dpm++2m",
        "spacing": "default", "seed": 2**40, "guidance": {"scale": 3.5}, "width": 8, "height": 16, "clip_skip": 1,
        "model": "fox", "model_hash": "0123456789", "version": "ldm 1",
    }  # fmt: skip
    for spacing, name in {"default": "Uniform", "karras": "Karras", "trailing": "SGM Uniform"}.items():
        save_png(Image.new("RGB", (8, 16)), tmp_path / "a.png", record, to_parameters(record | {"spacing": spacing}))
        found = ParserManager().parse(tmp_path / "a.png")
        assert found is not None and found.generator == "AUTOMATIC1111"
        (sampler,) = found.samplers
        assert [prompt.value for prompt in sampler.prompts] == [record["prompt"]]
        assert [prompt.value for prompt in sampler.negative_prompts] == [record["negative"]]
        assert (sampler.name, sampler.parameters["scheduler"]) == ("DPM++ 2M", name)
        assert (sampler.parameters["steps"], sampler.parameters["cfg_scale"]) == ("5", "3.5")
        assert sampler.parameters["seed"] == str(2**40)
        assert sampler.model is not None and (sampler.model.name, sampler.model.hash) == ("fox", "0123456789")
        assert found.metadata == {"Size": "8x16", "Clip skip": "2", "Version": "ldm 1"}


def test_settings_of_other_programs_that_are_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rest = "Variation seed: 7, Variation seed strength: 0.2, Refiner: xl [abc], Refiner switch at: 0.8, Version: v1.9"
    from_parameters(f"a\nSteps: 3, Seed: 1, Model: m, Model hash: abc, {rest}")
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "does not read; it may differ: Variation seed, Variation seed strength, Refiner, Refiner switch at"
    )
    caplog.clear()
    from_parameters(
        "a\nSteps: 3, Sampler: Euler, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 8x8, Clip skip: 2"
    )
    assert not caplog.records


def test_images_of_every_kind_are_read(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (4, 4), (255, 0)).save(tmp_path / "clear-mask.png")
    assert load_image(tmp_path / "clear-mask.png", "L").getpixel((0, 0)) == 0
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert load_image(tmp_path / "print.jpg").mode == "RGB"
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


def test_a_record_keeps_file_names_that_are_no_text(tmp_path: Path) -> None:
    record = {"prompt": "\N{FOX FACE} \0", "source": "b\udcff.png"}
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", record, "Model: b\udcff")
    assert read_settings(tmp_path / "a.png") == (record, r"Model: b\udcff")


def test_an_image_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.images.os.fsync", full)
    with pytest.raises(LdmError, match="No space left on device"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_an_image_made_a_layer_at_a_time_can_be_made_again(ldm: Any) -> None:
    """Without fused layers, numbers are rounded differently, which is visible in bf16."""
    arguments = ("--steps", 2, "--seed", 7, "--dtype", "bf16", "--offload", "layers", "--out", "a.png")
    assert ldm("generate", "a cat", *arguments)[0] == 0
    assert ldm("repro", "a.png")[1].startswith("identical")


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `one` and `two` for the tiny SD 1.5 model."""
    root, model = tmp_path_factory.mktemp("loras"), tiny.model("sd15", shallow=True)
    for name in ("one", "two"):
        adapter_files.saved(adapter_files.adapter(model, "kohya"), root / f"{name}.safetensors")
    return root


def test_adapters_are_recorded(ldm: Any, loras: Path) -> None:
    """By their files and in prompts; and an image with them can be made again, from the text of other programs, too."""
    by_file = ["--lora", f"{loras / 'one.safetensors'}:0.8", "--lora", f"{loras / 'two.safetensors'}:0.5:0.25"]
    by_name = ["--lora-dir", loras]
    fixed = ["--steps", 2, "--seed", 1]
    assert ldm("generate", "a cat", *fixed, *by_file, "--out", "a.png")[0] == 0
    assert ldm("generate", "a cat<lora:one:0.8><lora:two:te=0.5:unet=0.25>", *fixed, *by_name, "--out", "b.png")[0] == 0
    assert ldm("generate", "a cat", *fixed, "--out", "plain.png")[0] == 0
    record, text = read_settings(Path("a.png"))
    assert record == read_settings(Path("b.png"))[0] and record is not None and record["prompt"] == "a cat"
    one, two = record["adapters"]["one"], record["adapters"]["two"]
    assert one["sha256"] == hashlib.sha256((loras / "one.safetensors").read_bytes()).hexdigest()
    assert (one["unet"], one["text"], two["unet"], two["text"]) == (0.8, 0.8, 0.25, 0.5)
    assert text.startswith("a cat<lora:one:0.8><lora:two:0.5:0.25>\nSteps: 2")
    assert f'Lora hashes: "one: {one["autov3"]}, two: {two["autov3"]}"' in text
    made, plain = (np.asarray(Image.open(name)) for name in ("a.png", "plain.png"))
    assert not np.array_equal(made, plain)
    assert "adapters" not in (read_settings(Path("plain.png"))[0] or {})
    assert ldm("repro", "a.png")[1].startswith("identical")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.open("a.png").save("theirs.png", pnginfo=info)
    command = ["repro", "theirs.png", "--model", record["source"], "--dtype", "fp32"]
    assert ldm(*command, "--lora-dir", loras)[1].startswith("identical")
    assert "no adapter is called 'one'; name the folder of LoRA files" in ldm(*command)[2]


def test_adapters_that_have_moved_or_changed(ldm: Any, loras: Path) -> None:
    file = Path("one.safetensors")
    file.write_bytes((loras / "one.safetensors").read_bytes())
    assert ldm("generate", "a cat", "--steps", 1, "--seed", 1, "--lora", file, "--out", "a.png")[0] == 0
    file.unlink()
    message = f"{file.absolute()} is gone, and no adapter is called 'one'; name the folder of LoRA files (lora_dir="
    assert message in ldm("repro", "a.png")[2]
    assert ldm("repro", "a.png", "--lora-dir", loras)[1].startswith("identical")
    file.write_bytes((loras / "two.safetensors").read_bytes())
    assert "is not the file that the image was made with" in ldm("repro", "a.png")[2]
    assert ldm("repro", "a.png", "--lora-dir", loras)[1].startswith("identical")


def test_a_list_with_adapters(ldm: Any, loras: Path) -> None:
    lines = [
        {"prompt": "a cat"},
        {"prompt": "a cat", "adapters": {"two": 0.5}},
        {"prompt": "a cat<lora:two:0.5>", "lora": []},
        {"prompt": "a cat", "adapters": {"one": {"unet": 1, "text": 0}}},
    ]
    Path("p.jsonl").write_text("\n".join(json.dumps(line | {"seed": 1}) for line in lines))
    command = ["generate", "--prompts", "p.jsonl", "--steps", 1, "--lora-dir", loras, "--lora", "one:0.5"]
    code, out, err = ldm(*command)
    assert code == 0, err
    found = [read_settings(Path(line))[0] or {} for line in out.split()]
    weights = [{name: own["unet"] for name, own in record["adapters"].items()} for record in found]
    assert weights == [{"one": 0.5}, {"two": 0.5}, {"two": 0.5}, {"one": 1.0}]
    images = [np.asarray(Image.open(line)) for line in out.split()]
    assert np.array_equal(images[1], images[2]) and not np.array_equal(images[0], images[1])
    for path in out.split():
        assert ldm("repro", path)[1].startswith("identical")
    assert "nothing to do: all 4 images are there" in ldm(*command)[2]
    plan = json.loads(ldm(*command, "--dry-run")[1])
    assert plan["settings"]["adapters"]["one"]["unet"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "--lora", "one.safetensors:much"], "--lora 'one.safetensors:much': FILE or FILE:WEIGHT, such as"),
        (["a", "--lora", "onne"], "adapter 'onne': no adapter is called 'onne' in {loras}; did you mean one?"),
        (["a <lora:onne:1>"], "<lora:onne:1>: no adapter is called 'onne' in {loras}; did you mean one?"),
        (["--prompts", "p.txt"], "p.txt, line 2: <lora:three>: no adapter is called 'three' in {loras}"),
        (["--prompts", "p.jsonl"], "p.jsonl, line 1: adapters 5: FILE or FILE:WEIGHT"),
    ],
)
def test_wrong_adapters(ldm: Any, loras: Path, options: list[str], message: str) -> None:
    Path("p.txt").write_text("a <lora:one>\nb <lora:three>\n")
    Path("p.jsonl").write_text('{"prompt": "a", "adapters": 5}\n')
    code, out, err = ldm("generate", *options, "--lora-dir", loras)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message.format(loras=loras) in err
