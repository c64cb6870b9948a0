"""Whole runs of tiny models: they learn, go on where they stopped, and are the same in any layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import yaml
from accelerate.state import AcceleratorState
from launched import ROOT, Program, by_launcher, on_two
from PIL import Image
from runs import DEEP, TINY, _fresh_accelerator, check_golden, config, interrupted, lines, losses, weights  # noqa: F401
from safetensors.torch import load_file

from ldm.cli.train import make_images
from ldm.data.loader import Batch
from ldm.data.plan import split
from ldm.data.sources import open_images
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.training import checkpoint
from ldm.training.batches import StageBatches
from ldm.training.caching import Caches
from ldm.training.config import load
from ldm.training.ema import recombine
from ldm.training.loop import Stopped
from ldm.training.run import TrainingRun, train
from ldm.training.sections import ModelSection
from ldm.training.stages.denoiser import DenoiserStage, Joint
from ldm.training.start import starting_model
from ldm.weights.tensors import LINEAGE, read_header
from pipelines import Pipeline

# --- it learns --------------------------------------------------------------------------------------------------------


def save_start(section: ModelSection, folder: Path) -> None:
    """A model with random weights whose autoencoder is sure of its latents, as untrained ones are not."""
    start = starting_model(section, seed=0)
    moments: Any = start.autoencoder.quant_conv
    moments.weight.data[4:] = 0
    moments.bias.data[4:] = -20
    start.family = replace(start.family, autoencoder=replace(start.family.autoencoder, scaling_factor=4.8))
    start.autoencoder.config = start.family.autoencoder
    start.save_pretrained(folder)


def test_a_refiner_learns(shapes: Path, tmp_path: Path) -> None:
    """On its 200 timesteps the loss falls below 0.75."""
    tower = {**TINY["model"]["text"][0], "projection": 24}
    unet = TINY["model"]["unet"] | {"text_dim": 32, "pooled_dim": 24, "size_dim": 8, "mid_depth": 1}
    model = TINY["model"] | {"family": "sdxl-refiner", "unet": unet, "text": [tower]}
    save_start(ModelSection(**model), tmp_path / "start")
    refiner = TINY["base"] | {"model": {"source": str(tmp_path / "start")}, "steps": 90, "log_every": 10}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**TINY, "stages": ["refiner"], "refiner": refiner}))
    more = ["refiner.validate_every=90", "refiner.save_every=90", "refiner.optimizer.learning_rate=4e-3"]
    train(load(tmp_path / "c.yaml", [f"data.source={shapes}", f"output={tmp_path / 'r'}", *more]))
    curve = losses(tmp_path / "r", "refiner")
    assert curve[0] > 0.95
    assert curve[-1] < 0.75


def test_a_base_learns(shapes: Path, tmp_path: Path) -> None:
    """The loss falls below 0.4, and samples come nearer to the data: their mean and spread, place by place."""
    save_start(config(shapes, tmp_path / "r", DEEP).model, tmp_path / "start")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**TINY, "model": {"source": str(tmp_path / "start")}}))
    settings = load(tmp_path / "s.yaml", [f"data.source={shapes}", f"output={tmp_path / 'r'}", "base.steps=70",
                                          "base.optimizer.learning_rate=4e-3", "base.log_every=10",
                                          "base.validate_every=70", "base.save_every=70"])  # fmt: skip
    train(settings)
    curve = losses(tmp_path / "r")
    assert curve[0] > 0.8
    assert curve[-1] < 0.4
    validation = [row["validation/loss"] for row in lines(tmp_path / "r") if "validation/loss" in row]
    assert validation[-1] < 0.4
    trained = LatentDiffusion.from_pretrained(tmp_path / "r" / "base" / "model")
    run = TrainingRun(settings, None, lambda *_: None)
    batches = StageBatches(run.data, settings.base, run.accelerator, settings.seed, Caches())
    batch = next(batches.steps(0))[0]
    assert batch.pixels is not None
    with torch.no_grad():
        data = trained.autoencoder.encode(batch.pixels).mode() * trained.autoencoder.config.scaling_factor

    def distance(model: LatentDiffusion) -> float:
        made = Pipeline(model, device="cpu", dtype=torch.float32)(
            batch.captions, steps=12, seed=0, guidance=1.0, output="latents", scheduler="ddim", width=32, height=32,
            batch=8,
        ).latents  # fmt: skip
        samples = torch.stack(made)
        spread = torch.nn.functional.interpolate(data, size=samples.shape[2:])
        return float((samples.mean(0) - spread.mean(0)).square().mean() + (samples.std() - spread.std()).square())

    untrained = LatentDiffusion.from_pretrained(tmp_path / "start")
    assert distance(trained) < 0.3 * distance(untrained)


def test_the_loss_curve_is_the_golden_one(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path / "r", DEEP, "base.steps=12", "base.min_snr=5", "base.noise_offset=0.05"))
    check_golden("base", losses(tmp_path / "r"))


def test_a_refiner_follows_its_base(shapes: Path, tmp_path: Path) -> None:
    """Both of SDXL's shape: two text encoders, size conditioning; the refiner takes over what it can."""
    towers = [TINY["model"]["text"][0], {**TINY["model"]["text"][0], "projection": 24}]
    unet = TINY["model"]["unet"] | {"text_dim": 64, "pooled_dim": 24, "size_dim": 8, "mid_depth": 1}
    small = yaml.safe_dump(unet, default_flow_style=True).strip()
    refined = yaml.safe_dump(unet | {"text_dim": 32}, default_flow_style=True).strip()
    texts = [yaml.safe_dump(tower, default_flow_style=True).strip() for tower in towers]
    autoencoder = yaml.safe_dump(TINY["model"]["autoencoder"], default_flow_style=True).strip()
    own = [
        f"refiner.model.unet={refined}", f"refiner.model.text=[{texts[1]}]",
        f"refiner.model.autoencoder={autoencoder}", "refiner.steps=3", "refiner.batch=8",
        "refiner.sizes=[{size: 32}]", "refiner.log_every=1", "refiner.validate_every=3",
    ]  # fmt: skip
    train(
        config(
            shapes, tmp_path / "r", "stages=[base,refiner]", "model.family=sdxl", f"model.unet={small}",
            f"model.text=[{texts[0]},{texts[1]}]", "base.drop_caption=[0.2,0.3]", "base.drop_size=0.1", "base.steps=3",
            *own,
        )
    )  # fmt: skip
    made = tmp_path / "r" / "base" / "model"
    train(config(shapes, tmp_path / "alone", "stages=[refiner]", f"model={{source: {made}}}", *own))
    base = LatentDiffusion.from_pretrained(made)
    for folder in ("alone", "r"):
        refiner = LatentDiffusion.from_pretrained(tmp_path / folder / "refiner" / "model")
        assert refiner.family.refiner
        header = read_header(tmp_path / folder / "refiner/model/unet/diffusion_pytorch_model.safetensors")[1]
        assert json.loads(header[LINEAGE])["parents"] == [str(made), "sdxl-refiner"]
        for ours, theirs in (
            (refiner.autoencoder, base.autoencoder),
            (refiner.text_encoders.towers[-1], base.text_encoders.towers[-1]),
        ):
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    pipeline = Pipeline(base, refiner=refiner, device="cpu")
    assert pipeline("a red circle", steps=4, refiner_at=0.5, width=32, height=32).images[0].size == (32, 32)


