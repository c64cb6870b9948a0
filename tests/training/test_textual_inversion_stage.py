"""The stage `textual-inversion`: what is trained, beside diffusers; its files; after any stop; bad input."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import runs
import torch
from PIL import Image
from rounding import RUN, near
from runs import DEEP, check_golden, interrupted, lines, losses, on_top, whole_and_parts
from runs import _fresh_accelerator as _fresh_accelerator
from safetensors.torch import load_file

from ldm.cli.train import make_images
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.textual_inversion import tables
from ldm.training.config import Config
from ldm.training.evaluator import weights_digest
from ldm.training.loop import Training
from ldm.training.run import train
from ldm.training.stages.sections import embedding_name
from ldm.training.stages.textual_inversion import TextualInversionStage
from ldm.training.stages.textual_inversion_file import write
from ldm.weights.embeddings import open_embedding
from ldm.weights.tensors import LINEAGE, read_header
from pipelines import Pipeline

NAME = "textual-inversion"
INVERSION = [
    "stages=[textual-inversion]", "data.trigger=<sks>", *(f"{NAME}.{row}" for row in (
        "words={<sks>: {vectors: 2, initial: red}}", "steps=6", "batch=8", "sizes=[{size: 32}]", "log_every=1",
        "save_every=3", "validate_every=6", "preview_every=100", "optimizer.learning_rate=1e-2",
    )),
]  # fmt: skip
PIVOTAL = [f"{NAME}.{row}" for row in (
    "pivotal=true", "train_text=true", "text_learning_rate=[1e-3]", "adapter_learning_rate=2e-3", "rank=2",
    "dtype=fp32",
)]  # fmt: skip
XL = [
    "model.family=sdxl",
    "model.text=[{width: 32, layers: 2, heads: 2, hidden: 32, vocab_size: 600, context: 16},"
    " {width: 48, layers: 2, heads: 2, hidden: 32, vocab_size: 600, context: 16, projection: 24}]",
    "model.unet={channels: [16, 32], depth: [0, 1], mid_depth: 1, heads: [2, 2], groups: 8, text_dim: 80, layers: 1,"
    " sample_size: 8, pooled_dim: 24, size_dim: 8}",
]  # fmt: skip


SD2 = ["model.family=sd2"]  # OpenCLIP's encoder: its padding, its last layer but one


def settings(shapes: Path, output: Path, *overrides: str) -> Config:
    return on_top(shapes, output, INVERSION, *overrides)


def ready(chosen: Config) -> tuple[TextualInversionStage, Training]:
    """The stage, ready to train."""
    training = runs.ready(chosen)
    assert isinstance(training.stage, TextualInversionStage)
    return training.stage, training


def weights(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": one.detach().clone()
        for part, network in model.modules().items()
        for name, one in network.named_parameters()
    }


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], SD2, XL, PIVOTAL], ids=["sd15", "sd2", "sdxl", "pivotal"])
def test_the_model_stays_and_the_files_hold_what_is_learned(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    """The files give the images in a pipeline that the stage shows."""
    chosen = settings(shapes, tmp_path / "r", *extra)
    stage, training = ready(chosen)
    before, words = weights(stage.model), {name: rows.detach().clone() for name, rows in stage.words.vectors.items()}
    training.run()
    after = weights(stage.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], one) for name, one in after.items())
    assert not any(one.requires_grad for network in stage.model.modules().values() for one in network.parameters())
    assert all((rows - words[name]).abs().max() > 1e-3 for name, rows in stage.words.vectors.items())
    train(chosen)  # resumes at the end and writes
    result = tmp_path / "r" / NAME
    embedding = result / "embeddings" / "_sks_.safetensors"
    assert open_embedding(embedding).names == ("_sks_", "<sks>")
    adapters = {"adapters": str(result / "adapter.safetensors")} if extra == PIVOTAL else {}
    call = {"steps": 2, "seed": 1, "output": "latents", "width": 32, "height": 32, "prompt": "a photo of <sks>"}
    kept: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "quick": False}
    shown = Pipeline(stage.shown(), **kept)(**call).latents[0]
    used = Pipeline(stage.model, embeddings=embedding, **kept)(**call, **adapters).latents[0]
    plain = Pipeline(stage.model, **kept)(**call).latents[0]
    assert torch.allclose(shown, used, atol=1e-4)
    assert not torch.allclose(shown, plain, atol=1e-3)


def test_it_learns(shapes: Path, tmp_path: Path) -> None:
    """The random model's loss on held-out images falls with four vectors alone."""
    chosen = settings(
        shapes, tmp_path / "r", DEEP, f"{NAME}.words={{<sks>: {{vectors: 4}}}}", f"{NAME}.steps=15",
        f"{NAME}.log_every=60", f"{NAME}.validate_every=5", f"{NAME}.optimizer.learning_rate=0.1",
    )  # fmt: skip
    train(chosen)
    curve = [row["validation/loss"] for row in lines(tmp_path / "r", NAME) if "validation/loss" in row]
    assert len(curve) == 3 and curve == sorted(curve, reverse=True)


