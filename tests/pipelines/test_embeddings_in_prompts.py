"""Embeddings of textual inversion in pipelines and commands: diffusers' numbers, records, folders, wrong files."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import adapter_files
import diffusers
import pytest
import tiny
import torch
from commands import run
from networks import distance
from PIL import Image
from rounding import RUN, near
from safetensors.torch import save_file

from ldm.cli import evaluate
from ldm.cli.evaluate_options import settings_of
from ldm.errors import LdmError
from ldm.evaluation.plan import EvaluationPlan
from ldm.images import read_settings, save_png
from pipelines import Pipeline
from pipelines.a1111 import embeddings_of

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
L, G = (torch.randn(3, width, generator=torch.Generator().manual_seed(width)) for width in (32, 48))
STEPS = {"steps": 3, "seed": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of embeddings."""
    folder = tmp_path_factory.mktemp("embeddings")
    torch.save({"string_to_param": {"*": L}, "name": "old name"}, folder / "style.pt")
    save_file({"<cat-toy>": L.flip(0)}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": L[:1] * 2}, folder / "Bad-Hands.safetensors")
    save_file({"clip_l": L, "clip_g": G}, folder / "xl.safetensors")
    return folder


def reference(folder: Path, kind: str) -> Any:
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(pipeline: Pipeline, prompt: str, negative: str) -> torch.Tensor:
    made = pipeline(prompt, negative=negative, guidance=5.0, rng="diffusers", weights=False, output="latents", **STEPS)
    return torch.stack(made.latents)


def theirs(pipeline: Any, prompt: str, negative: str) -> torch.Tensor:
    return pipeline(
        prompt, negative_prompt=negative, num_inference_steps=3,
        guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="latent", width=64, height=64,
    ).images  # fmt: skip


def test_the_numbers_of_diffusers(models: Path, files: Path) -> None:
    their = reference(models / "sd15", "StableDiffusionPipeline")
    their.load_textual_inversion(str(files), weight_name="style.pt", token="style")
    their.load_textual_inversion(str(files / "learned_embeds.safetensors"))
    pipeline = Pipeline(
        models / "sd15", dtype=torch.float32, device="cpu", quick=False, allow_pickle=True,
        embeddings=[files / "style.pt", files / "learned_embeds.safetensors"],
    )  # fmt: skip
    prompt, negative = "a <cat-toy>, in style of red", "style"
    near(ours(pipeline, prompt, negative), theirs(their, prompt, negative), RUN)


def test_the_numbers_of_diffusers_on_sdxl(models: Path, files: Path) -> None:
    their = reference(models / "sdxl", "StableDiffusionXLPipeline")
    their.load_textual_inversion(L, token="xl", text_encoder=their.text_encoder, tokenizer=their.tokenizer)
    their.load_textual_inversion(G, token="xl", text_encoder=their.text_encoder_2, tokenizer=their.tokenizer_2)
    pipeline = Pipeline(
        models / "sdxl", dtype=torch.float32, device="cpu", quick=False, embeddings=str(files / "xl.safetensors")
    )
    near(ours(pipeline, "a red xl", "xl, bad"), theirs(their, "a red xl", "xl, bad"), RUN)


def test_a_model_that_is_loaded_stays_as_it_is(files: Path) -> None:
    model, refiner = tiny.model("sdxl", shallow=True), tiny.model("sdxl-refiner", shallow=True)
    pipeline = Pipeline(model, refiner=refiner, embeddings=[files / "xl.safetensors"])
    assert pipeline.model.unet is model.unet and pipeline.model.fingerprint() == model.fingerprint()
    given = {"refiner_at": 0.5, "output": "latents", **STEPS}
    with_it, plain = (one("an XL", **given) for one in (pipeline, Pipeline(model, refiner=refiner)))
    assert not torch.equal(with_it.latents[0], plain.latents[0])
    assert with_it.settings[0]["embeddings"][0]["name"] == "xl" and "embeddings" not in plain.settings[0]


def test_on_an_offloaded_model(models: Path, files: Path) -> None:
    made = [
        Pipeline(
            models / "sdxl", refiner=models / "sdxl-refiner", dtype=torch.float32, device="cpu", offload=offload,
            embeddings=files / "xl.safetensors",
        )("an xl", refiner_at=0.5, output="latents", **STEPS)
        for offload in ("none", "components")
    ]  # fmt: skip
    assert distance(made[0].latents[0], made[1].latents[0]) < 1e-5
    assert made[0].settings == made[1].settings and made[0].settings[0]["embeddings"]


def test_beside_a_lora_of_the_text_encoders(tmp_path: Path) -> None:
    model = tiny.model("sdxl", shallow=True)
    file = adapter_files.saved(adapter_files.adapter(model, "kohya-sgm"), tmp_path / "lora.safetensors")
    tables = (model.text_encoders.towers[0], model.text_encoders.towers[1].text_model)
    (token,) = model.text_encoders.tokenizers[0].encode(["love"])[0]
    first, second = (table.embeddings.token_embedding.weight[token].detach().clone() for table in tables)
    save_file({"clip_l": first, "clip_g": second}, tmp_path / "word.safetensors")
    pipeline = Pipeline(model, embeddings=tmp_path / "word.safetensors", adapters={file: 0.7})
    ours, theirs = (pipeline(f"a {word} cat", output="latents", **STEPS) for word in ("Word", "love"))
    assert torch.equal(ours.latents[0], theirs.latents[0])
    plain = Pipeline(model, embeddings=tmp_path / "word.safetensors")("a word cat", output="latents", **STEPS)
    assert not torch.equal(plain.latents[0], ours.latents[0])
    assert ours.settings[0]["embeddings"] == plain.settings[0]["embeddings"]


def test_an_embedding_is_no_model(files: Path) -> None:
    with pytest.raises(LdmError, match=r"it is an embedding of textual inversion \(--embedding"):
        Pipeline(files / "xl.safetensors")


def test_a_folder_without_what_does_not_fit(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline = Pipeline(tiny.model("sd15", shallow=True), embeddings=files)
    assert [one.names for one in pipeline.embeddings] == [("Bad-Hands",), ("<cat-toy>",)]
    assert "2 embeddings are left out" in caplog.text and "style.pt is a pickle" in caplog.text
    assert "xl.safetensors is for text encoders with 32 and 48 channels" in caplog.text
    made = pipeline(["a <cat-toy>", "a cat"], negative="(bad-hands:1.2)", **STEPS)
    names = [[one["name"] for one in record["embeddings"]] for record in made.settings]
    assert names == [["Bad-Hands", "<cat-toy>"], ["Bad-Hands"]]
    caplog.clear()
    pipeline("embedding:bad-hands, embedding:worse", **STEPS)
    assert [record.getMessage() for record in caplog.records] == [
        "prompt syntax of other programs, which is read as plain words here: embedding:worse"
    ]
    assert "embeddings" not in pipeline("a cat", guidance=1, negative="bad-hands", **STEPS).settings[0]


def test_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, word, content in (("a", "word", L), ("b", "word", G), ("sub/A", "other", L), ("sub/c", "x", L * 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"string_to_param": {"*": content[:, :32]}, "name": word}, tmp_path / f"{name}.pt")
    with caplog.at_level(logging.WARNING):
        pipeline = Pipeline(tiny.model("sd15", shallow=True), embeddings=tmp_path, allow_pickle=True)
    assert [one.names for one in pipeline.embeddings] == [("a",), ("b",), ("c", "x")]
    assert "both called A; rename one" in caplog.text and "use the names of their files: word" in caplog.text
    with pytest.raises(LdmError, match="are both called b; rename one of them"):
        (tmp_path / "more").mkdir()
        save_file({"emb_params": L}, tmp_path / "more" / "b.safetensors")
        paths = [tmp_path / "b.pt", tmp_path / "more" / "b.safetensors"]
        Pipeline(tiny.model("sd15", shallow=True), embeddings=paths, allow_pickle=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "embeddings 7: a path, or a list of them, is needed"),
        ("", "embeddings ('',): a path, or a list of them, is needed"),
        ("gone.pt", "gone.pt cannot be read: No such file"),
    ],
)
def test_wrong_input(given: Any, message: str) -> None:
    with pytest.raises(LdmError) as error:
        Pipeline(tiny.model("sd15", shallow=True), embeddings=given)
    assert message in str(error.value)


