"""The table of settings: every row comes in by every door or says why not, and one row is all that a setting needs."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_files
import controls
import image_prompts
import pytest
import tiny
import torch
import typer
from commands import run
from PIL import Image
from typer.testing import CliRunner

import pipelines.settings as settings
from ldm.cli import evaluate, evaluate_options
from ldm.cli.main import app, generate_command
from ldm.errors import LdmError
from ldm.evaluation.plan import EvaluationPlan
from ldm.images import read_settings
from ldm.models import prompts
from ldm.models.tokenizer import Tokenizer
from ldm.patches.token_merging import MOST
from ldm.runtime.offload import OFFLOAD
from ldm.runtime.quantization import QUANTIZED
from ldm.sampling.euler import EulerDiscreteScheduler
from ldm.sampling.noise import LARGEST_SEED
from ldm.sampling.schedulers import MOST_STEPS
from pipelines import Pipeline
from pipelines.mixes import recorded
from pipelines.request import records
from pipelines.settings import DOORS, LOADING, SETTINGS, Setting, at, find, number
from pipelines.translation import TRANSLATED
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
    "image_prompt": ("in.png", ("in.png",)), "image_prompt_weight": ("0.5", 0.5),
    "image_prompt_mask": ("mask.png", "mask.png"), "image_prompt_begin": ("0.2", 0.2), "image_prompt_end": ("0.8", 0.8),
    "prompt": ("a cat", "a cat"), "image": ("in.png", "in.png"), "mask": ("mask.png", "mask.png"),
    "margins": ("0,8,16,24", (0, 8, 16, 24)),
    "adapters": ("style.safetensors:0.5", (("style.safetensors", 0.5),)),
    "control": ("image=in.png", ({"kind": "image", "path": "in.png"},)), "control_scale": ("0.5", 0.5),
    "control_fall": ("0.825", 0.825), "control_begin": ("0.25", 0.25), "control_end": ("0.75", 0.75),
    "guess": ("true", True),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny.model("sdxl", shallow=True))


@pytest.fixture(scope="module")
def prompted(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline with an IP-Adapter."""
    folder = tmp_path_factory.mktemp("ip")
    image_prompts.saved(folder / "ip.safetensors", pipeline.model.family)
    image_prompts.encoder().save_pretrained(folder / "image_encoder")
    return Pipeline(pipeline.model, ip_adapter=folder / "ip.safetensors")


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
    assert evaluate_options.sweep_of("sparkle=0.1,0.2") == ("sparkle", (0.1, 0.2))
    plan = EvaluationPlan(metrics=())
    evaluate._model(str(models / "sd15"), dict([evaluate_options.setting_of("sparkle=0.5")]), "cpu", plan)
    with pytest.raises(LdmError, match="sparkle 5: a number from 0 to 1 is needed"):
        evaluate._model(str(models / "sd15"), dict([evaluate_options.setting_of("sparkle=5")]), "cpu", plan)
    with pytest.raises(LdmError, match=r"setting gliter is not known; did you mean sparkle \(glitter\)\?"):
        find("gliter", "python")


def test_names_are_given_once_and_doors_exist() -> None:
    names = [name for row in (*SETTINGS, *LOADING) for name in (row.name, *row.names)]
    assert len(set(names)) == len(names)
    for row in (*SETTINGS, *LOADING):
        assert row.closed.keys() <= DOORS.keys() and all(row.closed.values()) and row.help.endswith(".")
        assert "python" not in row.closed


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_a_setting_comes_in_by_every_door_or_says_why_not(
    row: Setting, pipeline: Pipeline, prompted: Pipeline, tmp_path: Path
) -> None:
    text, value = EXAMPLES[row.name]
    assert row.parse(text) == row.check(value) == value
    if row.kind in (settings.IMAGE, settings.IMAGE_MASKS, settings.IMAGE_PROMPTS):
        value = str(tmp_path / "in.png")
        Image.new("RGB", (64, 64), "white").save(value)
    if row.name == "adapters":
        file = adapter_files.saved(adapter_files.adapter(pipeline.model, "kohya-sgm"), tmp_path / "style.safetensors")
        value = recorded(pipeline.request("a cat", adapters={file: 0.5}).mixes[0])
    given = {"prompt": "a cat", "seed": 1, "steps": 3, row.name: value}
    if row.name.startswith("control") or row.name == "guess":
        pipeline = Pipeline(pipeline.model, control_models=controls.controlnet(pipeline.model.family))
        given["control"] = Image.new("RGB", (64, 64))
    if row.name in ("strength", "mask", "margins"):
        given["image"] = Image.new("RGB", (64, 64))
    if row.name.startswith("hires_"):
        given["hires"] = 2
    if row.name.startswith("image_prompt_"):
        given["image_prompt"] = Image.new("RGB", (64, 64))
    refined = (
        Pipeline(pipeline.model, refiner=tiny.model("sdxl-refiner", shallow=True))
        if "refiner" in row.name
        else pipeline
    )
    refined = prompted if row.name.startswith("image_prompt") else refined
    steps = {"steps": 10} if "refiner" in row.name else {}
    request = refined.request(**{"scheduler": "ddim", **given, **steps})
    if "record" not in row.closed and row.kind not in (settings.IMAGE, settings.CONTROL):  # with digests
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
    known = inspect.signature(Pipeline.__init__).parameters.keys() | {
        "family", "variant", "components", "allow_pickle", "ip_adapter", "image_encoder", "lora_dir",
        "partial_adapters", "control_models", "watermark", "safety", "safety_action", "c2pa",
    }  # fmt: skip
    assert row.name in known
    assert ("shell" in row.closed) != (row.name in inspect.signature(generate_command()).parameters)


