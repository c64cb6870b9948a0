"""The stage `text`: its loss, what it learns, that its layout over processes does not matter, and what it writes."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import transformers
from accelerate import Accelerator
from launched import on_two
from open_clip.loss import ClipLoss
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ldm import LatentDiffusion
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.images import to_tensor
from ldm.training.config import load
from ldm.training.forecast import forecast
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.run import train
from ldm.training.stages.text import ContrastiveStage, compare, retrieval
from ldm.weights.components import fingerprint
from ldm.weights.contrastive import load_clip

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
COLOURS |= {"black": (10, 10, 10), "purple": (140, 40, 160)}
SHAPES = {"circle": 40, "square": 4, "triangle": 3}  # corners
SETTINGS = (
    "stages=[text]", "data.buckets=false", "data.bucket_step=8", "data.workers=0", "data.holdout=40", "trackers=[]",
    "text.sizes=[{size: 32}]", "text.patch=8", "text.image_width=64", "text.image_layers=2", "text.image_heads=4",
    "text.batch=16", "text.ema.decay=0.9", "text.optimizer.learning_rate=1e-3",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def on_one_core() -> Any:
    """More threads only hinder networks as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images for each of 18 captions: the shape's place, size and background differ."""
    folder, draw = tmp_path_factory.mktemp("images"), random.Random(0)
    for colour, rgb in COLOURS.items():
        for shape, corners in SHAPES.items():
            for number in range(16):
                grey = draw.randrange(120, 256)
                image = Image.new("RGB", (32, 32), (grey, grey, grey))
                circle = (16 + draw.randrange(-4, 5), 16 + draw.randrange(-4, 5), draw.randrange(8, 12))
                ImageDraw.Draw(image).regular_polygon(circle, corners, draw.randrange(0, 20), fill=rgb)
                image.save(folder / f"{colour}-{shape}-{number}.png")
                (folder / f"{colour}-{shape}-{number}.txt").write_text(f"a {colour} {shape}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family."""
    folder = tmp_path_factory.mktemp("models")

    def of(family: str) -> Path:
        if not (folder / family).exists():
            tiny.model(family, shallow=True).save_pretrained(folder / family)
        return folder / family

    return of


def settings(model: Path, images: Path, output: Path, *more: str) -> list[str]:
    return [f"model.source={model}", f"data.source={images}", f"output={output}", *SETTINGS, *more]


def run(model: Path, images: Path, output: Path, *more: str) -> dict[int, dict[str, float]]:
    """Train, and the log by step."""
    log: dict[int, dict[str, float]] = {}
    train(
        load(None, settings(model, images, output, *more)),
        report=lambda stage, step, steps, figures: log.setdefault(step, {}).update(figures),
    )
    return log


@pytest.fixture(scope="module")
def trained(
    models: Callable[[str], Path], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, dict[str, float]]]:
    """A run with two text encoders, one of them with a projection; and its log."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "text", run(models("sdxl"), images, folder, "text.steps=80")


# --- the loss ---------------------------------------------------------------------------------------------------------


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1)


def test_the_loss_is_that_of_open_clip() -> None:
    images, texts, scale = unit(6, 8), unit(6, 8), torch.tensor(9.0)
    nothing_else = torch.eye(6, dtype=torch.bool)
    loss, hits = compare(images, texts, scale, nothing_else, images, texts, 0)
    torch.testing.assert_close(loss, ClipLoss()(images, texts, scale))
    near = images @ texts.T
    found = sum(near[i].argmax() == i for i in range(6)) + sum(near[:, i].argmax() == i for i in range(6))
    assert hits.item() == pytest.approx(found / 12)
    halves = [
        compare(images[rows], texts[rows], scale, nothing_else[rows], images, texts, rows.start)[0]
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(halves) / 2, loss)


def test_pairs_with_the_same_caption_are_no_negatives() -> None:
    """Two images of one caption and one of another: worked out by hand."""
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    image = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    loss, _ = compare(image, text, torch.tensor(2.0), same, image, text, 0)

    def term(right: float, *wrong: float) -> float:
        return -math.log(math.exp(2 * right) / sum(math.exp(2 * near) for near in (right, *wrong)))

    of_images = term(1, 0) + term(0.6, 0.8) + term(1, 0, 0)  # the third meets the first caption twice
    of_texts = term(1, 0) + term(0.6, 0) + term(1, 0, 0.8)
    assert loss.item() == pytest.approx((of_images + of_texts) / 6)
    alike, hits = compare(image, text, torch.tensor(2.0), torch.ones(3, 3, dtype=torch.bool), image, text, 0)
    assert (alike.item(), hits.item()) == (0, 1)  # nothing to tell apart, and no number that is not finite


def test_a_wrong_target_that_is_as_near_counts_as_nearer() -> None:
    right = torch.eye(3, dtype=torch.bool)
    assert retrieval(torch.eye(3), torch.eye(3), right) == [1, 1]
    assert retrieval(torch.ones(3, 3), torch.ones(3, 3), right, (1, 2, 3)) == [0, 0, 1]


def test_captions_that_read_alike_and_images_that_come_twice(models: Callable[[str], Path], tmp_path: Path) -> None:
    stage = make(models("sd15"), tmp_path)
    batch = batch_of(["a red circle", "A  red circle", "a square", "a square!"], ["a", "b", "c", "c"])
    (loss,) = stage.losses(batch, 0)
    assert loss.report["negatives/text_encoder"].item() == 2  # of three others, one reads alike or is the same image


def make(model: Path, folder: Path, *more: str) -> ContrastiveStage:
    config = load(None, [*SETTINGS, *more])
    return ContrastiveStage(config.text, LatentDiffusion.from_pretrained(model), Accelerator(), 0, [(32, 32)], folder)


def batch_of(captions: list[str], keys: list[str], side: int = 32) -> Batch:
    pixels = torch.rand(len(keys), 3, side, side) * 2 - 1
    rows = torch.zeros(len(keys), 6)
    return Batch(keys, [0] * len(keys), captions, pixels, None, rows, rows[:, 0], rows[:, 0])


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_learns(trained: tuple[Path, dict[int, dict[str, float]]]) -> None:
    _, log = trained
    last = log[80]
    for name in ("text_encoder", "text_encoder_2"):
        assert last[f"validation/{name}/image_to_text_r1"] > 0.4  # chance: 1 of 16
        assert last[f"validation/{name}/text_to_image_r1"] > 0.4
        assert last[f"validation/{name}/image_to_text_r5"] >= last[f"validation/{name}/image_to_text_r1"]
        assert 13 < last[f"negatives/{name}"] < 15  # of 15 others, those with the same caption left out
    assert last["loss/pair"] < log[10]["loss/pair"] / 2


def test_only_the_pair_is_trained_and_matrices_alone_decay(models: Callable[[str], Path], tmp_path: Path) -> None:
    stage = make(models("sdxl"), tmp_path)
    (loss,) = stage.losses(batch_of(["a", "b", "c"], ["1", "2", "3"]), 0)
    loss.values.backward()
    player = stage.players["pair"]
    assert all(p.grad is not None for p in player.module.parameters())
    assert not any(p.requires_grad for part in ("unet", "autoencoder") for p in getattr(stage.model, part).parameters())
    groups = player.optimizer.param_groups
    assert [(group["weight_decay"], {p.ndim > 1 for p in group["params"]}) for group in groups] == [
        (0.01, {True}), (0.0, {False})
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(list(player.module.parameters()))


def test_the_forecast_counts_what_is_trained(models: Callable[[str], Path], images: Path, tmp_path: Path) -> None:
    (row,) = forecast(load(None, settings(models("sdxl"), images, tmp_path)))
    stage = make(models("sdxl"), tmp_path)
    assert row.trained == sum(p.numel() for p in stage.players["pair"].module.parameters())
    parts = (stage.model.unet, stage.model.autoencoder)
    assert row.frozen == sum(p.numel() for part in parts for p in part.parameters())
    tokens, patches = 77, 16  # every matrix of the encoders' layers meets every token: at least so many multiplications
    encoders = stage.players["pair"].module
    texts, encoder = (
        sum(p.numel() for name, p in part.named_parameters() if "layers" in name and p.ndim > 1)
        for part in (encoders.text_encoders, encoders.image_encoder)
    )
    assert 1 < row.flops_per_image / (6 * (tokens * texts + patches * encoder)) < 1.5


def test_the_scale_stays_below_100(models: Callable[[str], Path], tmp_path: Path) -> None:
    stage = make(models("sd15"), tmp_path)
    scales = stage.players["pair"].module.heads.log_scales
    assert scales.exp().item() == pytest.approx(1 / 0.07)
    scales.data.fill_(5)
    stage.updated(1)
    assert scales.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("side", [32, 48])
def test_recomputed_activations_give_the_same_gradients(
    models: Callable[[str], Path], tmp_path: Path, side: int
) -> None:
    gradients = []
    batch = batch_of(["a", "b", "c"], ["1", "2", "3"], side)
    for change in (lambda module: None, checkpointed):
        stage = make(models("sdxl"), tmp_path)
        change(stage.players["pair"].module)
        (loss,) = stage.losses(batch, 0)
        loss.values.backward()
        stage.model.text_encoders(batch.captions).text.square().mean().backward()  # as the U-Net's training reads them
        gradients.append([p.grad for p in stage.players["pair"].module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_out_of_memory_asks_for_a_smaller_batch(
    models: Callable[[str], Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ContrastiveStage, "losses", fail)
    with pytest.raises(LdmError, match="out of memory with 16 images of 32×32 at a time; set a smaller text.batch"):
        run(models("sd15"), images, tmp_path / "run")


def test_two_processes_are_one_with_the_same_batch(models: Callable[[str], Path], images: Path, tmp_path: Path) -> None:
    more = ["text.batch=8", "text.steps=4", "text.log_every=1", "data.holdout=9", "text.optimizer.epsilon=1e-3"]
    one = run(models("sdxl"), images, tmp_path / "one", *more)
    given = settings(models("sdxl"), images, tmp_path / "two", *more)
    (tmp_path / "two.py").write_text(
        f"from ldm.training.run import train; from ldm.training.config import load; train(load(None, {given}))"
    )
    on_two(tmp_path / "two.py")
    two = read_log(tmp_path / "two")
    timing = {"images_per_s", "waiting", "tflops"}
    for step in range(1, 5):
        assert one[step].keys() == two[step].keys()
        for name in one[step].keys() - timing:
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-4, abs=1e-5), (step, name)
    for part in ("model/text_encoder", "model/text_encoder_2", "clip/image_encoder"):
        first, second = (load_file(tmp_path / n / "text" / part / "model.safetensors") for n in ("one", "two"))
        for name in first:
            torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


def read_log(folder: Path) -> dict[int, dict[str, float]]:
    log: dict[int, dict[str, float]] = {}
    for line in (folder / "text" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        log.setdefault(row.pop("step"), {}).update(row)
    return log


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(
    models: Callable[[str], Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["text.steps=6", "text.save_every=3", "text.log_every=1", "text.batch=4"]
    given = settings(models("sd15"), images, Path("run"), *more)

    def cut(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "cut":
            with pytest.raises(KeyboardInterrupt):
                train(load(None, given), report=cut)
            assert [path.name for path in Path("run/text/checkpoints").iterdir()] == ["step-00000003"]
        train(load(None, given))
    whole, resumed = (tmp_path / name / "run" / "text" for name in ("whole", "cut"))
    for folder in ("model", "clip"):
        files = sorted(path.relative_to(whole) for path in (whole / folder).rglob("*") if path.is_file())
        assert len(files) >= 4
        for file in files:
            assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file


def test_images_of_all_shapes_at_growing_sizes(models: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, (width, height) in enumerate([(64, 64), (48, 80), (80, 48)] * 4):
        Image.new("RGB", (width, height), (20 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(f"number {number}")
    more = ["data.buckets=true", "data.holdout=3", "text.batch=2", "text.steps=6", "text.log_every=1"]
    sizes = "text.sizes=[{size: 16, steps: 2}, {size: 32}]"
    log = run(models("sd15"), tmp_path / "images", tmp_path / "run", *more, sizes)
    assert all(math.isfinite(log[step]["loss/pair"]) for step in range(1, 7))
    pair = load_clip(tmp_path / "run/text/clip", LatentDiffusion.from_pretrained(tmp_path / "run/text/model"))
    assert pair.config.size == 32


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("sdxl", "text.embed_dim=64", "embed_dim is 64, but text_encoder_2 projects to 40 channels"),
        ("sd15", "text.patch=64", "a side of 32 pixels does not divide into patches of 64; choose a patch"),
        ("sd15", "text.patch=12", "a side of 32 pixels does not divide into patches of 12"),
        ("sd15", "text.image_heads=5", "image encoder: 64 channels do not divide into 5 heads"),
        ("sd15", "text.micro_batch=4", "text.micro_batch is 4: a batch of 16 is compared as a whole"),
        ("sd15", "text.sizes=[{size: 32, micro_batch: 8}]", "text.micro_batch is 8: a batch of 16"),
        ("sd15", "text.batch=1", "text.batch is 1: a pair is compared with the others of its batch"),
        ("sd15", "data.holdout=288", "leaves none to train with"),
        ("sd15", "data.holdout=287", "1 images to train with and no two different captions"),
    ],
)
def test_what_cannot_work_is_said_before_training_starts(
    models: Callable[[str], Path], images: Path, tmp_path: Path, family: str, setting: str, message: str
) -> None:
    with pytest.raises(LdmError, match=message.replace("[", r"\[")) as caught:
        run(models(family), images, tmp_path / "run", setting)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "text" / "metrics.jsonl").exists()


# --- the result -------------------------------------------------------------------------------------------------------


def test_the_pair_is_loaded_for_evaluation(
    trained: tuple[Path, dict[int, dict[str, float]]], images: Path, models: Callable[[str], Path]
) -> None:
    folder, _ = trained
    pair = load_clip(folder / "clip", LatentDiffusion.from_pretrained(folder / "model"))
    files = sorted(images.glob("*.png"))
    pixels = to_tensor([Image.open(file) for file in files], 32, 32)
    found_images = pair.encode_images(pixels)
    texts = pair.encode_texts(captions := sorted({file.with_suffix(".txt").read_text() for file in files}))
    assert (found_images.shape, texts.shape) == ((288, 40), (18, 40))
    for vectors in (found_images, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    found = [captions[index] for index in (found_images @ texts.T).argmax(dim=1).tolist()]
    right = sum(name == file.with_suffix(".txt").read_text() for name, file in zip(found, files, strict=True))
    assert right > 150  # chance: 16; most of them were trained on

    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "clip" / "image_encoder")
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)  # CLIP's mean and deviation
    normal = processor([Image.open(file) for file in files[:4]], return_tensors="pt").pixel_values
    embeds = theirs(normal).image_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(embeds, dim=1), found_images[:4], atol=1e-5, rtol=1e-4)

    with pytest.raises(LdmError, match="a side of 36 pixels does not divide into patches of 8"):
        pair.encode_images(torch.zeros(1, 3, 32, 36))
    with pytest.raises(LdmError, match="was trained with other text encoders"):
        load_clip(folder / "clip", LatentDiffusion.from_pretrained(models("sdxl")))
    with pytest.raises(LdmError, match=r"holds no contrastive pair \(heads.safetensors is missing\)"):
        load_clip(folder / "model", LatentDiffusion.from_pretrained(folder / "model"))


def test_an_image_encoder_for_text_encoders_as_they_are(
    trained: tuple[Path, dict[int, dict[str, float]]], images: Path, tmp_path: Path
) -> None:
    source = trained[0] / "model"
    more = ["text.image_only=true", "text.steps=30", "text.image_layers=1"]
    log = run(source, images, tmp_path / "r", *more)
    assert log[30]["loss/pair"] < 0.9 * log[10]["loss/pair"]
    model = LatentDiffusion.from_pretrained(source)
    assert fingerprint({"text": model.text_encoders}) == fingerprint(
        {"text": LatentDiffusion.from_pretrained(tmp_path / "r/text/model").text_encoders}
    )
    pair = load_clip(tmp_path / "r/text/clip", model)
    (row,) = forecast(load(None, settings(source, images, tmp_path, *more)))
    assert row.trained == sum(p.numel() for part in (pair.image_encoder, pair.heads) for p in part.parameters())


def test_damage_is_noticed(trained: tuple[Path, dict[int, dict[str, float]]], tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(trained[0] / "model")
    for file in ("heads.safetensors", "image_encoder/model.safetensors", "image_encoder/config.json"):
        folder = tmp_path / file.replace("/", "-")
        shutil.copytree(trained[0] / "clip", folder)
        content = bytearray((folder / file).read_bytes())
        content[-20] ^= 1
        (folder / file).write_bytes(content)
        with pytest.raises(LdmError, match="has changed since it was written"):
            load_clip(folder, model)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_opens_the_model(
    family: str,
    trained: tuple[Path, dict[int, dict[str, float]]],
    models: Callable[[str], Path],
    images: Path,
    tmp_path: Path,
) -> None:
    folder = trained[0]
    if family == "sd15":
        run(models("sd15"), images, tmp_path / "run", "text.steps=2")
        folder = tmp_path / "run" / "text"
    model, before = (LatentDiffusion.from_pretrained(path) for path in (folder / "model", models(family)))
    ours = model.encode_prompt(["a red circle"])
    assert not torch.allclose(ours.text, before.encode_prompt(["a red circle"]).text, atol=1e-3)
    for part in ("unet", "autoencoder"):
        old, new = (getattr(one, part).state_dict() for one in (before, model))
        assert all(torch.equal(old[name], new[name]) for name in old)
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder / "model")
    with torch.no_grad():
        theirs = pipeline.encode_prompt("a red circle", device="cpu", num_images_per_prompt=1,
                                        do_classifier_free_guidance=False)  # fmt: skip
        torch.testing.assert_close(model.encode_prompt(["a red circle"]).text, theirs[0], atol=1e-5, rtol=1e-4)
        if family == "sdxl":
            torch.testing.assert_close(model.encode_prompt(["a red circle"]).pooled, theirs[2], atol=1e-5, rtol=1e-4)
