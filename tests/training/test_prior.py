"""Class images (DreamBooth): made once and whole, half of each batch, the loss of diffusers' script; bad input."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from runs import _fresh_accelerator as _fresh_accelerator
from runs import config, interrupted, lines

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import Config
from ldm.training.loop import Training
from ldm.training.phases import phases
from ldm.training.prior import class_images
from ldm.training.run import TrainingRun, train
from ldm.training.sections import StageSection
from ldm.training.stages.denoiser import DenoiserStage

FEW = [
    "steps=4", "batch=4", "sizes=[{size: 32}]", "log_every=1", "save_every=2", "validate_every=4", "preview_every=100",
    "drop_caption=[0]", "prior.prompt=a drawing", "prior.images=5", "prior.batch=2", "prior.weight=0.5",
]  # fmt: skip

MADE = ["adapter.prior.images=200", "adapter.prior.batch=4"]  # the defaults, as a source needs them


class Painter:
    """Gives grey images, and fails when it is asked for one too many."""

    def __init__(self, most: int = 100) -> None:
        self.most, self.made = most, 0

    def __call__(
        self, model: LatentDiffusion, prompts: list[str], size: tuple[int, int], seeds: Sequence[int],
        settings: Mapping[str, Any],
    ) -> list[Image.Image]:  # fmt: skip
        (self.dtype,) = {weight.dtype for weight in model.unet.parameters()}
        if set(prompts) == {"a drawing"}:  # not a preview
            if self.made + len(prompts) > self.most:
                raise LdmError("the plug is pulled")
            self.made += len(prompts)
        return [Image.new("RGB", size, (40 * seed, 80, 120)) for seed in seeds]


def settings(shapes: Path, output: Path, stage: str, *overrides: str) -> Config:
    own = [f"{stage}.{one}" for one in FEW]
    given = {override.partition("=")[0] for override in overrides}
    usual = [f"stages=[{stage}]", *(one for one in own if one.partition("=")[0] not in given)]
    return config(shapes, output, *usual, *overrides)


def ready(chosen: Config, painter: Painter) -> Training:
    """The run's stage, ready to train."""
    run, (name,) = TrainingRun(chosen, painter, lambda *_: None), chosen.stages
    return run.training(name, run.start(name, None), run.folder / name)


def made(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "data").glob("class-*/images/*"))


@pytest.mark.parametrize("stage", ["base", "adapter"])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_the_loss_is_that_of_diffusers(shapes: Path, tmp_path: Path, stage: str, cached: bool) -> None:
    """`train_dreambooth.py`: the mean error of the images plus, times its weight, that of the class images."""
    chosen = settings(shapes, tmp_path / "r", stage, f"data.cache={str(cached).lower()}")
    training = ready(chosen, Painter())
    found = training.stage
    assert isinstance(found, DenoiserStage)
    (images, of_class) = next(training.batches(0))
    assert (len(images.keys), len(of_class.keys), set(of_class.captions)) == (2, 2, {"a drawing"})
    assert set(images.captions) & {"a drawing"} == set()
    errors = []
    for batch in (images, of_class):
        latents = found.latents(batch, "posterior")
        draw = found.loss.draw(latents.shape[1:], found.seed, batch.keys, batch.epochs)
        cond = found.model.encode_prompt(batch.captions)
        with torch.no_grad():
            errors.append(
                F.mse_loss(found.model.unet(found.loss.noisy(latents, draw), draw.timestep, cond), draw.noise)
            )
    figures = training.gradients([images, of_class])[0]
    assert float(figures["loss/unet"]) == pytest.approx(float(errors[0] + 0.5 * errors[1]), rel=1e-4)


def test_class_images_are_made_once(shapes: Path, tmp_path: Path) -> None:
    chosen, last = settings(shapes, tmp_path / "r", "adapter"), Painter()
    with pytest.raises(LdmError, match="the plug is pulled"):
        train(chosen, Painter(most=3))
    assert made(tmp_path / "r") == ["00000.png", "00001.png"]
    train(chosen, last)
    assert made(tmp_path / "r") == [f"{number:05d}.png" for number in range(5)]
    assert last.made == 4  # the last batch is whole, so that no image depends on how many there are
    again = Painter()
    train(settings(shapes, tmp_path / "r", "adapter", "adapter.steps=5"), again)
    assert again.made == 0
    train(settings(shapes, tmp_path / "r", "adapter", "adapter.steps=6", "adapter.prior.images=6"), again)
    assert again.made == 2
    assert len(made(tmp_path / "r")) == 6
    few = ready(settings(shapes, tmp_path / "r", "adapter", "adapter.prior.images=3"), again)
    keys = {key for step in islice(few.batches(0), 8) for key in step[1].keys}
    assert keys == {f"class images/{number:05d}.png" for number in range(3)}


