"""A run: the stages of a configuration one after the other, each from where it stopped, each ending in a model folder.

runs/x/config.yaml        the whole configuration, defaults included
runs/x/data/              index of the images, list of those that cannot be used, caches
runs/x/base/              of each stage: checkpoints/, previews/, averages/, metrics.jsonl
runs/x/base/evaluation/   reports on images that it makes, if they are asked for (`ldm.training.evaluator`)
runs/x/base/model/        its result, a folder that diffusers opens; model.safetensors, the same as a single file
runs/x/text/clip/         besides, of the stage text: the image encoder (`ldm.weights.contrastive.load_clip`)
runs/x/base/done.json     written last
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from accelerate import Accelerator

import ldm
from ldm.data.cache import Latents, Texts, build_latents, build_texts
from ldm.data.framing import Framing, choose_buckets
from ldm.data.image_set import ImageSet, made
from ldm.data.loader import Batch, Loader, once
from ldm.data.plan import BatchPlan, split
from ldm.data.sources import open_images, open_stream
from ldm.data.streams import StreamPlan
from ldm.errors import LdmError, first_line
from ldm.evaluation.plan import EvaluationPlan
from ldm.evaluation.workspace import Ranks, Workspace
from ldm.files import read_json, replacing, write_json
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.runtime.compilation import check_compiling
from ldm.runtime.kernels.memory import keep_freed
from ldm.training.conditioning import encode
from ldm.training.config import Config, DataSection, DenoiserSection, EvaluationSection, StageName, StageSection, dump
from ldm.training.evaluator import Best, Evaluator, check_evaluation, evaluation_plan
from ldm.training.forecast import Forecast, forecast, peak_tflops
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.loop import Report, StepCost, Training, in_parts
from ldm.training.parallel.agreement import check_agreement, differences
from ldm.training.parallel.sharded import is_sharded
from ldm.training.phases import Phase, phases
from ldm.training.stages.autoencoder import AutoencoderStage
from ldm.training.stages.denoiser import DenoiserStage, encode_images
from ldm.training.stages.stage import MakeImages, Stage
from ldm.training.stages.text import ContrastiveStage, check_differ
from ldm.training.start import starting_model
from ldm.weights.components import fingerprint

log = logging.getLogger(__name__)
LOOKED_AT = 10_000  # captions, to see whether they are too long
EVERY = 10.0  # seconds between lines about a cache that is built


@dataclass(frozen=True)
class TrainingImages:
    """What a run trains on: images with random access, or a stream."""

    section: DataSection
    folder: Path  # of indexes and caches
    images: ImageSet | None = None

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the images to train with, and of those that are held out. Raises as `split`."""
        assert self.images is not None
        return split(self.images, self.section.holdout)

    @cached_property
    def digest(self) -> str | None:
        """Names the set of images and captions, wherever it lies; nothing names a stream."""
        if self.images is None:
            return None
        digest = hashlib.sha256()
        for row in zip(self.images.all_keys(), self.images.all_captions(), *self.images.sizes(), strict=True):
            digest.update(ascii(row).encode())
        return digest.hexdigest()[:16]

    def notice_changes(self) -> None:
        """Say how many images there are, and whether they are still those that the run began with."""
        assert self.images is not None
        name, bad = self.images.source.name, len(self.images.skipped.reasons)
        log.info(
            "%s: %d images%s", name, len(self.images), f"; {bad} cannot be used: {self.images.skipped.path}" * bool(bad)
        )
        path, old = self.folder / "images.json", self.folder / "images.json"
        if old.exists():  # of a run that an earlier version began
            old.replace(path)
        now = {"digest": self.digest, "images": len(self.images)}
        try:
            before = read_json(path) if path.exists() else now
        except LdmError:
            before = now
        if before.get("digest") != now["digest"]:
            log.warning(
                "%s has changed since this run began (%s images then, %d now): it goes on with what is there now",
                name, before.get("images"), len(self.images),
            )  # fmt: skip
        with replacing(path, folder=False, overwrite=True, need=0) as temporary:
            write_json(temporary, now)

    def framing(self, size: int) -> Framing:
        """Buckets and crops at a size."""
        data = self.section
        return Framing(
            size, data.buckets, data.bucket_step, data.aspect, data.crop, data.crops if data.cache else 0, data.flip,
            data.upscale,
        )  # fmt: skip


@dataclass(frozen=True)
class Caches:
    """What has been encoded before."""

    latents: list[Latents] | None = None  # of each resolution
    texts: Callable[[list[list[str]]], Conditioning] | None = None


