"""A test of training on this machine, with this launcher: small networks, every kind of stage, two minutes.

Each check is a function that yields the problems it finds; all processes make it, and share the problems. The trained
networks are thrown away.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.images import to_tensor
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.conditioning import ConditioningDropout
from ldm.training.config import Config
from ldm.training.layout import METRICS
from ldm.training.log import StepCost
from ldm.training.loop import Training
from ldm.training.parallel.agreement import differences
from ldm.training.run import TrainingRun
from ldm.training.stages.autoencoder import AutoencoderStage
from ldm.training.stages.denoiser import encode_images
from ldm.training.stages.sections import SECTIONS
from ldm.training.stages.stage import Loss, Stage
from ldm.training.stages.table import KINDS, kind_named
from ldm.training.stages.trial import ENCODER, MODEL, SIDE

IMAGES = 32
STEPS = 4
RATE, WARMUP = 1e-3, 2
DRAWS = 4000  # drawn captions, to measure how often one is dropped
COMMON = {
    "steps": STEPS, "sizes": [{"size": SIDE}], "log_every": 1, "save_every": 2, "validate_every": 1000,
    "preview_every": 1000, "optimizer": {"learning_rate": RATE, "warmup": WARMUP},
}  # fmt: skip
Say = Callable[[str, str | None], None]  # a check's name, and its problem, if there is one


@dataclass(frozen=True)
class Ground:
    """The folder and the settings that all checks share."""

    folder: Path  # shared by all processes
    precision: str
    batch: int  # over all processes

    def config(self, name: str, **changes: Any) -> Config:
        """The configuration of a run in a folder of its own; changes are named as `base__steps=2`."""
        dump: dict[str, Any] = {
            "output": str(self.folder / name),
            "precision": self.precision,
            "stages": [kind.name for kind in KINDS],
            "trackers": [],
            "data": {
                "source": str(self.folder / "images"), "holdout": 0, "workers": 0, "buckets": False, "bucket_step": 8,
                "beside": {"condition": "gray"},
            },
            "model": copy.deepcopy(MODEL),
        }  # fmt: skip
        encoder = str(self.folder / "encoder")
        for kind in KINDS:
            own = {key: encoder if value is ENCODER else copy.deepcopy(value) for key, value in kind.trial.items()}
            dump[kind.name] = {**copy.deepcopy(COMMON), "batch": self.batch, **own}
        for place, value in changes.items():
            *path, key = place.split("__")
            section = dump
            for part in path:
                section = section.setdefault(part, {})
            section[key] = value
        read = {kind for name in dump["stages"] for kind in (*SECTIONS[name].beside, *SECTIONS[name].reads)}
        if "condition" not in read:
            del dump["data"]["beside"]
        return Config.model_validate(dump)

    def run(self, name: str, **changes: Any) -> Watched:
        """A run of that configuration, from beginning to end."""
        return Watched(self.config(name, **changes), None, lambda stage, step, steps, figures: None)

    def built(self, name: str, stage: str, **changes: Any) -> tuple[Training, Batch]:
        """A stage of a new run, ready to train, and this process's part of its first batch."""
        run = self.run(name, **changes)
        before = LatentDiffusion.from_family(run.start("base", None).family) if kind_named(stage).own_model else None
        training = run.training(stage, run.start(stage, before), run.folder / stage)
        return training, next(training.batches(0))[0]


class Watched(TrainingRun):
    """A run that keeps its last `Training`."""

    last: Training

    def training(self, name: str, model: LatentDiffusion, folder: Path) -> Training:
        """A stage, ready to train, which is kept too."""
        self.last = super().training(name, model, folder)
        return self.last

    def _work(self, name: str, accelerator: Accelerator) -> Callable[[int], StepCost | None]:
        """Nothing is said of speed: forecasts would take as long as the steps."""
        return lambda step: None