def test_the_command(
    models: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    own = Path("own.safetensors")
    own.write_bytes((files / "Bad-Hands.safetensors").read_bytes())
    model = ["--model", models / "sd15", "--dtype", "fp32", "--device", "cpu"]
    options = [*model, "--steps", 2, "--seed", 1, "--embedding", own, "--embedding-dir", files]
    code, out, err = run(capsys, monkeypatch, "generate", "an OWN cat", "--negative", "<cat-toy>", *options)
    assert code == 0 and "2 embeddings are left out" in caplog.text, err
    record, parameters = read_settings(Path(out.strip()))
    digests = {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in ("Bad-Hands.safetensors",)}
    assert record is not None
    assert record["embeddings"][0] == {
        "name": "own", "path": str(own.absolute()), "sha256": digests["Bad-Hands.safetensors"],
    }  # fmt: skip
    assert [one["name"] for one in record["embeddings"]] == ["own", "<cat-toy>"]
    assert f'TI hashes: "own: {record["embeddings"][0]["sha256"][:12]}, <cat-toy>: ' in parameters
    assert embeddings_of(parameters).keys() == {"own", "<cat-toy>"}
    assert run(capsys, monkeypatch, "repro", out.strip(), "--device", "cpu")[1].startswith("identical")
    own.rename("moved.safetensors")
    code, _, err = run(capsys, monkeypatch, "repro", out.strip(), "--device", "cpu")
    assert code == 1 and "own.safetensors, is gone or has changed; name it (--embedding)" in err
    code, _, err = run(capsys, monkeypatch, "repro", out.strip(), "--device", "cpu", "--embedding", files)
    assert code == 1 and "was made with an embedding called own" in err  # the same vectors by another name
    Path("elsewhere").mkdir()
    Path("moved.safetensors").rename("elsewhere/own.safetensors")
    again = ["repro", out.strip(), "--device", "cpu", "--embedding", "elsewhere", "--embedding", files]
    assert run(capsys, monkeypatch, *again)[1].startswith("identical")
    save_png(Image.open(out.strip()), Path("a1111.png"), None, parameters)
    again[1:2] = ["a1111.png", "--model", models / "sd15", "--dtype", "fp32"]
    assert run(capsys, monkeypatch, *again)[1].startswith("identical")
    code, _, err = run(capsys, monkeypatch, *again[:-4])
    assert code == 1 and "was made with an embedding called own" in err


def test_a_list_in_a_dry_run_and_in_an_evaluation(
    models: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\na bad-hands\n")
    model = ["--model", models / "sdxl", "--prompts", "p.txt", "--dry-run"]
    assert run(capsys, monkeypatch, "generate", *model, "--embedding", files / "xl.safetensors")[0] == 0
    code, _, err = run(capsys, monkeypatch, "generate", *model, "--embedding", files / "Bad-Hands.safetensors")
    assert code == 1 and "belongs to models of another family" in err
    Path("p.jsonl").write_text('{"prompt": "a cat", "embeddings": "x.pt"}')
    code, _, err = run(capsys, monkeypatch, "generate", "--model", models / "sdxl", "--prompts", "p.jsonl")
    assert (code == 1 and "embeddings is not known" in err) or "one model makes the whole list" in err
    settings = settings_of([f"embeddings={files / 'xl.safetensors'}"])
    evaluate._model(str(models / "sdxl"), settings, "cpu", EvaluationPlan(metrics=()))