class Caching:
    """Says now and then how far a cache is."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.said > EVERY:
            self.said = time.monotonic()
            log.info("encoding %s: %d of %d", self.what, done, total)


class TrainingRun:
    """Everything that the stages of a run share."""

    def __init__(self, config: Config, make_images: MakeImages | None, report: Report) -> None:
        self.config = config
        self.make_images = make_images
        self.report = report
        self.folder = Path(config.output)
        try:
            self.accelerator = Accelerator(mixed_precision=config.precision)
        except ValueError as error:
            raise LdmError(f"precision {config.precision}: {first_line(error)}") from None
        if config.precision == "fp16" and self.accelerator.device.type == "cpu":
            raise LdmError("precision fp16 needs a GPU, and none is used here; set precision=bf16 or precision=no")
        check_agreement({"ldm": ldm.__version__, "torch": torch.__version__, **config.model_dump(mode="json")})
        self.lock = self._open_folder()
        self.data = self._open_data()

    def _tracked(self, folder: Path) -> Accelerator:
        """An accelerator for one stage: what is prepared with it is what checkpoints hold; its log goes to trackers."""
        wanted = self.config.trackers
        try:
            accelerator = Accelerator(
                mixed_precision=self.config.precision, log_with=list(wanted) or None, project_dir=str(folder)
            )
        except ValueError as error:
            raise LdmError(f"trackers: {first_line(error)}") from None
        found = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
        for name in wanted:
            if name not in found:
                raise LdmError(f"tracker {name} is not installed: pip install {name}, or leave it out (trackers=[])")
        accelerator.init_trackers("log")
        return accelerator

    def _open_folder(self) -> BinaryIO | None:
        """Write the configuration into the run's folder, this process's alone while the returned file is open."""
        path = self.folder / "config.yaml"
        if not self.accelerator.is_main_process:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("wb")
            before = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
        except OSError as error:
            raise LdmError(f"output {self.folder} cannot be used: {error.strerror}") from None
        except yaml.YAMLError:
            before = None
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: processes that load images would have it too
        except (BlockingIOError, PermissionError):
            raise LdmError(
                f"output {self.folder} is in use by another run; wait for its end, or choose another output"
            ) from None
        except OSError:
            pass  # a file system without locks
        now = self.config.model_dump(mode="json")
        for name, old, new in differences(before, now) if isinstance(before, dict) else ():
            log.warning("%s was %r when this run began, and is %r now", name, old, new)
        with replacing(path, folder=False, overwrite=True, need=0) as temporary:
            temporary.write_text(dump(self.config), encoding="utf-8")
        return lock

    def _open_data(self) -> TrainingImages:
        data = self.config.data
        if not data.source:
            raise LdmError("data.source is not set: name a folder of images, shards, or a dataset")
        folder = self.folder / "data"
        if data.stream:
            if data.cache:
                raise LdmError("data.cache: a stream cannot be cached; copy it to a disk, or set data.stream=false")
            return TrainingImages(data, folder)
        with self.accelerator.main_process_first():  # the first one makes the index, the others read it
            images = open_images(
                data.source, folder, captions=data.captions, split=data.split, caption_column=data.caption_column
            )
            opened = TrainingImages(data, folder, images)
        if self.accelerator.is_main_process:
            opened.notice_changes()
        check_agreement({"the number of images": len(images), "the digest of images": opened.digest})
        return opened

    # --- stages -----------------------------------------------------------------------------------------------------

    def all(self) -> None:
        """Every stage, in order; one that is done is loaded."""
        self._check_evaluations()
        model: LatentDiffusion | None = None
        for name in self.config.stages:
            folder = self.folder / name
            if self._done(name):
                log.info("stage %s is done: %s", name, folder / "model")
                model = LatentDiffusion.from_pretrained(folder / "model", dtype=torch.float32)
                continue
            model = self.stage(name, self.start(name, model), folder)
        self.accelerator.end_training()

    def _done(self, name: StageName) -> bool:
        """Whether a stage has reached its end, and the configuration does not ask for more steps since."""
        path = self.folder / name / "done.json"
        try:
            return path.exists() and int(read_json(path)["steps"]) >= getattr(self.config, name).steps
        except (LdmError, KeyError, TypeError, ValueError):
            log.warning("%s is damaged; the end of the stage is done again", path)
            return False

    def start(self, name: StageName, model: LatentDiffusion | None) -> LatentDiffusion:
        """What a stage starts from: the stage before, or what the configuration names."""
        config = self.config
        if name == "refiner":
            return _refiner(starting_model(config.refiner.model, config.seed, "refiner.model"), config, model)
        return model or starting_model(config.model, config.seed)

    def stage(self, name: StageName, model: LatentDiffusion, folder: Path) -> LatentDiffusion:
        """Train one stage to its end, and write its result.

        Raises:
            LdmError: see `Training.run`.
        """
        training = self.training(name, model, folder)
        record = training.run()
        accelerator, stage = training.accelerator, training.stage
        for player in stage.players.values():
            accelerator.unwrap_model(player.module, keep_fp32_wrapper=False)
        if training.best:
            best = training.best
            log.info(
                "stage %s ends with the weights after %d updates, %s, whose %s of %.4g is the best",
                name, best.step, best.average, best.metric, best.value,
            )  # fmt: skip
        with training.result():
            self._write_result(accelerator, stage, folder, record, training.best)
        for tracker in accelerator.trackers:  # not `end_training`: the next stage needs the process group
            tracker.finish()
        accelerator.free_memory()
        return LatentDiffusion.from_pretrained(folder / "model", dtype=torch.float32)

    def training(self, name: StageName, model: LatentDiffusion, folder: Path) -> Training:
        """A stage, ready to train."""
        section: StageSection = getattr(self.config, name)
        made(folder)
        accelerator = self._tracked(folder)
        for module in model.modules().values():
            _own(module, accelerator.device)
        check_agreement({f"the weights of {part}": fingerprint({part: m}) for part, m in model.modules().items()})
        if name != "autoencoder":
            self._warn_of_long_captions(model)
        caches = self._caches(accelerator, section, model) if name in ("base", "refiner") else Caches()
        stage = self._make(name, section, model, accelerator, caches)
        if accelerator.device.type == "cpu":
            keep_freed()
        for player in stage.players.values():
            if section.checkpointing:
                checkpointed(player.module)
            if section.compile:
                check_compiling(accelerator.device)
                player.module.compile()
            if accelerator.device.type == "cuda" and not is_sharded(accelerator, stage):
                player.module.to(memory_format=torch.channels_last)  # as a GPU's convolutions compute

        def report(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
            accelerator.log(figures, step)
            self.report(stage, step, steps, figures)

        return Training(
            accelerator, stage, folder,
            partial(self._batches, accelerator, section, caches),
            partial(self._held_out, accelerator, section),
            report,
            self._work(name, accelerator),
            self._evaluator(name, section, model, accelerator, folder),
        )  # fmt: skip

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _check_evaluations(self) -> None:
        """Refuse evaluations that cannot be made before the first stage begins."""
        for name in self.config.stages:
            section = getattr(self.config, name)
            if isinstance(section, DenoiserSection) and section.evaluation.every:
                check_evaluation(name, self._evaluation_plan(section.evaluation, "cpu"))
                if self.make_images is None:
                    raise LdmError(f"{name}.evaluation.every: nothing is given that makes images (make_images)")

    def _evaluation_plan(self, section: EvaluationSection, device: str) -> EvaluationPlan:
        images = self.data.images
        return evaluation_plan(section, images, self.data.rows if images else (), device)

    def _evaluator(
        self, name: str, section: StageSection, model: LatentDiffusion, accelerator: Accelerator, folder: Path
    ) -> Evaluator | None:
        """What evaluates a stage's images, if that is asked for."""
        if self.make_images is None or not isinstance(section, DenoiserSection) or not section.evaluation.every:
            return None
        plan = self._evaluation_plan(section.evaluation, str(accelerator.device))
        ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        work = Workspace(folder / "evaluation", ranks, cache=self.folder / "data" / "evaluation")
        return Evaluator(name, section, plan, model, self.make_images, self.config.precision, work)

    # --- what a stage needs -----------------------------------------------------------------------------------------

    def _warn_of_long_captions(self, model: LatentDiffusion) -> None:
        """Say how many captions are longer than the text encoders read, judged by some of them."""
        some = self.data.images.captions()[:LOOKED_AT] if self.data.images else []
        room = min(config.context for config in model.family.text) - 2  # start and end
        long = sum(len(ids) > room for ids in model.text_encoders.tokenizers[0].encode(some))
        if long:
            log.warning("%d of %d captions have over %d tokens; what is beyond is not read", long, len(some), room)

    @cached_property
    def forecasts(self) -> list[Forecast]:
        """Of all stages at once: what a later one cannot be built from is refused before the first one begins."""
        return forecast(self.config, self.accelerator.num_processes)

    def _work(self, name: StageName, accelerator: Accelerator) -> Callable[[int], StepCost]:
        """What an image costs at each step of a stage."""
        rows = [row for row in self.forecasts if row.stage == name]
        peak = peak_tflops(accelerator.device, self.config.precision)
        starts = [phase.end for phase in phases(getattr(self.config, name))]
        return lambda step: StepCost(rows[bisect_right(starts, step)].flops_per_image / 1e12, peak)

    def _make(
        self, name: StageName, section: Any, model: LatentDiffusion, accelerator: Accelerator, caches: Caches
    ) -> Stage:
        seed = self.config.seed
        sides = [pair for phase in phases(section) for pair in self.data.framing(phase.size).sides()]
        if name == "autoencoder":
            again = partial(self._batches, accelerator, section, caches, phases(section)[-1].first)
            return AutoencoderStage(section, model, accelerator, seed, sides, lambda: chain.from_iterable(again()))
        if name == "text":
            if self.data.images is not None:
                check_differ(self.data.images, self.data.rows[0])
            return ContrastiveStage(section, model, accelerator, seed, sides, self.folder / name)
        return DenoiserStage(name, section, model, accelerator, seed, self.make_images, caches.texts)

    def _write_result(
        self, accelerator: Accelerator, stage: Stage, folder: Path, record: dict[str, Any], best: Best | None
    ) -> None:
        """The model folder, the single file where there is such a layout, and the mark that the stage is done."""
        if accelerator.is_main_process:
            chosen = {"chosen": asdict(best)} if best else {}
            lineage = {
                "code": f"ldm {ldm.__version__}",
                "stage": stage.name,
                "steps": stage.section.steps,
                "data": {"source": self.config.data.source, "digest": self.data.digest},
                "parents": self._parents(stage.name),
                "metrics": record,
                **chosen,
                "config": self.config.model_dump(mode="json", exclude={"output"}),
            }
            text = json.dumps(lineage)
            stage.model.save_pretrained(folder / "model", overwrite=True, lineage=text)
            try:
                stage.model.save_pretrained(folder / "model.safetensors", overwrite=True, lineage=text)
            except LdmError as error:
                log.warning("no single file: %s", error)
            with replacing(folder / "done.json", folder=False, overwrite=True, need=0) as temporary:
                write_json(temporary, {"steps": stage.section.steps, "metrics": record, **chosen})
        accelerator.wait_for_everyone()

    def _parents(self, name: str) -> list[str]:
        """What a stage started from: the stage before it, or a model from elsewhere."""
        before = self.config.stages[: [str(stage) for stage in self.config.stages].index(name)]
        earlier = [str(self.folder / before[-1] / "model")] if before else []
        if name == "refiner":
            own = self.config.refiner.model
            return [str(own.source)] if own.source else [*earlier, str(own.family or own.usual)]
        return earlier or [str(self.config.model.source or self.config.model.family)]

    # --- batches ----------------------------------------------------------------------------------------------------

    def _plan(self, phase: Phase, held_out: bool = False) -> BatchPlan | StreamPlan | None:
        """The batches of a phase, or the held-out images, if there are any that are large enough."""
        data, config = self.data, self.config
        framing = data.framing(phase.size)
        if data.images is None:
            assert config.data.source
            stream = open_stream(config.data.source, split=config.data.split, caption_column=config.data.caption_column)
            rank = self.accelerator.process_index
            return StreamPlan(stream, framing, phase.batch, config.seed, data.folder, config.data.captions, rank=rank)
        rows = data.rows[held_out]
        if held_out:
            framing = replace(framing, crop="center", crops=0, flip=False)
            width, height = (lengths[rows] for lengths in data.images.sizes())
            if (choose_buckets(framing, width, height)[1] > framing.upscale).all():
                return None
        return BatchPlan(data.images, framing, phase.batch, config.seed, rows)

    def _batches(
        self, accelerator: Accelerator, section: StageSection, caches: Caches, start: int
    ) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `start` on, through all resolutions."""
        for number, phase in enumerate(phases(section)):
            if phase.end <= start:
                continue
            parts = phase.parts(accelerator.num_processes)
            plan = self._plan(phase)
            assert plan is not None
            if isinstance(plan, BatchPlan):
                log.info("size %d: %s", phase.size, plan)
            loader = Loader(
                plan, start=max(start, phase.first) - phase.first, rank=accelerator.process_index,
                world=accelerator.num_processes, micro_batches=parts, workers=self.config.data.workers,
                device=accelerator.device, latents=caches.latents[number] if caches.latents else None,
            )  # fmt: skip
            steps = in_parts(iter(loader), parts)
            for _ in range(max(start, phase.first), phase.end):
                yield next(steps)

    def _held_out(self, accelerator: Accelerator, section: StageSection) -> Iterable[Batch]:
        """This rank's share of the held-out images, at the last resolution."""
        if self.data.images is None or not self.config.data.holdout:
            return ()
        phase = phases(section)[-1]
        plan = self._plan(phase, held_out=True)
        if not isinstance(plan, BatchPlan):
            return ()
        rows = phase.micro_batch or max(phase.batch // accelerator.num_processes, 1)
        return once(plan, rows, accelerator.process_index, accelerator.num_processes, accelerator.device)

    def _caches(self, accelerator: Accelerator, section: StageSection, model: LatentDiffusion) -> Caches:
        """Latents at every resolution and texts, encoded where they are not yet."""
        if not self.config.data.cache:
            return Caches()
        folder, images = self.data.folder, self.data.images
        assert images is not None
        rank, world = accelerator.process_index, accelerator.num_processes
        latents_of, texts = (  # in 16 bits, the same network gives other numbers
            f"{fingerprint(network)} {self.config.precision}"
            for network in ({"vae": model.autoencoder}, {"text": model.text_encoders})
        )

        @torch.no_grad()
        def encode_captions(captions: list[str]) -> dict[str, torch.Tensor]:
            with accelerator.autocast():
                cond = encode(model.text_encoders, [captions] * len(model.family.text))
            return {"text": cond.text} | ({} if cond.pooled is None else {"pooled": cond.pooled})

        plans = [self._plan(phase) for phase in phases(section)]
        for plan in plans:
            assert isinstance(plan, BatchPlan)
            build_latents(
                folder, plan, latents_of, partial(encode_images, model.autoencoder, accelerator),
                workers=self.config.data.workers, rank=rank, world=world,
                report=Caching("images"),
            )  # fmt: skip
        train_text = getattr(section, "train_text", False)
        if not train_text:
            build_texts(
                folder, images.captions(), texts, encode_captions, rank=rank, world=world, report=Caching("captions")
            )
        accelerator.wait_for_everyone()
        found = [Latents(folder, plan, latents_of) for plan in plans if isinstance(plan, BatchPlan)]
        if train_text:
            return Caches(found)
        return Caches(found, _cached_encode(Texts(folder, texts), model, accelerator.device))


def _cached_encode(
    cache: Texts, model: LatentDiffusion, device: torch.device
) -> Callable[[list[list[str]]], Conditioning]:
    """As `conditioning.encode`, from the cache; each text encoder's channels from its own text."""
    widths = [config.width for config in model.family.text]

    def read(texts: list[list[str]]) -> Conditioning:
        columns = [cache.read(column) for column in texts]
        parts = [column["text"].split(widths, dim=-1)[k] for k, column in enumerate(columns)]
        pooled = columns[-1].get("pooled")
        return Conditioning(torch.cat(parts, dim=-1).to(device), None if pooled is None else pooled.to(device))

    return read


def _own(module: torch.nn.Module, device: torch.device) -> None:
    """Weights on the device, in memory of their own: those that are mapped from a file cannot be updated."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, torch.float32, copy=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _refiner(model: LatentDiffusion, config: Config, base: LatentDiffusion | None) -> LatentDiffusion:
    """A refiner that is built anew takes the base's autoencoder, and its last text encoder where it has the same."""
    if base is None or config.refiner.model.source is not None:
        return model
    model.family = replace(model.family, autoencoder=base.family.autoencoder, preview=base.family.preview)
    model.networks["autoencoder"] = base.autoencoder
    if model.family.text[-1] == base.family.text[-1]:
        model.text_encoders.towers[-1] = base.text_encoders.towers[-1]
        model.text_encoders.tokenizers = base.text_encoders.tokenizers[-1:]
    return model


def train(
    config: Config,
    make_images: MakeImages | None = None,
    report: Report = lambda stage, step, steps, figures: None,
) -> None:
    """Train what a configuration says; the same call again goes on where it stopped.

    Args:
        config: the run.
        make_images: makes images with a model, for previews and evaluation.
        report: takes the lines of the log, on the main process.

    Raises:
        LdmError: in one line, what is wrong and what to do.
        Stopped: a signal asked for it; a checkpoint was written.
    """
    TrainingRun(config, make_images, report).all()