def selftest(folder: Path, precision: str, say: Say) -> bool:
    """Make all checks, and return whether all passed.

    Args:
        folder: empty or new; all processes must see it.
        precision: "no", "fp16" or "bf16".
        say: is called with every result, on the main process.

    Raises:
        LdmError: training is not possible.
    """
    gc.freeze()  # what is imported by now is no garbage, which is searched for after each of the many runs
    accelerator = Accelerator(mixed_precision=precision)
    batch = 4 * accelerator.num_processes
    if batch > IMAGES:
        raise LdmError(f"{accelerator.num_processes} processes: the test is made for {IMAGES // 4} at the most")
    if accelerator.is_main_process:
        lay_out(folder)
    accelerator.wait_for_everyone()
    ground, well = Ground(folder, precision, batch), True
    for check in CHECKS:
        found = [problem for problems in gather_object([list(check(ground))]) for problem in problems]
        well &= not found
        if accelerator.is_main_process:
            say((check.__doc__ or "").splitlines()[0].rstrip("."), found[0] if found else None)
    accelerator.end_training()
    gc.unfreeze()
    return well


def lay_out(ground: Path) -> None:
    """Draw wide images, each with its own caption, where a pixel's colour tells its place; write an image encoder."""
    folder = ground / "images"
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        across, down = np.meshgrid(np.arange(48), np.arange(40))
        pixels = np.stack([across * 5, down * 6, np.full_like(down, number * 7)], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"image number {number}", encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)).save_pretrained(ground / "encoder")


# --- the checks -------------------------------------------------------------------------------------------------------


def all_stages(ground: Ground) -> Iterator[str]:
    """Every stage trains, with the same weights on all processes and the learning rate as configured."""
    run = ground.run("whole")
    for name in run.config.stages:
        run.stage(name, run.start(name, run.before(name)), run.folder / name)
        digest = {player: _digest(one.module.parameters()) for player, one in run.last.stage.players.items()}
        first, *others = gather_object([digest])
        for rank, other in enumerate(others, 1):
            for player, *_ in differences(first, other):
                yield f"{name}: the weights of {player} differ between process 0 and process {rank}"
        for player, one in run.last.stage.players.items():
            rates = {group["lr"] for group in one.optimizer.param_groups}
            if not all(math.isclose(rate, RATE) for rate in rates):
                yield f"{name}: the learning rate of {player} is {rates} after its warm-up, not {RATE}"
    rows = np.genfromtxt(_figures(run.folder / "base" / METRICS, "learning_rate"))
    expected = [RATE * min(step / WARMUP, 1) for step in range(1, STEPS + 1)]
    if not np.allclose(rows, expected):
        yield f"base: learning rates were {rows.tolist()}, not {expected}"


def gradients(ground: Ground) -> Iterator[str]:
    """Each term of each loss has a gradient for the weights that it should train, and for no others."""
    pixels = _gradient(ground, "pixels", kl=0.0, adversarial=0.0)
    for term, other in {
        "the KL term": _gradient(ground, "kl", kl=1.0, adversarial=0.0),
        "the adversarial term": _gradient(ground, "adversarial", kl=0.0, adversarial=1.0),
    }.items():
        if torch.equal(pixels, other):
            yield f"autoencoder: {term} does not reach the weights"
    for name in (kind.name for kind in KINDS):
        training, batch = ground.built(f"gradients-{name}", name)
        training.step = 1  # the adversary takes part
        for loss in training.stage.losses(batch, 1):
            others = {n: p.module for n, p in training.stage.players.items() if n != loss.player}
            before = {n: _grads(module.parameters()) for n, module in others.items()}
            training.accelerator.backward(loss.values.mean())
            for player, module in others.items():
                if not torch.equal(before[player], _grads(module.parameters())):
                    yield f"{name}: the loss of {loss.player} leaks into {player}"
            for weight, parameter in training.stage.players[loss.player].module.named_parameters():
                gradient = parameter.grad
                if parameter.requires_grad and (gradient is None or not gradient.isfinite().all()):
                    yield f"{name}: no gradient, or one that is not finite, at {weight}"
        training.accelerator.free_memory()