def test_processes_share_the_work(tmp_path: Path) -> None:
    section = settings(tmp_path, tmp_path / "r", "base").base
    found, painters = class_images(section.prior, section, 0, "model", tmp_path), [Painter(), Painter()]
    model = tiny.model("sd15", shallow=True)
    for rank, painter in enumerate(painters):
        ranks: Any = SimpleNamespace(
            process_index=rank, num_processes=2, wait_for_everyone=lambda: None, mixed_precision="bf16"
        )
        found.make(model, painter, ranks)
    assert [painter.made for painter in painters] == [4, 2]
    assert {painter.dtype for painter in painters} == {torch.bfloat16}
    found.file(2).unlink()
    again = Painter()
    found.make(model, again, ranks)
    assert again.made == 2  # with the image that it was made with
    assert sorted(path.name for path in found.images.iterdir()) == [f"{number:05d}.png" for number in range(5)]


def test_a_full_disk_leaves_whole_images(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(shapes, tmp_path / "r", "adapter")

    def full(descriptor: int) -> None:
        if ".png." in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.images.os.fsync", full)
        with pytest.raises(LdmError, match=r"00000.png.*No space left on device"):
            train(chosen, Painter())
    assert made(tmp_path / "r") == []


def test_an_interrupted_run_ends_in_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    whole, parts = tmp_path / "style", tmp_path / "parts" / "style"
    train(settings(shapes, whole, "adapter", "data.cache=true"), Painter())
    images = next((whole / "data").glob("class-*/images"))
    source = [f"adapter.prior.source={images}", *MADE]
    again = settings(shapes, parts, "adapter", "data.cache=true", *source)
    interrupted(again, after=3)
    train(again)
    assert lines(parts, "adapter") == lines(whole, "adapter")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.trigger=A  drawing"], "adapter.prior.prompt and data.trigger are the same, 'a drawing'"),
        (["adapter.batch=3"], "adapter.batch is 3: half of it is class images"),
        (["adapter.prior.prompt=''", "adapter.prior.source=x"], "class images need their prompt"),
        (
            ["adapter.prior.source=x"],
            "class images that are made, and a source is named; leave one of them out",
        ),
        (["adapter.sizes=[{size: 32, batch: 3}]"], "the batch of adapter.sizes at 32 is 3: half of it is class images"),
        ([*MADE, "adapter.prior.source=nowhere"], "adapter.prior.source: nowhere does not exist"),
        (["adapter.prior.prompt=a red circle"], "adapter.prior.prompt is the caption of"),
        (["adapter.layers=[atention]"], "adapter.layers: atention matches no layer"),
        (["data.upscale=1", "adapter.sizes=[{size: 512}]"], "images are too small for size 512"),
    ],
)
def test_bad_input(shapes: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    painter = Painter()
    with pytest.raises(LdmError) as caught:
        train(settings(shapes, tmp_path / "r", "adapter", *overrides), painter)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert painter.made == 0


def test_class_images_that_are_too_small(shapes: Path, tmp_path: Path) -> None:
    """They are found before the stage that comes first is trained."""
    (folder := tmp_path / "small").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    with pytest.raises(LdmError, match="small: all 1 images are too small for size 32"):
        train(
            settings(
                shapes, tmp_path / "r", "adapter", "stages=[base,adapter]", *MADE, f"adapter.prior.source={folder}"
            )
        )
    assert not (tmp_path / "r" / "base").exists()


def test_the_message_names_the_whole_batch() -> None:
    (phase,) = phases(StageSection(batch=6, sizes=[{"size": 32}]))  # type: ignore[list-item]
    with pytest.raises(LdmError, match="a batch of 6, half of it class images, does not divide among 2 .* of 4"):
        phase.halved.parts(2)


def test_each_model_makes_its_own_class_images(shapes: Path, tmp_path: Path) -> None:
    both = [f"base.{one}" for one in (*FEW, "steps=1")]
    train(settings(shapes, tmp_path / "r", "adapter", *both, "stages=[base,adapter]", "adapter.steps=1"), Painter())
    assert len(list((tmp_path / "r" / "data").glob("class-*"))) == 2


def test_memory_that_does_not_suffice_for_class_images(shapes: Path, tmp_path: Path) -> None:
    def full(*_: Any) -> list[Image.Image]:
        raise LdmError(
            "out of memory with 2 images of 32×32 at a time; a batch of 1 would fit better (batch=, --batch)"
        )

    with pytest.raises(LdmError, match=r"class images: out of memory with 2 of 32×32 at a time; set prior.batch to 1"):
        train(settings(shapes, tmp_path / "r", "adapter"), full)


def test_a_run_without_a_function_that_makes_images(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="no function that makes images is given"):
        train(settings(shapes, tmp_path / "r", "adapter"))