@pytest.mark.parametrize("extra", [[], SD2, XL], ids=["sd15", "sd2", "sdxl"])
def test_the_loss_and_the_gradients_are_those_of_diffusers(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    """One step of textual_inversion.py and textual_inversion_sdxl.py: new rows of transformers' tables."""
    stage, training = ready(settings(shapes, tmp_path / "r", *extra, f"{NAME}.templates=['a photo of {{}}']"))
    stage.model.save_pretrained(tmp_path / "model")
    batch = next(training.batches(0))[0]
    loss = next(iter(stage.losses(batch, 0)))
    loss.values.mean().backward()
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    kind = diffusers.StableDiffusionXLPipeline if extra == XL else diffusers.StableDiffusionPipeline
    their = kind.from_pretrained(tmp_path / "model")
    captions = [caption.replace("<sks>", "<sks> <sks_1>") for caption in stage.told(batch).captions]
    found, texts, pooled = [], [], None
    for component, rows in stage.words.vectors.items():
        encoder = getattr(their, component)
        tokenizer = getattr(their, component.replace("text_encoder", "tokenizer"))
        tokenizer.add_tokens(["<sks>", "<sks_1>"])
        encoder.resize_token_embeddings(encoder.config.vocab_size + 2, mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        new = tokenizer.convert_tokens_to_ids(["<sks>", "<sks_1>"])
        table.data[encoder.config.vocab_size - 2 :] = 0
        table.data[new] = rows.detach()
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        texts.append(out.hidden_states[-2] if extra == XL else out[0])
        pooled = out[0] if extra == XL else None
        found.append((rows, table, new))
    more: dict[str, Any] = {}
    if extra == XL:
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": batch.size}
    noisy = stage.loss.noisy(latents, draw)
    prediction = their.unet(noisy, draw.timestep, torch.cat(texts, dim=-1), **more).sample
    theirs = (prediction - draw.noise).square().mean()
    theirs.backward()
    assert loss.values.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    for rows, table, new in found:
        assert rows.grad is not None and rows.grad.abs().max() > 1e-6
        assert torch.allclose(rows.grad, table.grad[new], rtol=1e-3, atol=1e-7)


def test_vectors_begin_with_words_or_with_the_spread_of_all(shapes: Path, tmp_path: Path) -> None:
    words = "{<a>: {vectors: 3, initial: red}, <b>: {initial: a red}, <c>: {}, <d>: {vectors: 10}}"
    captions = tmp_path / "captions"
    captions.mkdir()
    for number, word in enumerate(("<a>, <b>", "<C> and <d>")):
        Image.new("RGB", (32, 32)).save(captions / f"{number}.png")
        (captions / f"{number}.txt").write_text(word)
    stage, _ = ready(settings(captions, tmp_path / "r", f"{NAME}.words={words}", "data.trigger=''", "data.holdout=0",
                              f"{NAME}.batch=2"))  # fmt: skip
    (table,), (tokenizer,) = tables(stage.model.text_encoders), stage.model.text_encoders.tokenizers
    ids = tokenizer.encode(["red", "a red"])
    vectors = [word.vectors[0] for word in stage.words.learned()]
    count = max(3, len(ids[0]))
    assert torch.equal(vectors[0], table.weight[[ids[0][n % len(ids[0])] for n in range(count)]])
    assert torch.equal(vectors[1], table.weight[ids[1]])
    assert [len(rows) for rows in vectors] == [count, len(ids[1]), 1, 10]
    assert float(vectors[3].std()) == pytest.approx(float(table.weight.std()), rel=0.2)


def test_rates_and_norms(shapes: Path, tmp_path: Path) -> None:
    chosen = settings(shapes, tmp_path / "r", *PIVOTAL, f"{NAME}.keep_norm=true", f"{NAME}.up_rate=4")
    stage, training = ready(chosen)
    (player,) = stage.players.values()
    rates = {group["highest"]: group["weight_decay"] for group in player.optimizer.param_groups}
    assert rates == {2e-3: 0.01, 8e-3: 0.01, 1e-3: 0.01, 4e-3: 0.01, 1e-2: 0.0}
    (rows,) = stage.words.vectors.values()
    before = rows.detach().clone()
    training.run()
    assert torch.allclose(rows.norm(dim=1), before.norm(dim=1), rtol=1e-5)
    assert not torch.allclose(rows, before, atol=1e-3)


def test_captions_that_are_a_word_alone_get_sentences(shapes: Path, tmp_path: Path) -> None:
    stage, training = ready(settings(shapes, tmp_path / "r"))
    batch = next(training.batches(0))[0]
    captions = ["<SKS>", "<sks>, a red circle", *["<sks>"] * 6]
    told = stage.told(replace(batch, captions=captions)).captions
    assert told[1] == "<sks>, a red circle"
    assert len(set(told)) > 3 and all("<sks>" in caption.lower() for caption in told)
    assert stage.told(batch).captions == batch.captions


# --- it goes on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [["data.cache=true", "data.crops=2", f"{NAME}.ema.decay=0.9", f"{NAME}.keep_norm=true"],
     [*PIVOTAL, f"{NAME}.rank_dropout=0.3", f"{NAME}.checkpointing=true"]],
    ids=["cached", "pivotal"],
)  # fmt: skip
def test_an_interrupted_run_ends_in_the_same_bytes(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    whole, parts = whole_and_parts(lambda output: settings(shapes, output, *extra), tmp_path)
    files = [path.relative_to(whole) for path in (whole / NAME).rglob("*.safetensors") if "step-" not in str(path)]
    assert len(files) == (4 if extra[0] == PIVOTAL[0] else 2)
    assert all((parts / file).read_bytes() == (whole / file).read_bytes() for file in files)
    (saved, *_) = (parts / NAME / "checkpoints").glob("*/model.safetensors")
    assert all(name.startswith(("vectors.", "norms_", "adapter.changes.")) for name in load_file(saved))


def test_it_starts_from_the_model_as_it_was_before_an_adapter(shapes: Path, tmp_path: Path) -> None:
    """In one go, or continued after the adapter, which held the model in 8 bits."""
    (tmp_path / "parts").mkdir()
    whole, parts = tmp_path / "style", tmp_path / "parts" / "style"
    small = [*PIVOTAL, *(f"adapter.{row}" for row in (
        "steps=1", "batch=2", "sizes=[{size: 32}]", "quantize=int8-weights", "layers=[transformers]",
    ))]  # fmt: skip
    both = f"stages=[adapter,{NAME}]"
    train(settings(shapes, whole, *small, both))
    train(settings(shapes, parts, *small, "stages=[adapter]"))
    train(settings(shapes, parts, *small, both))
    file = Path(NAME) / "adapter.safetensors"
    assert load_file(whole / file).keys() == load_file(parts / file).keys()
    assert lines(whole, NAME) == lines(parts, NAME)
    lineage = json.loads(read_header(whole / file)[1][LINEAGE])
    assert lineage["parents"] == ["sd15"]


def test_the_loss_curve_is_the_golden_one(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "r", *PIVOTAL, DEEP, f"{NAME}.rank_dropout=0.3", f"{NAME}.min_snr=5"))
    check_golden(NAME, losses(tmp_path / "r", NAME))