def crops(ground: Ground) -> Iterator[str]:
    """Cached latents belong to the crop that the time ids state."""
    training, batch = ground.built("crops", "base", data__cache=True, data__crops=3)
    images = []
    for key, size in zip(batch.keys, batch.size.int().tolist(), strict=True):
        with Image.open(ground.folder / "images" / Path(key).name) as image:
            top, left = size[2:4]
            scale = SIDE / 40  # the shorter side becomes the square's side
            whole = image.convert("RGB").resize((round(48 * scale), SIDE), Image.Resampling.LANCZOS)
            images.append(whole.crop((left, top, left + SIDE, top + SIDE)))
    pixels = to_tensor(images, SIDE, SIDE)
    mean, _ = encode_images(training.stage.model.autoencoder, training.accelerator, pixels)
    assert batch.moments is not None
    cached = batch.moments.chunk(2, dim=1)[0].to(mean)
    if len({tuple(row) for row in batch.size.int().tolist()}) < 2:
        yield "all crops are the same"
    error = (cached - mean).abs().max() / mean.abs().max()
    if error > (1e-2 if ground.precision == "no" else 5e-2):
        yield f"cached latents are not those of the crop in their time ids: they differ by {100 * float(error):.0f} %"
    training.accelerator.free_memory()


def drop_out(ground: Ground) -> Iterator[str]:
    """Captions are dropped at the configured rate."""
    keys = [f"image {number}" for number in range(DRAWS)]
    for rate in (0.1, 0.5):
        found = float(ConditioningDropout((rate,)).captions(0, keys, [0] * DRAWS, 1).float().mean())
        if abs(found - rate) > 5 * math.sqrt(rate * (1 - rate) / DRAWS):
            yield f"{100 * found:.1f} % of the captions are dropped, not {100 * rate:.0f} %"


def resuming(ground: Ground) -> Iterator[str]:
    """A run that is stopped and resumed ends in the same weights as one that is not."""
    results = []
    for name, parts in (("straight", [STEPS]), ("stopped", [STEPS // 2, STEPS])):
        for steps in parts:
            run = ground.run(name, stages=["base"], base__steps=steps)
            run.stage("base", run.start("base", None), run.folder / "base")
        results.append(load_file(run.folder / "base" / "model" / "unet" / "diffusion_pytorch_model.safetensors"))
    straight, stopped = results
    exact = run.accelerator.device.type == "cpu"  # GPUs add in no fixed order
    for key, weight in straight.items():
        near = 0.0 if exact else 1e-4 + 1e-2 * float(weight.abs().max())
        if (difference := float((weight - stopped[key]).abs().max())) > near:
            yield f"{key} differs by up to {difference:.2g} after a stop"
            return


def not_a_number(ground: Ground) -> Iterator[str]:
    """A loss that is not a number, on one process, ends the run on all, and nothing is updated."""
    training, batch = ground.built("nan", "base")
    before = _digest(training.stage.players["unet"].module.parameters())
    last = training.accelerator.process_index == training.accelerator.num_processes - 1
    training.stage = _Broken(training.stage, last)
    try:
        training.train_step([batch])
        yield "a loss that is not a number went unnoticed"
    except LdmError as error:
        if "not finite" not in str(error):
            raise
    if _digest(training.stage.players["unet"].module.parameters()) != before:
        yield "weights were updated with a loss that is not a number"
    training.accelerator.free_memory()


CHECKS: tuple[Callable[[Ground], Iterator[str]], ...] = (
    all_stages, gradients, crops, drop_out, resuming, not_a_number,
)  # fmt: skip


# --- helpers of checks ------------------------------------------------------------------------------------------------


class _Broken:
    """A stage, with losses that are not numbers if `broken`."""

    def __init__(self, stage: Stage, broken: bool) -> None:
        self.stage, self.broken = stage, broken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        for loss in self.stage.losses(batch, step):
            yield Loss(loss.player, loss.values * math.nan if self.broken else loss.values, loss.report)


def _gradient(ground: Ground, name: str, kl: float, adversarial: float) -> Tensor:
    """The autoencoder's gradient with these weights of its terms."""
    training, batch = ground.built(
        f"term-{name}", "autoencoder", autoencoder__kl_weight=kl, autoencoder__adversarial_weight=adversarial
    )
    stage = training.stage
    assert isinstance(stage, AutoencoderStage)
    stage.adaptive.value.fill_(1.0)
    training.accelerator.backward(next(iter(stage.losses(batch, 1))).values.mean())
    found = _grads(stage.players["autoencoder"].module.parameters())
    training.accelerator.free_memory()
    return found


def _grads(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.float().cpu().flatten() for p in parameters])


def _digest(parameters: Iterable[torch.nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _figures(path: Path, name: str) -> list[str]:
    """The values of one figure in a log."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [str(row[name]) for row in rows if name in row]
