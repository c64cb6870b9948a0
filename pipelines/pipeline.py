"""`Pipeline`: prompts in, images out. It picks the task from what it is given and makes the batches.

pipeline = Pipeline("sd_xl_base_1.0.safetensors")
pipeline("a red fox in the snow", seed=1).images[0].save("fox.png")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError, listing
from ldm.families import Family
from ldm.images import load_image, to_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.prompts import TokenReport
from ldm.runtime.compilation import reported
from ldm.sampling.guidance import Guidance
from ldm.sampling.loop import Step
from ldm.sampling.noise import Noise
from ldm.sampling.preview import Factors, clean, fit, to_pixels
from ldm.sampling.schedulers import own_name
from ldm.weights.builtin import DEFAULT, FOLDER, builtin, known_words, words
from pipelines.packing import batches, together
from pipelines.request import Request, fitted, seeds, texts, whole_steps
from pipelines.run import OnStep, SamplingRun, TooManyError, decode
from pipelines.tasks.edit import edit
from pipelines.tasks.image_to_image import continued, image_to_image, renoised
from pipelines.tasks.inpaint import inpaint, pasted
from pipelines.tasks.text_to_image import text_to_image
from pipelines.tuning import Tuning, default_device, device_named, room_of

log = logging.getLogger(__name__)
TASKS = {"text-to-image": text_to_image, "image-to-image": image_to_image, "inpaint": inpaint, "edit": edit}


@dataclass
class Result:
    """What a call made: images, and for each what is needed to make it again."""

    images: list[Image.Image] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)  # one for each image
    latents: list[Tensor] = field(default_factory=list)  # (C, h, w) each, scaled
    reports: list[TokenReport] = field(default_factory=list)  # tokens of every prompt, by text encoder
    rows: range = range(0)  # which images of the call they are


class Pipeline:
    """A model ready to make images, and perhaps a refiner. Several threads may call one pipeline at once."""

    def __init__(
        self,
        source: Any = None,
        *,
        refiner: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        quick: bool = True,
        compile: bool = False,
        quantize: str | None = None,
        offload: str = "auto",
        **options: Any,
    ) -> None:
        """Load a model, or take one that is loaded.

        Args:
            source: a folder, file, Hub name, `LatentDiffusion`, or the name of a built-in model, which is the default.
            refiner: likewise, a model of the family sdxl-refiner, or emoji-refiner.
            device: "cuda", "mps", "cpu"; by default the best there is.
            dtype: by default what the device is good at (`default_dtype`).
            attention: a name of `ldm.runtime.attention.KERNELS`; "auto" is the best for device and dtype.
            quick: on a CPU or a CUDA GPU, layers that are quicker in place of plain ones, on the same weights; results
                differ by rounding. Weights may change afterwards, but on a CPU not through `.data`, which nobody can
                notice. On a CPU, this process then keeps memory that tensors give back; on a GPU, the steps of the
                U-Net are recorded as CUDA graphs. A model that is loaded already stays as it is.
            compile: compile the networks with `torch.compile` in place of that; steps are recorded likewise. That takes
                a minute or two once for each size of image, and less in the next process. On a CPU, quick layers are
                faster.
            quantize: a name of `ldm.runtime.quantization.QUANTIZED`, for U-Nets with weights of 8 bits; images
                differ a little. Of models that are loaded here: with one that is loaded already it is refused.
            offload: a name of `ldm.runtime.offload.OFFLOAD`, for models that are larger than a GPU's memory.
            **options: further arguments of `LatentDiffusion.from_pretrained`.

        Raises:
            LdmError: in one line, what is wrong and what to do.
        """
        source = named(source)
        device = device_named(device or default_device())
        tuning = Tuning(attention, quick, compile, quantize, offload)
        self.compiled = compile
        self.model, self.refiner = tuning.load(source, refiner, device, dtype, options)
        self.words = None if isinstance(source, LatentDiffusion) else known_words(builtin(source) or Path(source))
        if self.refiner is not None and not self.refiner.family.refiner:
            raise LdmError(f"the refiner is a {self.refiner.family.name} model; one of sdxl-refiner is needed")
        if self.refiner is not None and self.refiner is not refiner:
            _share(self.model, self.refiner)

    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> Result:
        """Images for a prompt or several, all at once; see `stream` and `request` for the settings.

        Raises:
            LdmError: a setting is out of bounds or does not fit the model.
        """
        result = Result()
        for part in self.stream(prompt, **settings):
            result.images += part.images
            result.settings += part.settings
            result.latents += part.latents
            result.reports += part.reports
            result.rows = range(part.rows.stop)
        return result

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        batch: int | None = None,
        output: str = "images",
        on_step: OnStep | None = None,
        needed: Callable[[range], bool] | None = None,
        **settings: Any,
    ) -> Iterator[Result]:
        """Images as they are finished, a `Result` for each batch. All settings are checked before the first.

        Args:
            prompt: one or several.
            batch: images made at a time, at most; it changes nothing in them, but for rng="diffusers". By default as
                many as keep the device busy, or as its memory takes.
            output: "images" or "latents".
            on_step: called with a `ldm.sampling.loop.Step` after each step; `preview` makes a small image of it.
            needed: asked for each batch whether it shall be made, with the numbers of its images. Which images
                are batches does not depend on memory: where it does not suffice, one is made in parts.
            **settings: those of `request`.

        Raises:
            LdmError: a setting is out of bounds or does not fit the model.
        """
        if batch is not None:
            _check_count("batch", batch)
        if output not in ("images", "latents"):
            raise LdmError(f"output {output!r} is not known; choose images or latents")
        request, passes = self.request(prompt, **settings)
        return self._batches(request, batch, passes, output, on_step, needed)

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str | None] | None = None,
        prompt_2: str | Sequence[str | None] | None = None,
        negative_2: str | Sequence[str | None] | None = None,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | Guidance | None = None,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        refiner_at: float | None = None,
        refiner_strength: float = 0.3,
        hires: float | None = None,
        hires_strength: float = 0.55,
        hires_latents: bool = False,
        **more: Any,
    ) -> tuple[Request, Passes]:
        """The settings of a call, checked, with the model's defaults filled in.

        Args:
            prompt: one or several.
            negative: what should not be seen; one, or one for each prompt.
            prompt_2: for the second text encoder, if it should read another one.
            negative_2: likewise.
            n: images of each prompt.
            seed: of the first image; the others have the numbers after it. Or one for each. By default random.
            width: pixels; by default what the model was trained on, or the given image's.
            height: likewise.
            steps: of the scheduler; by default what is usual for the model's family, as is the guidance.
            guidance: scale of classifier-free guidance, or a `Guidance` with more.
            image: an image (PIL or a path) to start from.
            mask: which of its pixels (white) to make anew.
            strength: how much of the image is made anew, 0 to 1 (default 0.8, with a mask 1).
            refiner_at: part of the run after which the refiner takes over; without, it refines the finished image.
            refiner_strength: of that.
            hires: factor by which a second pass enlarges the image.
            hires_strength: of that pass.
            hires_latents: enlarge the latents instead of the image.
            **more: fields of `pipelines.request.Request`: scheduler, spacing, eta, rng, reuse, merge, clip_skip,
                chunks, weights, original_size, crop, target_size and their negatives, aesthetic_score.

        Raises:
            LdmError: a setting is out of bounds or does not fit the model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_count("n", n)
        if not prompts:
            raise LdmError("no prompt: at least one text is needed")
        count, family = len(prompts), self.model.family
        start = None if image is None else load_image(image)
        side = (family.size, family.size) if start is None else fitted(start, family.autoencoder.factor)
        try:
            request = Request(
                prompts=texts(prompts, count, n, "prompt"),
                negative=texts(negative, count, n, "negative prompt"),
                prompts_2=None if prompt_2 is None else texts(prompt_2, count, n, "second prompt"),
                negative_2=None if negative_2 is None else texts(negative_2, count, n, "second negative prompt"),
                seeds=seeds(seed, count * n),
                width=side[0] if width is None else width,
                height=side[1] if height is None else height,
                steps=family.steps if steps is None else steps,
                guidance=guidance
                if isinstance(guidance, Guidance)
                else Guidance(family.guidance if guidance is None else guidance),
                image=start,
                mask=None if mask is None else load_image(mask, "L"),
                strength=(1.0 if mask is not None else 0.8) if strength is None else strength,
                end=1.0 if refiner_at is None else refiner_at,
                **more,
            )
        except TypeError as error:
            raise LdmError(f"settings: {error}") from None
        passes = Passes(refiner_at, refiner_strength, hires, hires_strength, hires_latents)
        request.check(family)
        passes.check(self, request)
        return request, passes

    def preview(self, step: Step) -> list[Image.Image]:
        """What the images of a batch look like after a step (`on_step`), small: a pixel for each latent."""
        latents = clean(step, self.model.family.schedule)
        return to_images(to_pixels(latents, self._preview_factors))

    @cached_property
    def _preview_factors(self) -> Factors:
        return self.model.family.preview or fit(self.model.autoencoder)

    def _batches(
        self,
        request: Request,
        batch: int | None,
        passes: Passes,
        output: str,
        on_step: OnStep | None,
        needed: Callable[[range], bool] | None,
    ) -> Iterator[Result]:
        self._note_unknown(request.prompts)
        largest = passes.larger(request, self.model.family) if passes.hires else request
        most = fits = batch or together(largest, self.model.family, self.model.device)
        for rows in batches(request, batch, most, self.model.text_encoders):
            done = rows.start if needed is None or needed(rows) else rows.stop
            while done < rows.stop:
                part, result = request.part(slice(done, min(done + fits, rows.stop))), None
                try:
                    with reported() if self.compiled else nullcontext(), self.model.alone():
                        result = self._batch(part, passes, output, on_step)
                except TooManyError:
                    if batch or len(part.prompts) == 1:
                        raise
                    fits = (len(part.prompts) + 1) // 2
                    log.warning("memory does not suffice for %d images at a time: %d", len(part.prompts), fits)
                if result:
                    result.rows = range(done, done + len(part.prompts))
                    done = result.rows.stop
                    yield result

    @torch.inference_mode()
    def _batch(self, request: Request, passes: Passes, output: str, on_step: OnStep | None) -> Result:
        run = SamplingRun(self.model, request, Noise(request.seeds, request.rng), on_step)
        latents = TASKS[_task(request, self.model.family)](run)
        if passes.hires:
            latents = self._enlarged(run, latents, passes)
        if self.refiner is not None:
            latents = self._refined(run, self.refiner, latents, passes)
        _, _, reports = run.conditioning
        for report in reports:
            if report.cut:
                log.warning(
                    "the prompt has %d tokens, of which %s reads %d; cut: %s",
                    report.tokens,
                    report.encoder,
                    report.room,
                    report.cut,
                )
        result = Result(latents=list(latents), settings=self._settings(request, passes), reports=reports)
        if output == "images":
            result.images = to_images(decode(self.model, latents))
            if request.mask is not None and request.image is not None and not passes.hires:
                result.images = [pasted(made, request.image, request.mask) for made in result.images]
        return result

    def _note_unknown(self, prompts: Sequence[str]) -> None:
        """Say, once for each, which words of the prompts the model cannot have learned, if it comes with a list."""
        known = self.words
        if known is None:
            return
        for prompt in dict.fromkeys(prompts):
            unknown = [word for word in dict.fromkeys(words(prompt)) if word not in known]
            if unknown:
                log.warning("words that this model never saw in training: %s", listing(unknown))

    def _enlarged(self, first: SamplingRun, latents: Tensor, passes: Passes) -> Tensor:
        """The second pass at a higher resolution: image to image on the enlarged image or latents."""
        larger = passes.larger(first.request, self.model.family)
        run = SamplingRun(self.model, larger, first.noise, first.on_step)
        if passes.hires_latents:
            enlarged = torch.nn.functional.interpolate(latents, size=run.shape[2:], mode="bicubic", antialias=True)
        else:
            images = to_images(decode(self.model, latents))
            enlarged = run.encode(torch.cat([run.pixels_of(image) for image in images]))
        return renoised(run, enlarged)

    def _refined(self, first: SamplingRun, refiner: LatentDiffusion, latents: Tensor, passes: Passes) -> Tensor:
        """The refiner's part: the end of the run, or image to image on its result."""
        request = first.request
        height, width = (side * self.model.family.autoencoder.factor for side in latents.shape[2:])
        asked = replace(
            request, width=width, height=height, image=None, mask=None, prompts_2=None, negative_2=None,
            strength=passes.refiner_strength, begin=passes.refiner_at or 0.0, end=1.0,
        )  # fmt: skip
        if request.prompts_2:
            asked = replace(asked, prompts=request.prompts_2)
        if request.negative_2:
            asked = replace(asked, negative=request.negative_2)
        if passes.refiner_at is None:
            run = SamplingRun(refiner, asked, first.noise, first.on_step)
            return renoised(run, latents.to(run.device, run.dtype))
        # the same scheduler goes on, whatever the refiner was published with
        schedule = replace(first.schedule, prediction_type=refiner.family.schedule.prediction_type)
        return continued(SamplingRun(refiner, asked, first.noise, first.on_step, schedule), latents)

    def _settings(self, request: Request, passes: Passes) -> list[dict[str, Any]]:
        """For each image, all that it was made with, as JSON takes it."""
        family = self.model.family
        common: dict[str, Any] = {
            "task": _task(request, family),
            "family": family.name,
            "steps": request.steps,
            "scheduler": _name_of(request.scheduler, family),
            "guidance": vars(request.guidance),
            **{name: getattr(request, name) for name in RECORDED},
            **passes.settings(self.refiner is not None),
        }
        if common["task"] in ("image-to-image", "inpaint"):
            common["strength"] = request.strength
        rows = []
        for index, prompt in enumerate(request.prompts):
            row = {"prompt": prompt, "negative": request.negative[index], "seed": request.seeds[index], **common}
            if len(request.prompts) > 1:
                row |= {"batch": len(request.prompts), "place": index}  # which others it rounds like
            if request.prompts_2:
                row["prompt_2"] = request.prompts_2[index]
            if request.negative_2:
                row["negative_2"] = request.negative_2[index]
            rows.append(row)
        return rows


