"""Runs of several processes, and on machines that are too small: they agree, or say why not, and lose nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from launched import ROOT, on_several, on_two
from PIL import Image
from runs import _fresh_accelerator, config, lines, losses, weights  # noqa: F401
from safetensors.torch import load

from ldm.cli.train import make_images
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.training import checkpoint
from ldm.training.parallel.agreement import check_agreement
from ldm.training.run import train
from ldm.training.stages.autoencoder import AutoencoderStage
from ldm.training.stages.denoiser import DenoiserStage
from ldm.training.stages.stage import Loss


def test_processes_with_other_configurations_or_weights_end(shapes: Path, tmp_path: Path) -> None:
    config(shapes, tmp_path / "r")  # writes r.yaml
    command = ["-m", "ldm", "train", tmp_path / "r.yaml", f"data.source={shapes}", f"output={tmp_path / 'r'}"]
    command += ["base.steps=2"]
    folders = [tmp_path, tmp_path / "elsewhere"]
    folders[1].mkdir()
    done = on_several([command, [*command, "base.batch=4"]], folders)
    assert done.returncode != 0
    assert "the processes of this run differ: base.batch is 8 on process 0 and 4 on process 1" in done.stderr
    for seed, folder in enumerate(folders):
        train(config(shapes, tmp_path / f"m{seed}", f"seed={seed}", "base.steps=1"))
        shutil.copytree(tmp_path / f"m{seed}" / "base" / "model", folder / "start")
    command += ["model.family=null", "model.unet={}", "model.autoencoder={}", "model.text=[]", "model.source=start"]
    done = on_several([command] * 2, folders)
    assert done.returncode != 0
    assert "the processes of this run differ: the weights of unet is '" in done.stderr


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_agreement({"a": {"b": 1}})
    monkeypatch.setattr(
        "ldm.training.parallel.agreement.gather_object", lambda own: [*own, {"a": {"b": 1}}, {"a": {"b": 3}}]
    )
    with pytest.raises(LdmError, match=r"differ: a\.b is 1 on process 0 and 3 on process 2; start all of them"):
        check_agreement({"a": {"b": 1}})


def _small(limit: int, errors: list[int], original: Any) -> Any:
    """Losses that need more memory than there is for more than `limit` images."""

    def losses_of(self: Any, batch: Batch, step: int) -> Iterator[Loss]:
        for loss in original(self, batch, step):
            yield loss
            if len(batch.keys) > limit and step >= 2:
                errors.append(len(batch.keys))
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return losses_of


def test_what_does_not_fit_into_memory_is_cut(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(config(shapes, tmp_path / "whole"))
    errors: list[int] = []
    monkeypatch.setattr(DenoiserStage, "losses", _small(3, errors, DenoiserStage.losses))
    train(config(shapes, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=2e-4)
    assert errors == [8, 4]
    assert "out of memory with 8 images at a time on process 0; from now on it takes 4" in caplog.text
    assert "out of memory with 4 images at a time on process 0; from now on it takes 2" in caplog.text
    monkeypatch.setattr(DenoiserStage, "losses", _small(0, errors, DenoiserStage.losses))
    with pytest.raises(LdmError, match=r"out of memory with 1 images of \d+×\d+ at a time; set base.checkpointing"):
        train(config(shapes, tmp_path / "none"))


def test_an_autoencoders_step_is_begun_again_as_a_whole(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the adversary's weight and the codebook had counted of the step is dropped."""
    codebook = ["model.autoencoder.codebook=16", "model.autoencoder.codebook_dim=4"]
    few = ["steps=5", "batch=8", "sizes=[{size: 32}]", "adversarial_start=1", "log_every=1", "perceptual_weight=0"]
    extra = ["stages=[autoencoder]", "autoencoder.discriminator={channels: 8, layers: 1, groups: 4}"]
    extra += [f"autoencoder.{one}" for one in few]
    for name, own in (("kl", []), ("vq", codebook)):
        with monkeypatch.context() as patch:
            whole = config(shapes, tmp_path / f"{name}-whole", *extra, *own, "autoencoder.micro_batch=4")
            train(whole)
            errors: list[int] = []
            patch.setattr(AutoencoderStage, "losses", _small(4, errors, AutoencoderStage.losses))
            train(config(shapes, tmp_path / f"{name}-cut", *extra, *own))
        assert errors == [8]
        rows = [
            [json.loads(line) for line in (tmp_path / f"{name}-{kind}" / "autoencoder/metrics.jsonl").open()]
            for kind in ("whole", "cut")
        ]
        for expected, row in zip(*rows, strict=True):
            for key in ("loss/autoencoder", "adaptive_weight", "codebook/perplexity"):
                assert row.get(key, 0) == pytest.approx(expected.get(key, 0), rel=2e-3), (name, key)