def test_every_keyword_of_a_pipeline_is_a_row() -> None:
    keywords = inspect.signature(Pipeline.__init__).parameters.keys() - {"self", "options"}
    assert keywords <= {row.name for row in LOADING} | {"adapters"}  # which are those of calls that name none


@pytest.mark.parametrize("size", [64, "64", (64, 64), [64, 64], "64x64"], ids=repr)
def test_a_size_is_one_number_a_pair_or_a_text(size: Any) -> None:
    for door in ("python", "list", "http"):
        assert settings.checked({"size": size}, door) == {"width": 64, "height": 64}
    with pytest.raises(LdmError, match="size -64: WIDTHxHEIGHT"):
        settings.checked({"size": -64}, "list")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "0", "0: a whole number from 1 to 1000 is needed"),
        ("steps", "many", "'many': a whole number from 1 to 1000 is needed"),
        ("merge", "0.9", "0.9: a number from 0 to 0.75 is needed"),
        ("interval", "1,0", "(1.0, 0.0): two rising numbers"),
        ("rng", "dice", "'dice': ldm or diffusers is needed"),
        ("size", "big", "'big': WIDTHxHEIGHT"),
        ("margins", "0", "0: a whole number from 1 to 16384, or four, LEFT,TOP,RIGHT,BOTTOM"),
        ("margins", "8,8", "(8, 8): a whole number from 1 to 16384, or four"),
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
    if "eval" in row.closed:
        return
    with pytest.raises(LdmError) as caught:
        settings.checked(dict([evaluate_options.setting_of(f"{name}={text}")]), "eval")
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


# --- other names ------------------------------------------------------------------------------------------------------


def test_keywords_of_diffusers(pipeline: Pipeline) -> None:
    theirs = pipeline.request(
        "a cat", num_inference_steps=4, guidance_scale=3.0, negative_prompt="bad", num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(7), guidance_rescale=0.5, crops_coords_top_left=(8, 16),
        original_size=(96, 72), output_type="pil", return_dict=True, callback_on_step_end=None, latents=None,
        scheduler="DPM++ 2M Karras", height=72, width=64,
    )  # fmt: skip
    ours = pipeline.request(
        "a cat", steps=4, guidance=3.0, negative="bad", n=2, seed=7, rescale=0.5, crop=(8, 16), original_size=(96, 72),
        scheduler="dpm++2m", spacing="karras", size=(64, 72),
    )  # fmt: skip
    assert replace(theirs, reader=ours.reader) == ours
    assert pipeline.request("a cat", num_inference_steps=4, steps=4, n=None, num_images_per_prompt=1).steps == 4


def test_the_mask_and_the_refiner_of_diffusers(pipeline: Pipeline) -> None:
    white = Image.new("L", (64, 64), 255)
    request = pipeline.request("a cat", image=white.convert("RGB"), mask_image=white)
    assert request.task == "inpaint" and request.mask is not None
    refined = Pipeline(pipeline.model, refiner=tiny.model("sdxl-refiner", shallow=True))
    assert refined.request("a cat", denoising_end=0.8, steps=10).end == 0.8