def _task(request: Request, family: Family) -> str:
    """What is asked for: by what is given, and by what the model does."""
    return "edit" if family.task == "edit" else request.task


def _name_of(scheduler: Any, family: Family) -> str:
    """A scheduler's name for the record: short, or the class of an object of the user's own."""
    if scheduler is None:
        return own_name(family.schedule)
    return scheduler if isinstance(scheduler, str) else type(scheduler).__name__


RECORDED = (
    "width", "height", "spacing", "eta", "rng", "reuse", "merge", "clip_skip", "chunks", "weights", "original_size",
    "crop", "target_size", "negative_original_size", "negative_crop", "negative_target_size", "aesthetic_score",
    "negative_aesthetic_score",
)  # fmt: skip


@dataclass(frozen=True)
class Passes:
    """What follows the first pass: a second one at a higher resolution, the refiner."""

    refiner_at: float | None = None
    refiner_strength: float = 0.3
    hires: float | None = None
    hires_strength: float = 0.55
    hires_latents: bool = False

    def check(self, pipeline: Pipeline, request: Request) -> None:
        """Raise unless they fit together.

        Raises:
            LdmError: they do not.
        """
        for name, low, high in (
            ("refiner_at", 0.01, 0.99),
            ("refiner_strength", 0, 1),
            ("hires", 1, 8),
            ("hires_strength", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not low <= value <= high):
                raise LdmError(f"{name} {value!r}: a number from {low} to {high} is needed")
        if self.refiner_at is not None and pipeline.refiner is None:
            raise LdmError("refiner_at without a refiner: name one (refiner=, --refiner)")
        if pipeline.model.family.task == "edit" and (self.hires or pipeline.refiner is not None):
            raise LdmError(f"a {pipeline.model.family.name} model edits in one pass; leave hires and the refiner out")
        if self.refiner_at is not None and (self.hires or request.task != "text-to-image"):
            raise LdmError(
                "the refiner takes over within a run only for text to image in one pass; leave refiner_at out"
            )
        if pipeline.refiner is not None:
            request.check_merge(pipeline.refiner.family)
        family = pipeline.model.family
        if self.hires:
            whole_steps(request.steps, "hires_strength", self.hires_strength)
            self.larger(request, family).check(family)
        if self.refiner_at is not None:
            plan = request.plan(family.schedule, family.xl)
            calls = plan.calls_before(self.refiner_at, family.schedule.train_steps)
            if not 0 < calls < len(plan.timesteps):
                raise LdmError(
                    f"refiner_at {self.refiner_at}: of {request.steps} steps, that leaves none for the "
                    f"{'refiner' if calls else 'base'}; choose another part, or more steps"
                )
        elif pipeline.refiner is not None:
            whole_steps(request.steps, "refiner_strength", self.refiner_strength)

    def larger(self, request: Request, family: Family) -> Request:
        """The second pass, at a higher resolution."""
        assert self.hires
        factor = family.autoencoder.factor
        width, height = (max(1, round(side * self.hires / factor)) * factor for side in (request.width, request.height))
        return replace(request, width=width, height=height, strength=self.hires_strength, image=None, mask=None)

    def settings(self, refined: bool) -> dict[str, Any]:
        """Those in use, for the record."""
        used: dict[str, Any] = {}
        if self.hires:
            used |= {name: getattr(self, name) for name in ("hires", "hires_strength", "hires_latents")}
        if refined:
            used |= {"refiner_at": self.refiner_at} if self.refiner_at else {"refiner_strength": self.refiner_strength}
        return used


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 100_000:
        raise LdmError(f"{name} {value!r}: a whole number from 1 to 100000 is needed")


def _share(model: LatentDiffusion, refiner: LatentDiffusion) -> None:
    """Let a refiner just loaded use the base's parts: the autoencoder, and the text encoder if it is the same one.

    Not where the weights of only one of the two take turns.
    """
    if room_of(model) is not room_of(refiner):
        return
    refiner.networks["autoencoder"] = model.autoencoder
    ours, theirs = model.text_encoders.towers[-1].state_dict(), refiner.text_encoders.towers[0].state_dict()
    if ours.keys() == theirs.keys() and all(
        theirs[name].dtype == tensor.dtype
        and theirs[name].device == tensor.device
        and torch.equal(theirs[name], tensor)
        for name, tensor in ours.items()
    ):
        refiner.text_encoders.towers[0] = model.text_encoders.towers[-1]


def named(source: Any) -> Any:
    """The source; the built-in model where there is none."""
    return FOLDER / DEFAULT if source is None else source
