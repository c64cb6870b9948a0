"""`Pipeline` makes images of prompts: it chooses the task from the given inputs and makes batches.

pipeline = Pipeline("sd_xl_base_1.0.safetensors")
pipeline("a red fox in the snow", seed=1).images[0].save("fox.png")
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module

from ldm.errors import LdmError, listing
from ldm.images import to_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.prompts import TokenReport
from ldm.runtime.compilation import reported
from ldm.sampling.loop import Step
from ldm.sampling.noise import Noise
from ldm.sampling.preview import Factors, clean, fit, to_pixels
from ldm.weights.builtin import DEFAULT, FOLDER, builtin, known_words, words
from pipelines.adapters import Adapters
from pipelines.batching import batch_ranges, together
from pipelines.control import check_control, controls_of, load_control_models
from pipelines.embeddings import EmbeddingFiles, fitting, read_embeddings, used, with_embeddings
from pipelines.image_prompts import ImagePrompts
from pipelines.passes import check_passes, enlarged, largest_request, refined
from pipelines.request import Request, check_request, note_idle, records, request_for
from pipelines.run import Attachment, OnStep, SamplingRun, TooManyError, decode
from pipelines.settings import LOADING, checked, renamed
from pipelines.syntax import note_foreign
from pipelines.tasks.inpaint import pasted
from pipelines.tasks.table import TASKS
from pipelines.translation import generators
from pipelines.tuning import Tuning, cpu_by_default, default_device, device_named, room_of

log = logging.getLogger(__name__)
OPTIONS = ("revision", "components", "verify", "progress")  # of `open_source`, beside the rows of `LOADING`


@dataclass
class Result:
    """Images of a call, and for each its record, with which it can be made again."""

    images: list[Image.Image] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)  # one for each image
    latents: list[Tensor] = field(default_factory=list)  # (C, h, w) each, scaled
    reports: list[TokenReport] = field(default_factory=list)  # tokens of every prompt, by text encoder
    rows: range = range(0)  # the images' numbers within the call


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
        adapters: Any = (),
        embeddings: Any = None,
        **options: Any,
    ) -> None:
        """Load a model, or use one that is loaded.

        Args:
            source: a folder, file, Hub name, `LatentDiffusion` (which stays as it is), or the name of a built-in model.
            refiner: a model of the family sdxl-refiner, or emoji-refiner, named in the same ways.
            device: "cuda", "mps", "cpu"; by default the best there is.
            dtype: by default what the device is good at (`default_dtype`).
            attention: a name of `ldm.runtime.attention.KERNELS`; "auto" is the best for device and dtype.
            quick: fused layers in place of plain ones, on a CPU or a CUDA GPU, with the same weights; results differ by
                rounding. On a CPU, weights must then not be changed through `.data`, which fused layers cannot notice,
                and the process keeps freed memory. On a GPU, steps are recorded as CUDA graphs.
            compile: networks compiled by `torch.compile` in place of fused layers; on a GPU, steps are recorded too.
                It takes minutes for each new size of image, less in the next process.
            quantize: a name of `ldm.runtime.quantization.QUANTIZED`, for U-Nets with 8-bit weights.
            offload: a name of `ldm.runtime.offload.OFFLOAD`, for models that are larger than a GPU's memory.
            adapters: LoRA files and the like, with their weights, for calls that name none; see `stream`.
            embeddings: files of textual inversion, or folders of them, one or a list; prompts use them by name.
            **options: `lora_dir`, a folder in which prompts and calls find adapters by name; `partial_adapters`, to use
                what fits of one that does not fit as a whole; `ip_adapter`, files of IP-Adapters, one or a list;
                `image_encoder`, loaded, or its folder or Hub name; `control_models`, ControlNets and T2I-Adapters, one,
                a list or by names; more of `LatentDiffusion.from_pretrained`; diffusers' names, such as `torch_dtype`.

        Raises:
            LdmError: an argument does not fit or the model cannot be loaded; the message is one line with a remedy.
        """
        own = {"source": source, "dtype": dtype, "embeddings": embeddings}
        found = renamed([*own.items(), *options.items()], "python", LOADING, also=OPTIONS)
        found = {name: value for name, value in found.items() if value is not None}
        source, dtype = named(found.pop("source", None)), found.pop("dtype", None)
        learned = read_embeddings(found.pop("embeddings", ()), found.get("allow_pickle", False))
        folder, partial = found.pop("lora_dir", None), found.pop("partial_adapters", False)
        beside = {name: found.pop(name, None) for name in ("ip_adapter", "image_encoder", "control_models")}
        device = device_named(device or default_device())
        tuning = Tuning(attention, quick, compile, quantize, offload)
        self.compiled = compile
        with cpu_by_default():
            self.model, self.refiner = tuning.load(source, refiner, device, dtype, found)
        _check_refiner(self.refiner)
        self.words = None if isinstance(source, LatentDiffusion) else known_words(builtin(source) or Path(source))
        if self.refiner is not None and self.refiner is not refiner:
            _share(self.model, self.refiner)
        self._learn(learned)
        self.adapters = Adapters(self.model, folder, partial, pickle := found.get("allow_pickle", False), adapters)
        self._load_beside(source, tuning, pickle, **beside)

    def _load_beside(
        self, source: Any, tuning: Tuning, pickle: bool, ip_adapter: Any, image_encoder: Any, control_models: Any
    ) -> None:
        """Load the networks that steer the model's U-Net."""
        with cpu_by_default():
            self.image_prompts = ImagePrompts(self.model, ip_adapter, image_encoder, source=source, pickle=pickle)
            self.control_models = load_control_models(control_models, self.model, tuning, pickle)

    def _learn(self, read: EmbeddingFiles) -> None:
        """Let the text encoders know the embeddings that fit them."""
        self.embeddings = fitting(read, self.model.text_encoders.configs)
        self.model = with_embeddings(self.model, self.embeddings)
        if self.refiner is not None:
            self.refiner = with_embeddings(self.refiner, self.embeddings)
        if self.words is not None:
            self.words |= {word for found in self.embeddings for name in found.names for word in words(name)}

    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> Result:
        """Images for a prompt or several, all at once; arguments and errors are those of `stream`."""
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
        output: str = "images",
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Iterator[Result]:
        """Images as they are finished, a `Result` for each batch. All settings are checked before the first.

        Args:
            prompt: one or several.
            output, on_step: as for `make`.
            **settings: the rows of `pipelines.settings.SETTINGS`, by name or by diffusers' names. `guidance` is a
                number or a `Guidance`, `image` and `mask` are PIL images or files, `scheduler` may be an object with
                diffusers' interface, and settings of each prompt or image may be lists. A torch generator is new and
                stands for its seed; numbers are then drawn from it, so that it is not taken twice. `adapters` are names
                or files with their weights, {"style.safetensors": 0.8, "name": {"unet": 1, "text": 0.5}}, or a list
                with such a dictionary for each prompt.

        Raises:
            LdmError: a setting is not known, out of bounds or does not fit the model.
        """
        if output != "images" and settings.get("output_type") is not None:
            raise LdmError(
                f"output {output!r} and output_type {settings['output_type']!r} are one setting; give one of them"
            )
        made = self.make(self.request(prompt, **settings), output=output, on_step=on_step)
        for generator in generators(settings.get("generator")):
            torch.rand(1, generator=generator, device=generator.device)
        return made

    def request(self, prompt: str | Sequence[str], **settings: Any) -> Request:
        """The settings of a call, checked, with the model's defaults filled in.

        Raises:
            LdmError: as `stream`.
        """
        family, refiner = self.model.family, self.refiner.family if self.refiner else None
        with cpu_by_default():
            given = checked({**settings, "prompt": prompt}, "python")
            request = request_for(given, family, refiner is not None, self.adapters.mixes)
            check_request(request, family)
            if check_task := TASKS[request.task].check:
                check_task(request, family)
            check_passes(request, family, refiner)
            request = self.image_prompts.checked(request)
            check_control(request, family, self.control_models)
            note_idle(given, request, family)
        return request

    def make(
        self,
        request: Request,
        *,
        output: str = "images",
        on_step: OnStep | None = None,
        only: Iterable[range] | None = None,
    ) -> Iterator[Result]:
        """The images of a checked request as they are finished, a `Result` for each batch.

        Args:
            request: the request that `request` returned.
            output: "images" or "latents".
            on_step: called with a `ldm.sampling.loop.Step` after each step; `preview` makes a small image of it.
            only: the batches to make, some of those that `batches` gave; by default all.

        Raises:
            LdmError: the output is not known or, later, memory does not suffice or a number is not finite.
        """
        if output not in ("images", "latents"):
            raise LdmError(f"output {output!r} is not known; choose images or latents")
        return self._made(request, output, on_step, self.batches(request) if only is None else only)

    def batches(self, request: Request) -> Iterator[range]:
        """Which images of a checked request are made together, by their numbers.

        That does not depend on memory: a batch that does not fit is made in parts.
        """
        largest = largest_request(request, self.model.family)
        most = request.batch or together(largest, self.model.family, self.model.device)
        return batch_ranges(request, most, self.model.text_encoders)

    def preview(self, step: Step) -> list[Image.Image]:
        """Small previews of a batch after a step (`on_step`), with a pixel for each latent."""
        with cpu_by_default():
            latents = clean(step, self.model.family.schedule)
            return to_images(to_pixels(latents, self._preview_factors))

    @cached_property
    def _preview_factors(self) -> Factors:
        return self.model.family.preview or fit(self.model.autoencoder)

    def _made(
        self, request: Request, output: str, on_step: OnStep | None, batches: Iterable[range]
    ) -> Iterator[Result]:
        note_unknown(request.prompts, self.words)
        note_foreign(request, [name for one in self.embeddings for name in one.names])
        attachments: list[Attachment] = [
            *self.image_prompts.attachments(request),
            *controls_of(request, self.control_models),
        ]
        fits = len(request.prompts)
        for rows in batches:
            done = rows.start
            while done < rows.stop:
                part, result = request.part(slice(done, min(done + fits, rows.stop))), None
                try:
                    with reported() if self.compiled else nullcontext(), self.model.alone(), cpu_by_default():
                        model = self.adapters.merged(part.mixes[0])
                        result = self._batch(model, part, output, on_step, attachments)
                except TooManyError:
                    if request.batch or len(part.prompts) == 1:
                        raise
                    fits = (len(part.prompts) + 1) // 2
                    log.warning("memory does not suffice for %d images at a time; making %d", len(part.prompts), fits)
                if result:
                    result.latents = [latents.clone() for latents in result.latents]  # ordinary, not of inference mode
                    result.rows = range(done, done + len(part.prompts))
                    done = result.rows.stop
                    yield result

    @torch.inference_mode()
    def _batch(
        self,
        model: LatentDiffusion,
        request: Request,
        output: str,
        on_step: OnStep | None,
        attachments: Sequence[Attachment],
    ) -> Result:
        noise = Noise(request.seeds, request.rng)
        run = SamplingRun(model, request, noise, on_step, attachments=attachments)
        latents = TASKS[request.task].latents(run)
        if request.hires:
            latents = enlarged(run, latents)
        if self.refiner is not None:
            latents = refined(run, self.refiner, latents)
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
        read = self.image_prompts.recorded(request)
        settings = [record | read for record in records(request, self.model.family)]
        if self.embeddings:
            settings = [record | used(self.embeddings, self.model, request, row) for row, record in enumerate(settings)]
        result = Result(latents=list(latents), settings=settings, reports=reports)
        if output == "images":
            result.images = to_images(decode(model, latents))
            if request.mask is not None and request.image is not None and not request.hires:
                result.images = [pasted(made, request.image, request.mask) for made in result.images]
        return result


