"""A run: the stages of a configuration one after the other, each from where it stopped, each ending in a model folder.

runs/x/config.yaml        the whole configuration, defaults included; precision as it is on the run's device
runs/x/data/              index of the images, list of those that cannot be used, caches
runs/x/base/              of each stage: checkpoints/, previews/, averages/, metrics.jsonl
runs/x/base/evaluation/   reports on images made while training, if asked for (`ldm.training.evaluator`)
runs/x/base/model/        its result, a diffusers folder; model.safetensors, the same as a single file
runs/x/text/clip/         also, of the stage text: the image encoder (`ldm.weights.contrastive.load_clip`)
runs/x/base/done.json     written last
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import ldm
from ldm.data.image_set import made
from ldm.data.plan import BatchPlan
from ldm.errors import LdmError, first_line
from ldm.evaluation.features import digest_of
from ldm.evaluation.plan import EvaluationPlan
from ldm.evaluation.workspace import Ranks, Workspace
from ldm.families import Family
from ldm.latent_diffusion import LatentDiffusion
from ldm.runtime.compilation import check_compiling
from ldm.runtime.kernels.memory import keep_freed
from ldm.runtime.waiting import watch
from ldm.training.batches import StageBatches, batch_plan, check_batch
from ldm.training.caching import Caches, build_caches
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import NUMBERS, Config
from ldm.training.evaluator import Evaluator, check_evaluation, evaluation_plan
from ldm.training.folder import is_done, model_before, open_folder, write_result
from ldm.training.forecast import Forecast, forecast, peak_tflops
from ldm.training.frozen import matrices, numbers
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.images import TrainingImages, open_training_images
from ldm.training.layout import EVALUATION
from ldm.training.log import Report, StepCost
from ldm.training.loop import Training
from ldm.training.parallel.agreement import check_agreement
from ldm.training.parallel.sharded import is_sharded
from ldm.training.phases import phases
from ldm.training.precision import costs, resolved, run_device
from ldm.training.prior import Prior, check_prior, class_images
from ldm.training.sections import EvaluationSection, StageSection
from ldm.training.stages.sections import DenoiserSection
from ldm.training.stages.stage import Cached, MakeImages, Stage, StageInputs
from ldm.training.stages.table import kind_named
from ldm.training.stages.tasks import check_task
from ldm.training.start import starting_model
from ldm.weights.components import fingerprint

log = logging.getLogger(__name__)
SOME = 10_000  # captions that are tokenised to find how many are too long


class TrainingRun:
    """A run: its data, its folder, and each of its stages from start to result."""

    def __init__(self, config: Config, make_images: MakeImages | None, report: Report) -> None:
        check_bounds(config)
        check_paths(config)
        device, wanted = run_device(), config.precision
        self.config = config = resolved(config, device)
        self.make_images = make_images
        self.report = report
        self.folder = Path(config.output)
        try:
            self.accelerator = Accelerator(mixed_precision=config.precision)
        except ValueError as error:
            raise LdmError(f"precision {config.precision}: {first_line(error)}") from None
        if self.accelerator.is_main_process:
            log.info("precision %s: computing in %s on %s", wanted, NUMBERS[config.precision], device.type)
            if cost := costs(device, wanted):
                log.warning(cost)
        if config.precision == "fp16" and self.accelerator.device.type == "cpu":
            raise LdmError("precision fp16 needs a GPU, and this run uses none; set precision=auto")
        check_agreement({"ldm": ldm.__version__, "torch": torch.__version__, **config.model_dump(mode="json")})
        self.lock = open_folder(config) if self.accelerator.is_main_process else None
        self.data = open_training_images(config.data, self.folder / "data", self.accelerator)

    def all(self) -> None:
        """Run every stage, in order; of a stage that is done, the result is read."""
        left = [name for name in self.config.stages if not is_done(self.folder / name, self.section(name).steps)]
        for name in left:
            self._check(name)
        for name in self.config.stages:
            if name in left:
                self.stage(name, self.start(name, self.before(name)), self.folder / name)
            else:
                log.info("stage %s is done: %s", name, self.folder / name / kind_named(name).result)
        self.accelerator.end_training()

    def section(self, name: str) -> Any:
        """A stage's part of the configuration."""
        return getattr(self.config, name)

    def before(self, name: str) -> LatentDiffusion | None:
        """The result of the last stage before this one from whose model others go on, in fp32 on the CPU.

        It is always read from its folder, so that a run in one go and one that is resumed start from the same.
        """
        path = model_before(self.config, name)
        return LatentDiffusion.from_pretrained(path, dtype=torch.float32) if path else None

    def start(self, name: str, before: LatentDiffusion | None) -> LatentDiffusion:
        """The model that a stage starts from: the result of a stage before it, or one named in the configuration."""
        kind, section, seed = kind_named(name), self.section(name), self.config.seed
        if kind.own_model is None:
            return before or starting_model(self.config.model, seed)
        own = kind.own_model(section)
        if before is None and own.source is None and self.config.model.source:
            before = starting_model(self.config.model, seed)
        return kind.adopt(section, starting_model(own, seed, f"{name}.model"), before)

    def stage(self, name: str, model: LatentDiffusion, folder: Path) -> None:
        """Train one stage to its end, and write its result. The stage changes the model, or how it is held.

        Raises:
            LdmError: see `Training.run`.
        """
        training = self.training(name, model, folder)
        record = training.run()
        accelerator, stage, best = training.accelerator, training.stage, training.best
        for player in stage.players.values():
            accelerator.unwrap_model(player.module, keep_fp32_wrapper=False)
        if best:
            log.info(
                "stage %s ends with the weights after %d updates, %s, whose %s of %.4g is the best",
                name, best.step, best.average, best.metric, best.value,
            )  # fmt: skip
        with training.result():
            if accelerator.is_main_process:
                write_result(self.config, self.data, stage, folder, record, asdict(best) if best else {})
            accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:  # not `end_training`: the next stage needs the process group
            tracker.finish()
        accelerator.free_memory()

    def training(self, name: str, model: LatentDiffusion, folder: Path) -> Training:
        """A stage, ready to train."""
        section: StageSection = self.section(name)
        made(folder)
        accelerator = self._tracked(folder)
        rounded = numbers(self.config.precision) if kind_named(name).frozen else torch.float32
        for part, module in model.modules().items():
            own(module, accelerator.device, torch.float32 if part == "vae" else rounded)
        if isinstance(section, DenoiserSection):
            check_task(name, section, model.family, self.config.data)
        weights = {f"the weights of {part}": fingerprint({part: m}) for part, m in model.modules().items()}
        check_agreement(weights)
        if kind_named(name).captions:
            self._warn_of_long_captions(model)
        prior = self._prior(name, model, digest_of(weights), accelerator)
        caches = self._caches(name, model, accelerator, prior)
        batches = StageBatches(self.data, section, accelerator, self.config.seed, caches, prior)
        stage = kind_named(name).build(
            StageInputs(
                name, section, model, accelerator, self.config.seed, folder, self.data, batches.sides(),
                batches.last_resolution, caches.texts, self.make_images,
            )
        )  # fmt: skip
        fit_to_device(stage, accelerator)

        def report(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
            accelerator.log(figures, step)
            self.report(stage, step, steps, figures)

        return Training(
            accelerator, stage, folder, batches.steps, batches.held_out, report, self._work(name, accelerator),
            self._evaluator(name, stage, accelerator, folder),
        )  # fmt: skip

    def _check(self, name: str) -> None:
        """Raise, before anything is made or trained, for a stage that cannot be built, or not with these data."""
        kind, section = kind_named(name), self.section(name)
        if wanted := kind.evaluation(section):
            check_evaluation(kind, self._evaluation_plan(wanted, "cpu"))
            if self.make_images is None:
                raise LdmError(f"{name}.evaluation.every: no function that makes images is given (make_images)")
        given = [self.data]
        if prior := kind.prior(section):
            check_prior(name, prior, self.data, self.make_images)
            if prior.source:
                of_class = class_images(prior, section, self.config.seed, "", self.data.folder)
                given.append(of_class.open(self.config.data, self.accelerator).data)
        kind.check(section, self.data)
        rows = [row for row in self.forecasts if row.stage == name]
        memory = max(row.memory for row in rows) / 1e9
        log.info("%s: %.1f M parameters are trained, in %.1f GB by forecast", name, rows[0].trained / 1e6, memory)
        for data in given:
            for phase in phases(section) if data.images else ():
                own = phase.halved if prior else phase
                check_batch(name, own, batch_plan(data, own, self.config.seed, self.accelerator.process_index))

    # --- parts of a stage -------------------------------------------------------------------------------------------

    def _tracked(self, folder: Path) -> Accelerator:
        """An accelerator for one stage, which writes checkpoints of what is prepared with it, and logs to trackers."""
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

    def _warn_of_long_captions(self, model: LatentDiffusion) -> None:
        """Warn if some of the first captions are longer than the context of the text encoders."""
        some = self.data.images.captions()[:SOME] if self.data.images else []
        room = min(config.context for config in model.family.text) - 2  # without start and end token
        long = sum(len(ids) > room for ids in model.text_encoders.tokenizers[0].encode(some))
        if long:
            log.warning("%d of %d captions have over %d tokens; the rest of them is not read", long, len(some), room)

    def _cached(self, name: str, family: Family) -> Cached:
        """The parts of the cache that a stage reads: none if it is off, nothing that changes from visit to visit."""
        wanted = kind_named(name).cached(self.section(name))
        if not self.config.data.cache:
            return Cached()
        if wanted.texts and self.data.tags().vary:
            log.info("%s: captions change from visit to visit, so each step encodes its own; latents are cached", name)
            wanted = replace(wanted, texts=False)
        if wanted.latents and family.task == "inpaint":
            log.info("%s: masked images change from visit to visit, so images are not cached", name)
            wanted = replace(wanted, latents=False)
        return wanted

    def _prior(self, name: str, model: LatentDiffusion, weights: str, accelerator: Accelerator) -> Prior | None:
        """The class images of the stage, if the configuration asks for some; those that the folder lacks are made.

        `weights` is a digest of the model's.
        """
        section = self.section(name)
        wanted = kind_named(name).prior(section)
        if wanted is None:
            return None
        found = class_images(wanted, section, self.config.seed, weights, self.data.folder)
        if wanted.source is None:
            assert self.make_images is not None  # see `check_prior`
            found.make(model, self.make_images, accelerator)
        return found.open(self.config.data, accelerator)

    def _caches(
        self, name: str, model: LatentDiffusion, accelerator: Accelerator, prior: Prior | None = None
    ) -> Caches:
        """The cache of the stage, if the configuration asks for one and the stage reads it."""
        section = self.section(name)
        wanted = self._cached(name, model.family)
        if not (wanted.latents or wanted.texts):
            return Caches()

        def plans(data: TrainingImages) -> list[BatchPlan]:
            found = [batch_plan(data, phase, self.config.seed, accelerator.process_index) for phase in phases(section)]
            return [plan for plan in found if isinstance(plan, BatchPlan)]

        if prior is None:
            return build_caches(wanted, model, self.data, plans(self.data), accelerator)
        assert prior.data.images is not None
        of_class = build_caches(Cached(wanted.latents), model, prior.data, plans(prior.data), accelerator)
        prompts = prior.data.images.captions()
        caches = build_caches(wanted, model, self.data, plans(self.data), accelerator, prompts)
        return replace(caches, prior=of_class.latents)

    @cached_property
    def forecasts(self) -> list[Forecast]:
        """The forecasts of all stages; a stage that cannot be built is an error."""
        return forecast(self.config, self.accelerator.num_processes)

    def _work(self, name: str, accelerator: Accelerator) -> Callable[[int], StepCost | None]:
        """A function that gives the cost of an image at a step of a stage."""
        rows = [row for row in self.forecasts if row.stage == name]
        peak = peak_tflops(accelerator.device, self.config.precision)
        ends = [phase.end for phase in phases(self.section(name))]
        return lambda step: StepCost(rows[bisect_right(ends, step)].flops_per_image / 1e12, peak)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluation_plan(self, section: EvaluationSection, device: str) -> EvaluationPlan:
        images = self.data.images
        return evaluation_plan(section, images, self.data.rows if images else (), device)

    def _evaluator(self, name: str, stage: Stage, accelerator: Accelerator, folder: Path) -> Evaluator | None:
        """The evaluator of a stage's images, if the configuration asks for one."""
        section = self.section(name)
        wanted = kind_named(name).evaluation(section)
        if self.make_images is None or wanted is None:
            return None
        plan = self._evaluation_plan(wanted, str(accelerator.device))
        ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        work = Workspace(folder / EVALUATION, ranks, cache=self.folder / "data" / EVALUATION)
        size = phases(section)[-1].size
        shown = partial(kind_named(name).shown, stage)
        return Evaluator(name, wanted, size, plan, shown, self.make_images, self.config.precision, work)


def fit_to_device(stage: Stage, accelerator: Accelerator) -> None:
    """Add gradient checkpointing and compilation as the section says, and lay weights out for the device."""
    watch(accelerator.device.type, torch.get_num_threads())
    if accelerator.device.type == "cpu":
        keep_freed()
    for player in stage.players.values():
        if stage.section.checkpointing:
            checkpointed(player.network)
        if stage.section.compile:
            check_compiling(accelerator.device)
            player.network.compile()
        if accelerator.device.type == "cuda" and not is_sharded(accelerator, stage):
            player.network.to(memory_format=torch.channels_last)  # the fastest layout for a GPU's convolutions


def own(module: torch.nn.Module, device: torch.device, rounded: torch.dtype) -> None:
    """Move weights to the device, into memory of their own: weights mapped from a file cannot be updated.

    Weights that autocast rounds anyway get the dtype `rounded`, all others fp32.
    """
    cast = {id(parameter) for parameter in matrices(module)}
    for parameter in module.parameters():
        dtype = rounded if id(parameter) in cast else torch.float32
        parameter.data = parameter.data.to(device, dtype, copy=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def train(
    config: Config,
    make_images: MakeImages | None = None,
    report: Report = lambda stage, step, steps, figures: None,
) -> None:
    """Train the stages of a configuration; the same call again resumes a stopped run.

    Args:
        config: the run.
        make_images: makes images with a model, for previews and evaluation.
        report: is called with every line of the log, on the main process.

    Raises:
        LdmError: training is not possible; the message is one line with a remedy.
        Stopped: a signal asked for it; a checkpoint was written.
    """
    TrainingRun(config, make_images, report).all()