@pytest.mark.parametrize("row", [row for row in SETTINGS if row.names], ids=lambda row: row.name)
def test_every_other_name_is_accepted(row: Setting) -> None:
    text, value = EXAMPLES[row.name]
    for name in set(row.names) - TRANSLATED.keys():
        assert settings.checked({name: value}, "python") == settings.checked({row.name: value}, "python")
        if "shell" not in row.closed and row.name != "prompt":
            assert settings.parsed({name: text}, at("shell")) == settings.parsed({row.name: text}, at("shell"))
        for door in {"list", "eval"} - row.closed.keys():
            assert settings.checked({name: value}, door) == settings.checked({row.name: value}, door)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"generator": [torch.Generator().manual_seed(3), torch.Generator().manual_seed(9)]}, {"seed": (3, 9)}),
        ({"generator": torch.Generator()}, {"seed": torch.Generator().initial_seed()}),
        ({"sigmas": [9.0, 3.0, 1.0, 0.0]}, {"spacing": (9.0, 3.0, 1.0), "steps": 3}),
        ({"stop_at_clip_layer": -2}, {"clip_skip": 1}),
        ({"CLIP_stop_at_last_layers": 2}, {"clip_skip": 1}),
        ({"use_karras_sigmas": True}, {"spacing": "karras"}),
        ({"use_karras_sigmas": False}, {}),
        ({"scheduler": "k_euler_a", "spacing": "SGM Uniform"}, {"scheduler": "euler-a", "spacing": "trailing"}),
        ({"sampler": "DPM++ 2M Karras", "schedule_type": "Karras"}, {"scheduler": "dpm++2m", "spacing": "karras"}),
    ],
)
def test_what_means_something_else_is_translated(given: dict[str, Any], values: dict[str, Any]) -> None:
    assert settings.checked(given, "python") == values


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 3}, "setting num_steps is not known; did you mean steps (num_inference_steps)?"),
        ({"guidance_sclae": 3}, "did you mean guidance (guidance_scale)?"),
        ({"steps": 3, "num_inference_steps": 5}, "steps 3 and num_inference_steps 5 are one setting; give one of them"),
        ({"num_inference_steps": 0}, "steps 0: a whole number"),
        ({"output_type": "latent"}, "output_type 'latent': give output='latents'"),
        ({"output_type": "np"}, "output_type 'np': images are PIL images; numpy.asarray(image)"),
        ({"return_dict": False}, "return_dict False: a Result is returned; its images are result.images"),
        ({"callback_on_step_end": print}, "callback_on_step_end: give on_step="),
        ({"denoising_start": 0.8}, "denoising_start: the refiner takes over within one call"),
        ({"batch_size": 4}, "batch_size: give n, the images of each prompt, or batch"),
        ({"prompt_embeds": torch.zeros(1)}, "prompt_embeds: prompts are encoded here"),
        (
            {"scheduler": "DPM++ 2M Karras", "spacing": "beta"},
            "has the spacing karras, and spacing 'beta' is given",
        ),
        ({"scheduler": "karras"}, "give spacing=karras"),
    ],
)
def test_what_cannot_be_translated_is_answered(given: dict[str, Any], message: str, pipeline: Pipeline) -> None:
    with pytest.raises(LdmError) as caught:
        pipeline("a cat", **given)
    assert message in str(caught.value)


def test_a_generator_is_taken_once(pipeline: Pipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    made = pipeline("a cat", generator=generator, steps=1)
    assert made.settings[0]["seed"] == 5
    with pytest.raises(LdmError, match="generator: numbers were drawn from it already"):
        pipeline("a cat", generator=generator, steps=1)


def test_arguments_of_loading_in_diffusers(models: Path) -> None:
    made = Pipeline(
        pretrained_model_name_or_path=models / "sd15", torch_dtype=torch.float32, device="cpu", safety_checker=None,
        use_safetensors=True,
    )  # fmt: skip
    assert made.model.dtype == torch.float32
    for given, message in (
        ({"dtype": torch.float32, "torch_dtype": torch.float16}, "are one setting"),
        ({"torch_dtyp": torch.float16}, "did you mean dtype (torch_dtype)?"),
        ({"vae": "x"}, "vae: name a file or folder: components="),
    ):
        with pytest.raises(LdmError) as caught:
            Pipeline(models / "sd15", **given)
        assert message in str(caught.value)


def test_settings_of_an_evaluation_by_other_names() -> None:
    found = evaluate_options.settings_of(
        ["num_inference_steps=3", "guidance-scale=2", "sampler=Euler a", "torch_dtype=fp32"]
    )
    assert found == {"steps": 3, "guidance": 2, "scheduler": "Euler a", "dtype": "fp32"}
    assert evaluate_options.sweep_of("cfg_scale=1,3") == ("guidance", (1, 3))
    with pytest.raises(LdmError, match="--with steps 3 and --with num_inference_steps 5 are one setting"):
        evaluate_options.settings_of(["steps=3", "num_inference_steps=5"])
    with pytest.raises(LdmError, match="its values mean something else here; give those of clip_skip"):
        evaluate_options.sweep_of("stop_at_clip_layer=-1,-2")


def test_a_record_tells_an_object_from_a_name(pipeline: Pipeline) -> None:
    """An object's options are not recorded, so that its class does not suffice to make the image again."""
    request = pipeline.request("a cat", scheduler=EulerDiscreteScheduler(), steps=2)
    (record,) = records(request, pipeline.model.family)
    assert record["scheduler"] == "EulerDiscreteScheduler object"
    with pytest.raises(LdmError, match="scheduler 'EulerDiscreteScheduler object' is not known"):
        pipeline.request("a cat", scheduler=record["scheduler"])