def note_unknown(prompts: Sequence[str], known: Collection[str] | None) -> None:
    """Log the words of each prompt that are not in the model's own list of known words, if it has one."""
    if known is None:
        return
    for prompt in dict.fromkeys(prompts):
        unknown = [word for word in dict.fromkeys(words(prompt)) if word not in known]
        if unknown:
            log.warning("words that this model never saw in training: %s", listing(unknown))


def _check_refiner(refiner: LatentDiffusion | None) -> None:
    """Raise if there is a refiner that is none."""
    if refiner is not None and not refiner.family.refiner:
        raise LdmError(f"the refiner is a {refiner.family.name} model; one of sdxl-refiner is needed")


def _share(model: LatentDiffusion, refiner: LatentDiffusion) -> None:
    """Let a refiner just loaded share the base's autoencoder, and its text encoder if the weights are equal.

    Nothing is shared if only one of the two is offloaded.
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


def with_networks(pipeline: Pipeline, changed: Callable[[Module], Module]) -> Pipeline:
    """A copy of a pipeline with changed networks of its models, on the same weights; all else is shared."""
    other = copy.copy(pipeline)
    other.model = _with_networks(pipeline.model, changed)
    other.refiner = None if pipeline.refiner is None else _with_networks(pipeline.refiner, changed)
    other.adapters = pipeline.adapters.of(other.model)
    return other


def _with_networks(model: LatentDiffusion, changed: Callable[[Module], Module]) -> LatentDiffusion:
    return model.with_networks({name: changed(network) for name, network in model.networks.items()})


def named(source: Any) -> Any:
    """The source, or the folder of the built-in model if there is no source."""
    return FOLDER / DEFAULT if source is None else source