def test_long_captions_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, caption in enumerate(("a " * 100, "short")):
        Image.new("RGB", (64, 64)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(caption)
    run = TrainingRun(config(data, tmp_path / "r", "base.steps=1"), None, lambda *_: None)
    run._warn_of_long_captions(tiny.model("sd15"))
    assert "1 of 2 captions have over 75 tokens; the rest of them is not read" in caplog.text


def test_text_encoders_learn_with_the_unet(shapes: Path, tmp_path: Path) -> None:
    settings = config(shapes, tmp_path / "r", "base.train_text=true", "base.text_learning_rate=[1e-3]", "base.steps=3")
    before = TrainingRun(settings, None, lambda *_: None).start("base", None).text_encoders.state_dict()
    train(settings)
    after = LatentDiffusion.from_pretrained(tmp_path / "r" / "base" / "model").text_encoders.state_dict()
    moved = [name for name in after if not torch.equal(before[name].float(), after[name])]
    assert any("token_embedding" in name for name in moved)
    assert any("final_layer_norm" in name for name in moved)


def test_several_resolutions_in_one_run(shapes: Path, tmp_path: Path) -> None:
    sizes = ["base.sizes=[{size: 24, steps: 2, batch: 16}, {size: 32}]", "base.steps=4", "base.save_every=1"]
    train(config(shapes, tmp_path / "r", *sizes))
    again = config(shapes, tmp_path / "s", *sizes)
    interrupted(again, after=3)
    train(again)
    assert lines(tmp_path / "r") == lines(tmp_path / "s")
    assert weights(tmp_path / "r") == weights(tmp_path / "s")


# --- it goes on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["data.workers=2"], ["data.cache=true", "data.crops=2"]], ids=["", "w", "c"])
def test_an_interrupted_run_ends_in_the_same_bytes(shapes: Path, tmp_path: Path, extra: list[str]) -> None:
    train(config(shapes, tmp_path / "whole", *extra))
    settings = config(shapes, tmp_path / "parts", *extra)
    interrupted(settings, after=2)  # before the first checkpoint
    interrupted(settings, after=5)  # after it, with lines in the log that have to go
    train(settings)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    before = weights(tmp_path / "whole")
    train(settings)  # done: nothing happens
    assert weights(tmp_path / "whole") == before


def test_a_damaged_checkpoint_is_passed_over(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(config(shapes, tmp_path / "whole", "base.save_every=2"))
    settings = config(shapes, tmp_path / "parts", "base.save_every=2")
    interrupted(settings, after=5)
    folder = tmp_path / "parts" / "base" / "checkpoints"
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-00000002", "step-00000004"]
    file = folder / "step-00000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    train(settings)
    assert "step-00000004 is damaged (model.safetensors); the one before is taken" in caplog.text
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.unet.channels=[32,64]"], "another network"),
        (["base.train_text=true"], "another network"),
        (["base.optimizer.name=adafactor", "base.ema.decay=0"], "another optimizer; another ema"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    shapes: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    interrupted(config(shapes, tmp_path / "r"), after=5)
    with pytest.raises(LdmError, match=f"step-00000003 does not fit the configuration: {message}; set back what was"):
        train(config(shapes, tmp_path / "r", *overrides))
    train(config(shapes, tmp_path / "r"))


def test_more_steps_and_another_learning_rate_go_on(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(shapes, tmp_path / "r"))
    settings = config(shapes, tmp_path / "r", "base.steps=9", "base.optimizer.learning_rate=1e-30")
    train(settings)
    assert "base.optimizer.learning_rate was 0.002 when this run began, and is 1e-30 now" in caplog.text
    rows = {row["step"]: row for row in lines(tmp_path / "r") if "learning_rate" in row}
    assert list(rows) == list(range(1, 10))
    assert rows[9]["learning_rate"] == 1e-30
    state = torch.load(tmp_path / "r" / "base" / "checkpoints" / "step-00000009" / "optimizer.bin", weights_only=True)
    assert state["param_groups"][0]["lr"] == 1e-30
    networks = [checkpoint / "model.safetensors" for checkpoint in sorted((tmp_path / "r").glob("base/checkpoints/*"))]
    before, after = (load_file(path) for path in networks)
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert moved < 1e-20


def test_damaged_files_of_a_run(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end of a stage is done again; a log and a record that cannot be read are made anew."""
    settings = config(shapes, tmp_path / "r")
    train(settings)
    before, folder = weights(tmp_path / "r"), tmp_path / "r" / "base"
    (folder / "done.json").write_text("{}")
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "r" / "config.yaml").write_bytes(b"\xff: [")
    train(settings)
    assert "done.json is damaged; the end of the stage is done again" in caplog.text
    assert weights(tmp_path / "r") == before
    assert load(tmp_path / "r" / "config.yaml") == settings
    for manifest in ("{}", "[]", '{"files": {}, "step": 6, "state": {}}'):
        (folder / "checkpoints" / "step-00000006" / "manifest.json").write_text(manifest)
        found = checkpoint.newest(folder / "checkpoints")
        assert found is not None
        assert found[0].name == "step-00000003"


def test_one_run_at_a_time(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print('held'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "r" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(LdmError, match="r is in use by another run; wait for its end, or choose another output"):
            train(config(shapes, tmp_path / "r"))
        other.communicate(b"\n")
    assert not (tmp_path / "r" / "config.yaml").exists()


def test_images_that_changed_are_noticed(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(shapes, tmp_path / "mine")
    settings = config(tmp_path / "mine", tmp_path / "r")
    interrupted(settings, after=4)
    train(settings)
    assert "has changed" not in caplog.text
    (tmp_path / "mine" / "000.txt").write_text("something else")
    data = tmp_path / "r" / "data"
    (data / "images.json").rename(data / "pictures.json")  # as earlier versions called it
    train(settings)
    assert "mine has changed since this run began (50 images then, 50 now)" in caplog.text


def test_a_mask_that_was_replaced_is_noticed(shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under the same name, with the same size."""
    (masks := tmp_path / "masks").mkdir()
    for image in shapes.glob("*.png"):
        Image.new("L", Image.open(image).size, 255).save(masks / image.name)
    settings = config(shapes, tmp_path / "r", f"data.beside.mask={masks}")
    for _ in range(2):
        TrainingRun(settings, None, lambda *_: None)
    assert "replaced" not in caplog.text
    Image.new("L", Image.open(masks / "007.png").size, 40).save(masks / "007.png")
    TrainingRun(settings, None, lambda *_: None)
    assert "some mask files have been replaced since this run began" in caplog.text
    assert "some image files" not in caplog.text


def test_none_held_out(shapes: Path, tmp_path: Path) -> None:
    """So small a part of the images that it is none."""
    train(config(shapes, tmp_path / "r", "data.holdout=0.0001", "base.steps=2", "base.validate_every=1"))
    assert not any("validation/loss" in row for row in lines(tmp_path / "r"))


def test_a_full_disk_leaves_the_last_checkpoint(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(shapes, tmp_path / "r")
    interrupted(settings, after=5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.training.checkpoint._flush", full)
        with pytest.raises(LdmError, match=r"cannot be written: No space left on device; .* GB are free"):
            train(settings)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.accelerator.save_accelerator_state", broken)
        with pytest.raises(LdmError, match=r"cannot be written: PytorchStreamWriter failed writing file; .* are free"):
            train(settings)
    found = checkpoint.newest(tmp_path / "r" / "base" / "checkpoints")
    assert found is not None
    assert found[0].name == "step-00000003"
    train(settings)


def test_a_signal_saves_and_leaves(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path / "whole"))
    settings = config(shapes, tmp_path / "parts")

    def report(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stage base stopped after 4 updates, and saved them"):
        train(settings, report=report)
    train(settings)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_signal_while_held_out_images_are_looked_at(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved already is left at once, and looked at when the run goes on; else the looking is finished."""
    train(config(shapes, tmp_path / "whole", "base.validate_every=1"))
    settings = config(shapes, tmp_path / "parts", "base.validate_every=1")
    validate, batches = DenoiserStage.validate, 0

    def signalled(self: DenoiserStage, held_out: Iterable[Batch]) -> dict[str, float]:
        def seen() -> Iterator[Batch]:
            nonlocal batches
            for batch in held_out:
                os.kill(os.getpid(), signal.SIGTERM)
                batches += 1
                yield batch

        return validate(self, seen())

    for after, looked_at in ((1, 1), (2, 1), (3, 0), (3, 0)):
        batches = 0
        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"after {after} updates"):
            patch.setattr(DenoiserStage, "validate", signalled)
            train(settings)
        assert batches == looked_at, after
    train(settings)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_signals(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once are one; a second one later ends it at once."""
    settings = config(shapes, tmp_path / "r")
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def sent(step: int, times: int) -> Callable[[str, int, int, dict[str, float]], None]:
        def report(stage: str, now: int, steps: int, figures: dict[str, float]) -> None:
            for _ in range(times if now == step and "loss/unet" in figures else 0):
                signal.raise_signal(signal.SIGINT)

        return report

    with pytest.raises(Stopped, match="after 2 updates"):
        train(settings, report=sent(2, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ldm.training.signals.AT_ONCE", -1.0)
        train(settings, report=sent(4, 2))
    with pytest.raises(Stopped, match="after 6 updates"):
        train(settings, report=sent(6, 1))
    assert signal.signal(signal.SIGINT, outer) is signal.default_int_handler
    train(settings)


def test_the_command_is_killed_and_goes_on(shapes: Path, tmp_path: Path) -> None:
    """A real process, killed where it stands, then asked to stop, then left alone."""
    extra = ["base.steps=14", "base.save_every=2"]
    config(shapes, tmp_path / "parts")  # writes parts.yaml
    command = ["train", str(tmp_path / "parts.yaml"), f"data.source={shapes}", f"output={tmp_path / 'parts'}", *extra]

    def begun(step: int) -> Program:
        """The command, as far as this step."""
        log = tmp_path / "parts" / "base" / "metrics.jsonl"
        process = Program("-m", "ldm", *command)
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < step):
            time.sleep(0.01)
        return process

    killed = begun(5)
    killed.kill()
    killed.communicate()
    stopped = begun(9)
    stopped.terminate()
    _, err = stopped.communicate()
    assert stopped.returncode == 128 + signal.SIGTERM, err
    assert "and saved them; run the same command again to go on" in err
    out, err = Program("-m", "ldm", *command).communicate()
    assert out == f"{tmp_path / 'parts'}/base/model\n", err
    train(config(shapes, tmp_path / "whole", *extra))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


# --- it is the same in any layout -------------------------------------------------------------------------------------


def test_micro_batches_change_nothing(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path / "one"))
    train(config(shapes, tmp_path / "four", "base.micro_batch=2"))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)


def test_two_processes_are_one(shapes: Path, tmp_path: Path) -> None:
    """A run goes from one process to two and back; its text encoder, trained with the U-Net, does too."""
    extra = ["base.steps=8", "base.save_every=2", "base.train_text=true", "base.text_learning_rate=[1e-3]"]
    train(config(shapes, tmp_path / "one", *extra))
    settings = config(shapes, tmp_path / "two", *extra)
    interrupted(settings, after=3)
    result = on_two(ROOT / "train_ldm.py", tmp_path / "two.yaml", f"data.source={shapes}", f"output={tmp_path / 'two'}",
                    *extra)  # fmt: skip
    assert f"going on from {tmp_path / 'two'}/base/checkpoints/step-00000002" in result.stderr
    assert result.stdout == f"{tmp_path / 'two'}/base/model\n"
    checkpoints = tmp_path / "two" / "base" / "checkpoints"
    assert (checkpoints / "step-00000006" / "random_states_1.pkl").exists()  # there were two

    def same() -> None:
        one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
        assert [list(row) for row in two] == [list(row) for row in one]
        for row, expected in zip(two, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-3)
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)

    same()
    shutil.rmtree(checkpoints / "step-00000008")
    (tmp_path / "two" / "base" / "done.json").unlink()
    train(settings)
    same()


def test_two_processes_train_one_stage_after_the_other(shapes: Path, tmp_path: Path) -> None:
    """By the launcher, as a user starts them; each makes its share of the class images."""
    few = ["perceptual_weight=0", "adversarial_weight=0", "steps=2", "batch=8", "sizes=[{size: 32}]"]
    extra = ["stages=[autoencoder,base]", "trackers=[tensorboard]", *(f"autoencoder.{key}" for key in few)]
    config(shapes, tmp_path / "r")  # writes r.yaml
    result = by_launcher(
        ROOT / "train_ldm.py",
        tmp_path / "r.yaml",
        f"data.source={shapes}",
        f"output={tmp_path / 'r'}",
        "base.steps=2",
        *(f"base.prior.{key}" for key in ("prompt=a drawing", "images=3", "batch=1", "steps=1")),
        *extra,
    )
    (made,) = (tmp_path / "r" / "data").glob("class-*/images")
    assert sorted(path.name for path in made.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert "class images: 2 of 2 batches of this process" in result.stderr  # one for the other process
    assert result.stdout == f"{tmp_path / 'r'}/autoencoder/model\n{tmp_path / 'r'}/base/model\n"


def test_a_cache_changes_nothing_but_the_crops_it_holds(shapes: Path, tmp_path: Path) -> None:
    """With a crop in the center there is one in any case: cached or not, the run is the same."""
    train(config(shapes, tmp_path / "live", "data.crop=center"))
    train(config(shapes, tmp_path / "cached", "data.crop=center", "data.cache=true"))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)
    other = config(shapes, tmp_path / "cached", "data.crop=center", "data.cache=true", "precision=bf16", "base.steps=7")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(other)  # does not take what was encoded in fp32
    assert len(list((tmp_path / "cached" / "data").glob("latents-*"))) == 2
    assert len(list((tmp_path / "cached" / "data").glob("texts-*"))) == 2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_attention_by_another_kernel_is_the_same_run(shapes: Path, tmp_path: Path, precision: str) -> None:
    for kernel in ("sdpa", "math"):
        train(config(shapes, tmp_path / kernel, f"base.attention={kernel}", f"precision={precision}", "base.steps=3"))
        AcceleratorState._reset_state(reset_partial_state=True)
    near = 1e-5 if precision == "no" else 2e-2
    assert losses(tmp_path / "math") == pytest.approx(losses(tmp_path / "sdpa"), rel=near)
    with pytest.raises(LdmError, match="attention 'maths' is not known; choose one of: sdpa"):
        train(config(shapes, tmp_path / "wrong", "base.attention=maths"))


# --- the result -------------------------------------------------------------------------------------------------------


def test_diffusers_opens_the_result(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path / "r", "base.steps=2"))
    folder = tmp_path / "r" / "base" / "model"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    expected = theirs("a red circle", generator=torch.Generator().manual_seed(1), **settings).images
    ours = Pipeline(folder, device="cpu", dtype=torch.float32)(
        "a red circle", steps=4, seed=1, rng="diffusers", width=32, height=32, output="latents", weights=False
    )
    torch.testing.assert_close(ours.latents[0], expected[0], atol=1e-4, rtol=1e-4)
    header = read_header(folder / "unet" / "diffusion_pytorch_model.safetensors")[1]
    lineage = json.loads(header[LINEAGE])
    assert lineage["config"]["base"]["steps"] == 2
    assert lineage["data"]["digest"]


def test_previews_and_averages_of_other_widths(shapes: Path, tmp_path: Path) -> None:
    seen = []

    def preview(
        model: LatentDiffusion,
        prompts: list[str],
        size: tuple[int, int],
        seeds: Sequence[int],
        settings: dict[str, int],
    ) -> list[Image.Image]:
        assert settings == {"steps": 20, "batch": None}
        seen.append((prompts, size, seeds))
        return make_images(model, prompts, size, seeds, {"steps": 2})

    train(
        config(shapes, tmp_path / "r", "base.preview_every=3", "base.prompts=[a red circle, a blue square]",
               "base.ema.widths=[0.05, 0.1]", "base.ema.every=2"),
        preview,
    )  # fmt: skip
    assert len(seen) == 2
    assert seen[0] == seen[1] == (["a red circle", "a blue square"], seen[0][1], [0, 1])
    train(config(shapes, tmp_path / "held", "base.preview_every=2", "base.steps=4"), preview)
    held = [image.with_suffix(".txt") for image in sorted(shapes.glob("*.png"))]
    held = [held[index] for index in split(open_images(str(shapes), tmp_path / "index"), 6)[1]]
    assert seen[2] == seen[3]  # always the same, of images that are not trained on
    assert set(seen[2][0]) <= {path.read_text() for path in held}
    assert Image.open(tmp_path / "r" / "base" / "previews" / "step-00000003.png").size[0] > 32
    assert len(list((tmp_path / "r" / "base" / "averages" / "unet").iterdir())) == 6


def test_averages_of_another_width_make_a_model(shapes: Path, tmp_path: Path) -> None:
    """Of the U-Net and of the text encoders that were trained with it; the last update has a snapshot in any case."""
    train(config(shapes, tmp_path / "r", "base.ema.widths=[0.05, 0.1]", "base.steps=3", "base.train_text=true",
                 "base.text_learning_rate=[1e-2]"))  # fmt: skip
    command = [ROOT / "tools" / "recombine_averages.py", tmp_path / "r" / "base", "--width", "0.2"]
    tool = Program(*command, "--out", tmp_path / "wide")
    _, err = tool.communicate()
    assert tool.returncode == 0, err
    wanted = recombine(tmp_path / "r" / "base" / "averages" / "unet", 0.2)
    found, saved = (
        Joint(model.unet, model.text_encoders, model.family).state_dict()
        for model in map(LatentDiffusion.from_pretrained, (tmp_path / "wide", tmp_path / "r" / "base" / "model"))
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = [name for name in found if not torch.equal(found[name], saved[name])]
    assert {name.split(".")[0] for name in changed} == {"unet", "text_encoders"}


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_stop_it(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.training.losses.diffusion import DiffusionLoss

    original = DiffusionLoss.__call__
    calls = 0

    def sometimes(self: DiffusionLoss, prediction: Any, latents: Any, draw: Any, areas: Any = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        values = original(self, prediction, latents, draw, areas)
        return values * torch.tensor([float("nan")] + [1.0] * (len(values) - 1)) if calls == 5 else values

    monkeypatch.setattr(DiffusionLoss, "__call__", sometimes)
    with pytest.raises(LdmError) as caught:
        train(config(shapes, tmp_path / "r"))
    message = str(caught.value)
    assert "the loss of step 5 is not finite (samples here: 0" in message
    assert message.count(".png") == 1
    assert "the last checkpoint is step-00000003" in message
    monkeypatch.undo()
    train(config(shapes, tmp_path / "r"))
    train(config(shapes, tmp_path / "whole"))
    assert weights(tmp_path / "r") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=nowhere"], "nowhere does not exist"),
        (["data.source="], "data.source is not set"),
        (["data.holdout=50"], "leaves none to train with"),
        (["base.batch=1000000"], "44 images: each comes 22727 times or more in one update; set base.batch to 44, or"),
        (["base.sizes=[{size: 500}]"], "base.sizes has 500, which is no multiple of it"),
        (["base.sizes=[{size: 512}]"], "too small for size 512"),
        (["base.ema.widths=[0.5]"], "width 0.5 of an average"),
        (["base.timestep_range=[900, 1200]"], "timesteps"),
        (["model.source=nowhere"], "nowhere"),
        (["data.stream=true", "data.cache=true"], "a stream cannot be cached"),
        (["trackers=[abacus]"], "trackers: Unsupported"),
        (["stages=[base,base]"], "stages is ['base', 'base']: value error, each stage once, in the order autoencoder"),
        (["stages=[refiner,base]"], "each stage once, in the order"),
        (["base.optimizer.cooldown=5"], "base.optimizer.cooldown is 5: value error, a constant learning rate does not"),
        (["precision=fp16"], "precision fp16 needs a GPU"),
        (["base.optimizer.betas=[2,3]"], "base.optimizer.betas.0 is 2: input should be less than 1"),
        (["base.drop_caption=[5]"], "base.drop_caption.0 is 5"),
        (["base.text_learning_rate=[-1]"], "base.text_learning_rate.0 is -1"),
        (
            ["model.family=sd15-inpaint", "model.unet.in_channels=9"],
            "data.beside.mask: the U-Net of custom reads it; name a folder with the same names, or a column of the",
        ),
    ],
)
def test_wrong_settings_are_named(shapes: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(LdmError) as caught:
        train(config(shapes, tmp_path / "r", *overrides))
    assert message in str(caught.value)
    assert not list((tmp_path / "r").rglob("*.safetensors"))


# --- other sources ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "0000.tar"
    with tarfile.open(path, "w") as file:
        for image in sorted(shapes.glob("*.*")):
            file.add(image, image.name)
    return path


def test_shards_train_as_the_folder_does(shapes: Path, shard: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path / "folder"))
    train(config(shard, tmp_path / "shard"))
    assert lines(tmp_path / "shard") == lines(tmp_path / "folder")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_stream_goes_on(shard: Path, tmp_path: Path, workers: int) -> None:
    extra = ["data.stream=true", f"data.workers={workers}"]
    train(config(shard, tmp_path / "whole", *extra))
    settings = config(shard, tmp_path / "parts", *extra)
    interrupted(settings, after=5)
    train(settings)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
