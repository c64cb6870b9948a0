"""`ldm train-adapter`: a LoRA from a folder of images in one line.

It chooses a configuration for `ldm train` by the model's family, the number of images and the memory that is free, says
which, trains, and makes a sheet of images with the adapter's weight from 0 to 1.2.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.train import train_models
from ldm.errors import LdmError
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import Config, load

if TYPE_CHECKING:
    import torch

WEIGHTS = (0.0, 0.4, 0.8, 1.0, 1.2)  # of the adapter, in the sheet's columns
SEED = 0
EACH = 100  # updates for each image
FEWEST, MOST = 400, 3000  # updates
ROOM = 0.8  # part of the free memory that the forecast may fill
SAVING: list[list[str]] = [  # settings that save memory, the fastest first
    [], ["adapter.checkpointing=true"], ["adapter.checkpointing=true", "adapter.micro_batch=1"],
    ["adapter.checkpointing=true", "adapter.micro_batch=1", "adapter.quantize=int8-weights"],
]  # fmt: skip


def train_adapter(
    images: str, model: str, trigger: str, class_prompt: str, output: str, overrides: Sequence[str]
) -> None:
    """Train a LoRA of a model on a folder of images, and write a sheet of what it does.

    Raises:
        LdmError: the folder holds no images, or as `ldm train`.
    """
    first = os.environ.get("RANK", "0") == "0"
    named = {override.partition("=")[0] for override in overrides}

    def unless_named(settings: Sequence[str]) -> list[str]:
        return [one for one in settings if one.partition("=")[0] not in named]

    named_by = {
        "data.source": images, "model.source": model, "output": output, "data.trigger": trigger,
        "adapter.prior.prompt": class_prompt,
    }  # fmt: skip
    given = [f"{key}={json.dumps(text, ensure_ascii=False)}" for key, text in named_by.items() if text]
    given = [*unless_named([*given, "stages=[adapter]"]), *overrides]
    settings = load(None, given)
    check_paths(settings)
    begun = Path(settings.output) / "config.yaml"
    if begun.exists():  # a run that goes on keeps what was chosen for it
        train_models(str(begun), given)
    else:
        count = count_images(Path(images))
        given += unless_named(defaults(count, model, bool(class_prompt)))
        check_bounds(load(None, given))
        given += fitting(given, [unless_named(more) for more in SAVING])
        if first:
            print(f"ldm: {count} images: ldm train", *map(shlex.quote, given), file=sys.stderr)
        train_models(None, given)
    if first:
        print(sheet(load(begun), trigger))


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


def defaults(count: int, model: str, halved: bool = False) -> list[str]:
    """The settings for so many images, and for the model's family; class images take half of a batch."""
    from ldm.weights.sources import open_source  # PyTorch, only now that there is something to train

    size = open_source(model, verify=False).family.size
    batch = 2 * min(2, count) if halved else min(4, count)
    step = 64 if size >= 512 else max(size // 64 * 8, 8)
    return [
        "precision=auto", "data.cache=true", "data.crops=4", "data.holdout=0", f"data.bucket_step={step}",
        "adapter.layers=[transformers]", f"adapter.steps={min(max(EACH * count, FEWEST), MOST)}",
        f"adapter.batch={batch}", f"adapter.sizes=[{{size: {size}}}]", "adapter.min_snr=5",
        "adapter.optimizer.warmup=50", "adapter.optimizer.schedule=cosine", "adapter.save_every=250",
        "adapter.preview_every=250",
    ]  # fmt: skip


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


def sheet(config: Config, trigger: str) -> Path:
    """Images of the run's prompts, one in each row, by weights of the adapter; the path of their sheet."""
    from ldm.images import grid, save_png
    from pipelines import Pipeline

    folder = Path(config.output) / "adapter"
    pipeline = Pipeline(config.model.source)
    images = [
        pipeline(prompt, seed=SEED, adapters=f"{folder / 'adapter.safetensors'}:{weight}").images[0]
        for prompt in config.adapter.prompts or [trigger or "a photo"]
        for weight in WEIGHTS
    ]
    path = folder / "sheet.png"
    save_png(grid(images, columns=len(WEIGHTS)), path)
    return path