def test_other_words_are_refused(shapes: Path, tmp_path: Path) -> None:
    interrupted(settings(shapes, tmp_path / "r"), after=5)
    with pytest.raises(LdmError, match=r"textual-inversion.words is .*<a>.*, not .*<sks>"):
        train(settings(shapes, tmp_path / "r", f"{NAME}.words={{<a>: {{vectors: 2}}}}", "data.trigger=<a>"))


# --- files, previews --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], XL], ids=["sd15", "sdxl"])
def test_the_files_open_in_diffusers_with_the_same_image(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    stage, _ = ready(settings(shapes, tmp_path / "r", *extra))
    with torch.no_grad():
        for rows in stage.words.vectors.values():
            rows.add_(torch.randn_like(rows))
    write(stage, tmp_path, "{}")
    stage.model.save_pretrained(tmp_path / "model")
    kind = diffusers.StableDiffusionXLPipeline if extra == XL else diffusers.StableDiffusionPipeline
    their = kind.from_pretrained(tmp_path / "model")
    their.set_progress_bar_config(disable=True)
    file = tmp_path / "embeddings" / "_sks_.safetensors"
    if extra:
        pair = load_file(file)
        their.load_textual_inversion(
            pair["clip_l"], token="<sks>", text_encoder=their.text_encoder, tokenizer=their.tokenizer
        )
        their.load_textual_inversion(
            pair["clip_g"], token="<sks>", text_encoder=their.text_encoder_2, tokenizer=their.tokenizer_2
        )
    else:
        their.load_textual_inversion(str(tmp_path / "diffusers-embeddings" / "_sks_.safetensors"))
        assert torch.equal(load_file(file)["emb_params"], stage.words.vectors["text_encoder"].detach())
    made = their(
        "a <sks> dog", num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(3),
        output_type="latent", width=64, height=64,
    ).images  # fmt: skip
    ours = Pipeline(tmp_path / "model", dtype=torch.float32, device="cpu", quick=False, embeddings=file)(
        "a <sks> dog", steps=3, seed=3, guidance=5.0, rng="diffusers", output="latents", width=64, height=64
    )
    near(torch.stack(ours.latents), made, RUN)


def test_the_header_says_how_it_was_trained(shapes: Path, tmp_path: Path) -> None:
    train(settings(shapes, tmp_path / "r"))
    metadata = read_header(tmp_path / "r" / NAME / "embeddings" / "_sks_.safetensors")[1]
    assert (metadata["name"], metadata["step"]) == ("<sks>", "6")
    lineage = json.loads(metadata[LINEAGE])
    assert (lineage["stage"], lineage["steps"], lineage["parents"]) == (NAME, 6, ["sd15"])


def test_previews_and_16_bits(shapes: Path, tmp_path: Path) -> None:
    more = ["precision=bf16", f"{NAME}.preview_every=6", f"{NAME}.prompts=[a <sks>]", f"{NAME}.checkpointing=true"]
    train(settings(shapes, tmp_path / "r", *PIVOTAL, *more), make_images)
    assert Image.open(tmp_path / "r" / NAME / "previews" / "step-00000006.png").size[0] >= 32


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("words={}", "at least 1 item"),
        ("words={'<>': {}}", "a word has from 1 to 100 letters and digits"),
        ("words={'<a>': {}, '{a}': {}}", "several words are called _a_"),
        ("words={<sks>: {vector: 3}}", "words.<sks>.vector is not known; did you mean vectors?"),
        ("words={<sks>: {initial: extraordinary, vectors: 1}}", "<sks> has 1 vectors, and its initial words"),
        ("words={<sks>: {vectors: 15}}", "<sks> has 15 vectors; a text has at most 14 tokens"),
        ("words={cat: {}}", "captions has cat; set data.trigger='cat' to put it into each"),
        ("templates=[a photo]", "write object or style, or sentences in which {} stands for the word"),
        ("rank=8", "rank belongs to an adapter, and none is trained; set pivotal=true"),
        ("train_text=true", "train_text belongs to an adapter"),
        ("adapter_learning_rate=1e-3", "no adapter is trained; set pivotal=true"),
    ],
)
def test_bad_input(shapes: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(LdmError) as caught:
        train(settings(shapes, tmp_path / "r", f"{NAME}.{override}"))
    assert message in str(caught.value)


def test_captions_that_teach_nothing_are_counted(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ready(settings(shapes, tmp_path / "r", "data.trigger=''", f"{NAME}.words={{circle: {{}}}}"))
    assert "3 of 6 captions have none of the new words (circle): they teach nothing" in caplog.text


def test_words_that_are_cut(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A text has 14 tokens here."""
    ten = [f"{NAME}.words={{<sks>: {{vectors: 10}}}}"]
    with caplog.at_level(logging.WARNING):
        ready(settings(shapes, tmp_path / "r", *ten))
    assert "too long: of the new words" not in caplog.text
    (folder := tmp_path / "late").mkdir()
    for number, caption in enumerate(("a big red circle on white, <sks>", "<sks>", "<sks>, a circle")):
        Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    late = ["data.trigger=''", "data.holdout=0", f"{NAME}.batch=2", f"{NAME}.templates=[]", *ten]
    with caplog.at_level(logging.WARNING):
        ready(settings(folder, tmp_path / "s", *late))
    assert "1 of 3 captions are too long: of the new words (<sks>) in them, some are cut" in caplog.text
    with pytest.raises(LdmError, match="<sks> has 14 vectors, and no caption is read to the end of it"):
        ready(settings(shapes, tmp_path / "t", f"{NAME}.words={{<sks>: {{vectors: 14}}}}", "data.trigger=a <sks>"))


def test_digests_tell_vectors_apart(shapes: Path, tmp_path: Path) -> None:
    stage, _ = ready(settings(shapes, tmp_path / "r"))
    before = weights_digest(stage.shown())
    assert weights_digest(stage.shown()) == before
    with torch.no_grad():
        stage.words.vectors["text_encoder"][0, 0] += 0.1
    assert weights_digest(stage.shown()) != before


def test_names_of_files() -> None:
    assert [embedding_name(word) for word in ("<Cat-Toy>", "../a/b", "sks  Dog", "größe")] == [
        "_cat-toy_", "_._a_b", "sks dog", "größe",
    ]  # fmt: skip
