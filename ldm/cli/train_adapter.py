"""`ldm train-adapter`: a LoRA, or a new word (textual inversion), from a folder of images in one line.

It chooses a configuration for `ldm train` by the model's family, the number of images and the memory that is free, says
which, trains, and makes a sheet of images: with the adapter's weight from 0 to 1.2, or without and with the new word.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.train import train_models
from ldm.errors import LdmError, suggestion
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import Config, load

if TYPE_CHECKING:
    import torch

STAGES = {"lora": "adapter", "textual-inversion": "textual-inversion"}  # by kind
VECTORS = 4  # of a new word, at least
WEIGHTS = (0.0, 0.4, 0.8, 1.0, 1.2)  # of the adapter, in the sheet's columns
SEED = 0
EACH = 100  # updates for each image
FEWEST, MOST = 400, 3000  # updates
SMALL_STEPS = (
    300  # updates of small models, such as the built-in one, by batches of 16: docs/adapters.md has what they learn
)
SMALL_ADAPTER = {"layers": "[transformers,convolutions]", "rank": 8, "optimizer.learning_rate": 3e-3}
SMALL_WORD = {"optimizer.learning_rate": 1e-2}
ROOM = 0.8  # part of the free memory that the forecast may fill


@dataclass(frozen=True)
class AdapterJob:
    """What to train."""

    images: str  # a folder
    model: str
    output: str
    kind: str = "lora"
    trigger: str = ""  # words in captions that call what is learned
    class_prompt: str = ""  # what it is without them
    initial: str = ""  # words whose embeddings a new word begins with

    @property
    def stage(self) -> str:
        """The kind of stage."""
        return STAGES[self.kind]

    def check(self, named: Collection[str]) -> None:
        """Check the kind and what belongs to it; `named` are the keys that are set besides.

        Raises:
            LdmError: the kind is unknown, or something is missing or too much.
        """
        if self.kind not in STAGES:
            raise LdmError(f"--kind {self.kind!r} is not known; {suggestion(self.kind, list(STAGES))}")
        for name, value in {"IMAGES": self.images, "--model": self.model, "--output": self.output}.items():
            if not value:
                raise LdmError(f"{name} is empty; give a path")
        if "stages" in named:
            raise LdmError("stages: --kind chooses what is trained here; other stages are for ldm train")
        if self.kind == "lora" and self.initial:
            raise LdmError("--initial is for a new word (--kind textual-inversion); leave it out")
        if self.kind != "lora" and self.class_prompt:
            raise LdmError("--class-prompt is for a LoRA; leave it out")
        if self.kind != "lora" and not self.trigger and f"{self.stage}.words" not in named:
            raise LdmError("--trigger names the new word, such as --trigger '<cat-toy>'; captions have it, too")

    def settings(self) -> list[str]:
        """The settings that say it."""
        named: dict[str, Any] = {
            "data.source": self.images, "model.source": self.model, "output": self.output,
            "data.trigger": self.trigger, f"{self.stage}.prior.prompt": self.class_prompt,
        }  # fmt: skip
        if self.trigger and self.kind == "textual-inversion":
            word = {"initial": self.initial, "vectors": max(VECTORS, len(self.initial.split()))}
            named[f"{self.stage}.words"] = {self.trigger: word}
        given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value]
        return [*given, f"stages=[{self.stage}]"]


def train_adapter(job: AdapterJob, overrides: Sequence[str]) -> None:
    """Train a LoRA or a new word of a model on a folder of images, and write a sheet of what it does.

    Raises:
        LdmError: the folder holds no images, or as `ldm train`.
    """
    first = os.environ.get("RANK", "0") == "0"
    named = {override.partition("=")[0] for override in overrides}
    job.check(named)

    def unless_named(settings: Sequence[str]) -> list[str]:
        return [one for one in settings if one.partition("=")[0] not in named]

    given = [*unless_named(job.settings()), *overrides]
    settings = load(None, given)
    check_paths(settings)
    begun = Path(settings.output) / "config.yaml"
    if begun.exists():  # a run that goes on keeps what was chosen for it
        if (stages := load(begun).stages) != settings.stages:
            raise LdmError(f"{settings.output} holds a run of {', '.join(stages)}; choose another --output")
        train_models(str(begun), given)
    else:
        count = count_images(Path(job.images))
        given += unless_named(defaults(count, job))
        check_bounds(load(None, given))
        given += fitting(given, [unless_named(more) for more in saving(job.stage)])
        if first:
            print(f"ldm: {count} images: ldm train", *map(shlex.quote, given), file=sys.stderr)
        train_models(None, given)
    if first:
        print(sheet(load(begun), job))


def count_images(folder: Path) -> int:
    """The number of images in a folder and in those within it.

    Raises:
        LdmError: there are none.
    """
    from ldm.data.image_set import IMAGE_SUFFIXES

    count = sum(path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES for path in folder.rglob("*"))
    if not count:
        raise LdmError(f"{folder} holds no images; name a folder of some 10 to 100")
    return count


def defaults(count: int, job: AdapterJob) -> list[str]:
    """The settings for so many images, and for the model's family; class images take half of a batch."""
    from ldm.weights.sources import open_source  # PyTorch, only now that there is something to train

    size = open_source(job.model, verify=False).family.size
    most = 4 if size >= 512 else 16  # images in a batch
    batch = 2 * min(most // 2, count) if job.class_prompt else min(most, count)
    step = 64 if size >= 512 else max(size // 64 * 8, 8)
    own = {
        "steps": min(max(EACH * count, FEWEST), MOST), "batch": batch, "sizes": f"[{{size: {size}}}]",
        "min_snr": 5, "optimizer.warmup": 50, "optimizer.schedule": "cosine", "save_every": 250, "preview_every": 250,
        **({"layers": "[transformers]"} if job.stage == "adapter" else {}),
    }  # fmt: skip
    if size < 512:
        own |= {"steps": SMALL_STEPS, "save_every": 100, "preview_every": 100, "attention": "math"}
        own |= SMALL_ADAPTER if job.stage == "adapter" else SMALL_WORD
    shared = ["precision=auto", "data.cache=true", "data.crops=4", "data.holdout=0", f"data.bucket_step={step}"]
    return [*shared, *(f"{job.stage}.{key}={value}" for key, value in own.items())]


def saving(stage: str) -> list[list[str]]:
    """Settings of a stage that save memory, the fastest first."""
    less = [f"{stage}.checkpointing=true"], [f"{stage}.checkpointing=true", f"{stage}.micro_batch=1"]
    return [[], *less, *([[*less[-1], f"{stage}.quantize=int8-weights"]] if stage == "adapter" else [])]


def fitting(given: Sequence[str], saving: Sequence[list[str]]) -> list[str]:
    """The first of some settings with which the run's forecast fits into the free memory of its device, or the last."""
    from ldm.training.forecast import forecast
    from ldm.training.precision import resolved, run_device

    device = run_device()
    free = ROOM * memory(device)
    fit = (more for more in saving if forecast(resolved(load(None, [*given, *more]), device))[0].memory < free)
    return next(fit, saving[-1])


def memory(device: torch.device) -> int:
    """The free memory of a device, in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sheet(config: Config, job: AdapterJob) -> Path:
    """Images of the run's prompts; the path of their sheet.

    A row for each prompt shows the adapter at several weights; two rows show several seeds without and with a new word.
    """
    from ldm.images import grid, save_png
    from pipelines import Pipeline

    folder, source = Path(config.output) / job.stage, config.model.source
    file, columns = folder / "adapter.safetensors", len(WEIGHTS)
    prompts = getattr(config, job.stage).prompts or [job.trigger or "a photo"]
    if job.kind == "lora":
        pipeline = Pipeline(source)
        calls = [(pipeline, {"adapters": f"{file}:{weight}", "seed": SEED}) for weight in WEIGHTS]
    else:
        beside = {"adapters": str(file)} if file.exists() else {}
        rows = [(Pipeline(source), {}), (Pipeline(source, embeddings=folder / "embeddings"), beside)]
        calls = [(pipeline, {**call, "seed": SEED + n}) for pipeline, call in rows for n in range(columns)]
    images = [pipeline(prompt, **call).images[0] for prompt in prompts for pipeline, call in calls]
    path = folder / "sheet.png"
    save_png(grid(images, columns=columns), path)
    return path
