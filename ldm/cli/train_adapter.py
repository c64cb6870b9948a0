"""`ldm train-adapter`: a LoRA, or a new word (textual inversion), from a folder of images in one line.

It chooses a configuration for `ldm train` by the model's family, the number of images and the memory that is free, says
which, trains, and makes a sheet of images: with the adapter's weight from 0 to 1.2, or without and with the new word.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.cli.train import train_models
from ldm.data.places import IMAGE_SUFFIXES
from ldm.errors import LdmError, suggestion
from ldm.launch import processes, processes_here, rank
from ldm.limits import free_memory
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import Config, load
from ldm.training.layout import ADAPTER, CHECKPOINTS, CONFIG, DONE, SHEET
from ldm.training.sections import ModelSection

if TYPE_CHECKING:
    import torch

    from ldm.weights.sources import Opened

T = TypeVar("T")
STAGES = {"lora": "adapter", "textual-inversion": "textual-inversion"}  # by kind
VECTORS = 4  # of a new word, at least
WEIGHTS = (0.0, 0.4, 0.8, 1.0, 1.2)  # of the adapter, in the sheet's columns
SEED = 0
EACH = 100  # updates for each image
FEWEST, MOST = 400, 3000  # updates
SMALL_STEPS = 300  # updates of small models, such as the built-in one, by batches of 16
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
            LdmError: the kind is unknown, something is missing or too much, or a key takes the place of the job's.
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
        for one in self.settings():
            if whole := [name for name in named if one.startswith(f"{name}.")]:
                raise LdmError(f"{whole[0]}: a section given as a whole leaves out {one}; set its keys one by one")

    def settings(self, tokens: int = 0) -> list[str]:
        """The job as settings of `ldm train`; `tokens` is the number of the initial words' tokens."""
        named: dict[str, Any] = {
            "data.source": self.images, "model.source": self.model, "output": self.output,
            "data.trigger": self.trigger, f"{self.stage}.prior.prompt": self.class_prompt,
        }  # fmt: skip
        if self.trigger and self.kind == "textual-inversion":
            named[f"{self.stage}.words"] = {self.trigger: {"initial": self.initial, "vectors": max(VECTORS, tokens)}}
        given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value]
        return [*given, f"stages=[{self.stage}]"]


def train_adapter(job: AdapterJob, overrides: Sequence[str]) -> None:
    """Train a LoRA or a new word of a model on a folder of images, and write a sheet of what it does.

    Raises:
        LdmError: the folder holds no images, the output another run, or as `ldm train`.
    """
    job.check([override.partition("=")[0] for override in overrides])
    config = load(None, together(job.settings(), overrides))
    check_paths(config)
    file, given = handed_out(lambda: choice(job, overrides, config))
    train_models(file, given)
    if rank() == 0:
        print(sheet(load(Path(config.output) / CONFIG), job))


