"""Masks and weights in the loss of a stage that denoises, and captions whose tags change."""

from __future__ import annotations

import json
import logging
from itertools import count, islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import _fresh_accelerator as _fresh_accelerator
from runs import config, losses
from torch import Tensor

from ldm.data.keyed import uniform
from ldm.data.loader import Batch
from ldm.data.masks import boxes
from ldm.data.sources import open_images
from ldm.errors import LdmError
from ldm.training.batches import StageBatches
from ldm.training.caching import Caches
from ldm.training.images import TrainingImages
from ldm.training.losses.diffusion import mean_by
from ldm.training.run import TrainingRun, train
from ldm.training.sections import DataSection
from ldm.training.stages.denoiser import DenoiserStage


def ready(shapes: Path, output: Path, *overrides: str) -> tuple[DenoiserStage, Batch]:
    """The stage `base`, and its first batch."""
    run = TrainingRun(config(shapes, output, *overrides), None, lambda *_: None)
    training = run.training("base", run.start("base", None), run.folder / "base")
    assert isinstance(training.stage, DenoiserStage)
    (batch,) = next(training.batches(0))
    return training.stage, batch


def values(stage: DenoiserStage, batch: Batch) -> Tensor:
    (loss,) = stage.losses(batch, 0)
    return loss.values.detach()


def test_the_mean_within_a_mask() -> None:
    """OneTrainer's normalised loss: the errors by the mask, at least the weight outside, by the mask's mean."""
    errors, mask = torch.rand(3, 4, 8, 6), torch.rand(3, 1, 8, 6)
    mask[1] = 0
    clamped = mask.clamp(0.2, 1)
    expected = (errors * clamped / clamped.mean(dim=(1, 2, 3), keepdim=True)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean_by(errors, mask.clamp(min=0.2)), expected)
    torch.testing.assert_close(mean_by(errors, torch.ones(3, 1, 8, 6)), mean_by(errors, None))
    assert mean_by(errors, mask)[1] == 0 and mean_by(errors, mask).isfinite().all()


def test_a_mask_weighs_errors_where_it_lies(shapes: Path, tmp_path: Path) -> None:
    """What lies outside the mask has no gradient; a white mask changes nothing; weights multiply."""
    drawn = [boxes((64, 64), (uniform(0, name, draw) for draw in count())) for name in ("a", "b")]
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, path in enumerate(sorted(shapes.glob("*.png"))):
        drawn[number % 2].save(masks / path.name)
    stage, batch = ready(shapes, tmp_path / "r", f"data.beside.mask={masks}")
    mask = batch.beside["mask"]
    assert mask.shape[1] == 1 and 0 < mask.mean() < 1
    plain = Batch(**{**vars(batch), "beside": {}})
    white = Batch(**{**vars(batch), "beside": {"mask": torch.ones_like(mask)}})
    torch.testing.assert_close(values(stage, white), values(stage, plain))
    heavy = Batch(**{**vars(plain), "weights": torch.arange(8.0)})
    torch.testing.assert_close(values(stage, heavy), values(stage, plain) * torch.arange(8.0))

    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], 0, batch.keys, batch.epochs)
    prediction = torch.randn_like(latents, requires_grad=True)
    areas = stage.areas(batch, latents)
    assert areas is not None
    torch.testing.assert_close(areas, F.interpolate(mask, size=latents.shape[2:], mode="area"))
    stage.loss(prediction, latents, draw, areas).sum().backward()
    assert prediction.grad is not None
    assert torch.equal((prediction.grad != 0).any(1, keepdim=True), areas > 0)


def test_a_run_with_all_of_it(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Masks from a folder, tags, repeats, with a cache: it goes on exactly where it stopped."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in shapes.glob("*.png"):
        Image.new("L", (64, 64), 255).save(masks / path.name)
    more = [
        f"data.beside.mask={masks}", "data.shuffle_tags=true", "data.trigger=sks", "data.cache=true", "base.steps=4",
        "base.save_every=2",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        train(config(shapes, tmp_path / "whole", *more))
    assert "captions change from visit to visit" in caplog.text
    assert not list((tmp_path / "whole" / "data").glob("texts-*"))
    train(config(shapes, tmp_path / "parts", *more, "base.steps=2"))
    train(config(shapes, tmp_path / "parts", *more))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_what_changes_the_batches_or_the_loss_changes_the_digest(tmp_path: Path) -> None:
    """Repeats, weights and masks; without them it is as it always was."""
    for place, sizes in (("images", (64, 64)), ("masks", (64, 32))):
        (tmp_path / place).mkdir()
        for name, side in zip("ab", sizes, strict=True):
            Image.new("RGB", (64, side)).save(tmp_path / place / f"{name}.png")

    def digest(numbers: dict[str, float], **beside: str) -> str | None:
        row = {"file_name": "a.png", "text": "a", **numbers}
        (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps(row))
        images = open_images(str(tmp_path / "images"), tmp_path / "c", captions="optional", beside=beside)
        return TrainingImages(DataSection(), tmp_path, images).digest

    masks = str(tmp_path / "masks")
    found = [digest({}), digest({"repeats": 2}), digest({"loss_weight": 0.5}), digest({}, mask=masks)]
    Image.new("RGB", (64, 64)).save(tmp_path / "masks" / "b.png")
    found.append(digest({}, mask=masks))
    assert len(set(found)) == 5 and found[0] == digest({"repeats": 1}, mask="boxes")


def test_held_out_captions_stay_as_they_are(shapes: Path, tmp_path: Path) -> None:
    chosen = config(shapes, tmp_path / "r", "data.drop_tags=0.99", "data.captions=optional")
    run = TrainingRun(chosen, None, lambda *_: None)
    batches = StageBatches(run.data, chosen.base, run.accelerator, 0, Caches())
    assert all(text for batch in islice(batches.held_out(), 1) for text in batch.captions)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.beside.mask=no/where"], r"data.beside.mask: no/where does not exist; give a folder, a column"),
        (["data.beside.mask=masks"], r"has no column 'masks': "),
        (["data.beside.condition=gray"], r"data.beside.condition: none of the stages \(base\) reads it; leave it out"),
        (["stages=[text]", "data.beside.mask=boxes"], r"data.beside.mask: none of the stages \(text\) reads it; leave"),
        (
            ["base.outside_mask=0.5"],
            r"base.outside_mask: there are no masks; name some with data.beside.mask",
        ),
        (["data.folders={dog: {repeat: 2}}"], r"data.folders.dog.repeat is not known; did you mean repeats\?"),
        (["data.folders={dog: {repeats: 2}}"], r"has no images in the folder dog; it has no folders"),
        (["data.stream=true", "data.numbered_folders=true"], r"data.numbered_folders: a stream is not read by folders"),
        (
            ["data.stream=true", "data.beside.mask=boxes"],
            r"data.beside.mask: a stream has no images beside its own; copy",
        ),
        (["num_repeats=10"], r"num_repeats is not known; did you mean data.folders\?"),
        (["data.masked_loss=true"], r"did you mean data.beside.mask\?"),
    ],
)
def test_wrong_settings(shapes: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        TrainingRun(config(shapes, tmp_path / "r", *overrides), None, lambda *_: None)