def test_too_little_room_is_said_before_the_first_step(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ldm.training.checkpoint.shutil.disk_usage", lambda path: usage._replace(free=10**5))
    with pytest.raises(LdmError, match=r"0\.00 GB are free, and checkpoints will need about .* GB more"):
        train(config(shapes, tmp_path / "r"))
    assert not (tmp_path / "r" / "base" / "checkpoints").exists()
    assert not (tmp_path / "r" / "base" / "metrics.jsonl").exists()


def test_a_checkpoint_takes_what_was_reckoned(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(checkpoint, "check_room", lambda folder, nbytes, keep: seen.append(nbytes))
    train(config(shapes, tmp_path / "r"))
    files = (tmp_path / "r" / "base" / "checkpoints" / "step-00000006").rglob("*")
    assert seen[0] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.15)


def test_weights_spread_over_processes_train_alike(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP2: the losses and the result of one process, its images and validations too; and it goes on exactly, in the
    other of its two layouts too."""
    extra = ["base.train_text=true", "base.text_learning_rate=[1e-3]", "base.micro_batch=2", "base.steps=4"]
    extra += ["base.save_every=2", "base.validate_every=4", "base.preview_every=2"]
    extra += ["model.unet.channels=[16]", "model.unet.depth=[1]", "model.unet.heads=[2]"]  # time goes with the weights
    train(config(shapes, tmp_path / "one", *extra), make_images)
    settings = [tmp_path / "one.yaml", f"data.source={shapes}", f"output={tmp_path / 'two'}", *extra]
    script = ROOT / "tests" / "spread.py"
    on_two(script, "train", *settings)
    assert [list(row) for row in lines(tmp_path / "two")] == [list(row) for row in lines(tmp_path / "one")]
    for row, expected in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    before = {name: weights(tmp_path / name) for name in ("one", "two")}
    near = [load(before[name]) for name in ("one", "two")]
    for key, weight in near[0].items():
        torch.testing.assert_close(near[1][key], weight, atol=1e-4, rtol=1e-3)
    shutil.rmtree(tmp_path / "two" / "base" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "two" / "base" / "model")
    (tmp_path / "two" / "base" / "done.json").unlink()
    for name in ("alone", "layout"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    monkeypatch.setenv("LAYOUT", "fsdp2-zero2.yaml")
    assert "going on from" in on_two(script, "train", *settings).stderr
    assert weights(tmp_path / "two") == before["two"]
    assert not on_several([[script, "train", *settings, f"output={tmp_path / 'alone'}"]]).returncode
    for row, expected in zip(lines(tmp_path / "alone"), lines(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    with pytest.raises(LdmError, match=r"step-00000002 does not fit .*: another layout of weights \(DDP or FSDP2\)"):
        train(config(shapes, tmp_path / "layout", *extra), make_images)
    images = [Image.open(tmp_path / name / "base/previews/step-00000002.png") for name in ("one", "two")]
    assert images[0].size == images[1].size
    difference = np.subtract(*(np.asarray(image, dtype=int) for image in images))
    assert np.abs(difference).max() <= 1  # where a number lies between two of the 256 levels, its last bit decides


def test_muon_makes_matrices_that_are_spread_orthogonal_as_a_whole(shapes: Path, tmp_path: Path) -> None:
    extra = ["base.optimizer.name=muon", "base.steps=3", "base.save_every=3"]
    extra += ["model.unet.channels=[16]", "model.unet.depth=[1]", "model.unet.heads=[2]"]
    train(config(shapes, tmp_path / "one", *extra), make_images)
    on_two(
        ROOT / "tests" / "spread.py",
        *("train", tmp_path / "one.yaml", f"data.source={shapes}", f"output={tmp_path / 'two'}", *extra),
    )
    for row, expected in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=2e-3)
    near = [load(weights(tmp_path / name)) for name in ("one", "two")]
    for key, weight in near[0].items():
        torch.testing.assert_close(near[1][key], weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                "stages=[autoencoder]",
                "autoencoder.perceptual_weight=0",
                "autoencoder.sizes=[{size: 32}]",
                "data.buckets=false",
            ],
            "stage autoencoder: its weights cannot be spread",
        ),
        (["base.ema.widths=[0.1]"], "base.ema.widths: averages of other widths need DDP"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.FSDP)
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
    with pytest.raises(LdmError, match=message):
        train(config(shapes, tmp_path / "r", *overrides))


def test_a_batch_in_parts() -> None:
    rows = torch.arange(5.0)
    batch = Batch([*"abcde"], [0, 1, 2, 3, 4], [*"vwxyz"], None, rows[:, None], rows[:, None], rows, rows)
    parts = batch.parts(3)
    assert [part.keys for part in parts] == [["a"], ["b", "c"], ["d", "e"]]
    assert torch.equal(torch.cat([part.scores for part in parts]), rows)
    assert [part.captions[0] for part in batch.parts(9)] == [*"vwxyz"]