def together(chosen: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The settings that the user's do not replace, and then the user's."""
    replaced = tuple(override.partition("=")[0] + end for override in overrides for end in "=.")
    return [*(one for one in chosen if not one.startswith(replaced)), *overrides]


# --- several processes ------------------------------------------------------------------------------------------------


def handed_out(choose: Callable[[], T]) -> T:
    """What the first process chooses, on all processes of the run; its errors, too."""
    if processes() == 1:
        return choose()
    from accelerate.utils import broadcast_object_list

    from ldm.training.precision import run_device

    run_device()  # which makes the processes known to each other
    found: Any = None
    try:
        found = choose() if rank() == 0 else None
    except LdmError as error:
        found = error
    [found] = broadcast_object_list([found])
    if isinstance(found, LdmError):
        raise found
    return found


# --- what is chosen ---------------------------------------------------------------------------------------------------


def choice(job: AdapterJob, overrides: Sequence[str], config: Config) -> tuple[str | None, list[str]]:
    """The configuration to train: a file, if a run goes on as it was chosen, and the settings on top of it.

    Args:
        job: what to train.
        overrides: the user's settings.
        config: both, without what is chosen.

    Raises:
        LdmError: the folder holds no images, or the output another run.
    """
    begun = Path(config.output) / CONFIG
    goes_on = begun.exists() and has_trained(begun.parent)
    count = 0 if goes_on else count_images(Path(config.data.source or ""))
    chosen = job.settings(tokens(config.model, job.initial) if job.initial else 0)
    if goes_on:
        given = together(chosen, overrides)
        check_begun(begun, given, job.stage)
        return str(begun), given
    print("ldm: choosing settings", file=sys.stderr)  # for which PyTorch is imported and the model looked at
    chosen += defaults(count, config, job.stage)
    check_bounds(load(None, together(chosen, overrides)))
    given = fitting(chosen, overrides, saving(config, job.stage))
    print(f"ldm: {count} images: ldm train", *map(shlex.quote, given), file=sys.stderr)
    return None, given


def has_trained(output: Path) -> bool:
    """Whether a run's folder holds anything trained: a run that ended before may be begun again in another way."""
    return any(any(output.glob(f"*/{name}")) for name in (f"{CHECKPOINTS}/step-*", DONE))


def check_begun(begun: Path, given: Sequence[str], stage: str) -> None:
    """Check that settings on top of a run's configuration train the same thing.

    Raises:
        LdmError: they do not.
    """
    both: list[Any] = [load(begun, more).model_dump(mode="json") for more in ((), given)]
    for key in ("stages", "model.source", "data.source", "data.trigger", f"{stage}.prior.prompt", f"{stage}.words"):
        old, new = (reduce(lambda section, name: section.get(name), key.split("."), one) for one in both)
        same = Path(old).absolute() == Path(new).absolute() if key.endswith("source") and old and new else old == new
        if not same:
            raise LdmError(f"{begun.parent} holds a run whose {key} is {old!r}, not {new!r}; choose another --output")


def count_images(folder: Path) -> int:
    """The number of images in a folder and in those within it.

    Raises:
        LdmError: there are none.
    """
    count = sum(path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES for path in folder.rglob("*"))
    if not count:
        raise LdmError(f"{folder} holds no images; name a folder of some 10 to 100")
    return count


def opened(model: ModelSection) -> Opened:
    """The model to adapt, without its weights.

    Raises:
        LdmError: it cannot be opened.
    """
    from ldm.weights.sources import open_source  # PyTorch, only now that there is something to train

    if model.source is None:
        raise LdmError("model.source is null: name a model to adapt")
    return open_source(model.source, family=model.family, components=model.components, verify=False)


def tokens(model: ModelSection, words: str) -> int:
    """The number of tokens of some words, in the model's text encoder that splits them most."""
    return max(len(tokenizer.encode([words])[0]) for tokenizer in opened(model).tokenizers)


def defaults(count: int, config: Config, stage: str) -> list[str]:
    """The settings for so many images, and for the model's family; class images take half of a batch."""
    size = opened(config.model).family.size
    halves = 2 if getattr(config, stage).prior.prompt else 1
    most = 4 if size >= 512 else 16  # images in a batch
    share = -(-min(most // halves, count) // processes())  # of each process
    step = 64 if size >= 512 else max(size // 64 * 8, 8)
    own = {
        "steps": min(max(EACH * count, FEWEST), MOST), "batch": halves * share * processes(),
        "sizes": f"[{{size: {size}}}]", "min_snr": 5, "optimizer.warmup": 50, "optimizer.schedule": "cosine",
        "save_every": 250, "preview_every": 250, **({"layers": "[transformers]"} if stage == "adapter" else {}),
    }  # fmt: skip
    if size < 512:
        own |= {"steps": SMALL_STEPS, "save_every": 100, "preview_every": 100, "attention": "math"}
        own |= SMALL_ADAPTER if stage == "adapter" else SMALL_WORD
    shared = ["precision=auto", "data.cache=true", "data.crops=4", "data.holdout=0", f"data.bucket_step={step}"]
    return [*shared, *(f"{stage}.{key}={value}" for key, value in own.items())]


def saving(config: Config, stage: str) -> list[list[str]]:
    """Settings of a stage that save memory, the fastest first; DoRA needs whole weights."""
    less = [f"{stage}.checkpointing=true"], [f"{stage}.checkpointing=true", f"{stage}.micro_batch=1"]
    rounded = stage == "adapter" and not config.adapter.dora
    return [[], *less, *([[*less[-1], f"{stage}.quantize=int8-weights"]] if rounded else [])]


def fitting(chosen: Sequence[str], overrides: Sequence[str], saving: Sequence[list[str]]) -> list[str]:
    """All settings, with the first saving with which the forecast fits into the free memory, or the last."""
    from ldm.training.forecast import forecast
    from ldm.training.precision import resolved, run_device

    device = run_device()
    free = memory(device)
    for more in saving:
        given = together([*chosen, *more], overrides)
        need = max(row.memory for row in forecast(resolved(load(None, given), device), processes()))
        if need < ROOM * free:
            return given
    told = f"{need / 1e9:.1f} GB of memory are forecast and {free / 1e9:.1f} GB are free: it may not fit"
    print(f"ldm: {told}", file=sys.stderr)
    return given


def memory(device: torch.device) -> int:
    """The free memory of a device for this process, in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // processes_here()


# --- what it does -----------------------------------------------------------------------------------------------------


def sheet(config: Config, job: AdapterJob) -> Path:
    """Images of the run's prompts; the path of their sheet.

    A row for each prompt shows the adapter at several weights; two rows show several seeds without and with a new word.
    """
    from ldm.images import save_png
    from ldm.sheets import labelled
    from pipelines import Pipeline

    folder, section = Path(config.output) / job.stage, getattr(config, job.stage)
    file, columns = folder / ADAPTER, len(WEIGHTS)
    model = {name: value for name, value in config.model if name in ("source", "family", "components") and value}
    prompts = section.prompts or [config.data.trigger or next(iter(getattr(section, "words", ())), "a photo")]
    if job.kind == "lora":
        pipeline = Pipeline(**model)
        calls = [(pipeline, {"adapters": f"{file}:{weight}", "seed": SEED}) for weight in WEIGHTS]
        across, down = [f"LoRA weight {weight}" for weight in WEIGHTS], prompts
    else:
        beside = {"adapters": str(file)} if file.exists() else {}
        rows = [(Pipeline(**model), {}), (Pipeline(**model, embeddings=folder / "embeddings"), beside)]
        calls = [(pipeline, {**call, "seed": SEED + n}) for pipeline, call in rows for n in range(columns)]
        across = [f"seed {SEED + n}" for n in range(columns)]
        down = [f"{word} the word: {prompt}" for prompt in prompts for word in ("without", "with")]
    images = [pipeline(prompt, **call).images[0] for prompt in prompts for pipeline, call in calls]
    path = folder / SHEET
    save_png(labelled(dict(enumerate(images)), across, down), path)
    return path
