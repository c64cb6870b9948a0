"""A sampling run of one batch: conditioning, scheduler, noise, encoding and decoding, shared by all tasks.

B images, H×W height and width in pixels, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError, out_of_memory
from ldm.images import to_images, to_tensor
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.prompts import TokenReport, encode_prompts
from ldm.models.tiling import sliced_decode, sliced_encode, tiled_decode, tiled_encode
from ldm.models.unet import Conditioning, UNet
from ldm.patches.patching import patched
from ldm.process import NoiseSchedule
from ldm.runtime.waiting import watch
from ldm.sampling import schedulers
from ldm.sampling.guidance import check_finite, guided
from ldm.sampling.loop import Denoise, Step, Time, sample
from ldm.sampling.noise import Noise
from ldm.sampling.schedulers import SamplingPlan
from pipelines.batching import decodable
from pipelines.request import Request

log = logging.getLogger(__name__)
OnStep = Callable[[Step], None]
T = TypeVar("T")


class TooManyError(LdmError):
    """Raised if memory does not suffice for a batch."""


@dataclass(frozen=True)
class Attached:
    """An attachment gives one run a patch of the U-Net, and the inputs that the patch reads."""

    patch: str  # of `ldm.patches.patching.PATCHES`; its value is a tuple of the values of all that act together
    value: Any
    inputs: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # for prompts, for negatives: (B, …) each


class InPart(Protocol):
    """An object acts in its part of a run's steps."""

    @property
    def begin(self) -> float:
        """The part of the steps, 0 to 1, at which it begins to act."""
        ...

    @property
    def end(self) -> float:
        """The part of the steps at which it stops to act."""
        ...


class Attachment(InPart, Protocol):
    """An attachment, such as a control model, steers a run beside its prompt, in a part of the run's steps."""

    def prepare(self, run: SamplingRun) -> Attached:
        """The patch and the inputs for a run; called once a run."""
        ...


def acting(attachments: Sequence[InPart], index: int, count: int) -> tuple[int, ...]:
    """The numbers of the attachments that act in a step of `count`, as diffusers counts: their parts hold all of it."""
    return tuple(
        number
        for number, one in enumerate(attachments)
        if one.begin <= index / count and (index + 1) / count <= one.end
    )


def check_acting(one: InPart, name: str, request: Request) -> None:
    """Raise unless an attachment acts in a step of a request's first pass; `name` is that of its settings.

    Raises:
        LdmError: it acts in none.
    """
    steps = request.steps if request.image is None else max(1, int(request.steps * request.strength))
    if not any(acting([one], index, steps) for index in range(steps)):
        raise LdmError(
            f"{name}_begin {one.begin} and {name}_end {one.end}: no whole step of {steps} lies between them; take more "
            "steps, or a larger part"
        )


class SamplingRun:
    """One batch of a request on one model."""

    def __init__(
        self,
        model: LatentDiffusion,
        request: Request,
        noise: Noise,
        on_step: OnStep | None = None,
        schedule: NoiseSchedule | None = None,
        attachments: Sequence[Attachment] = (),
    ) -> None:
        """Prepare a checked request on a model. A second pass continues the random numbers of the first, `noise`.

        If it drew the first pass's noise again, that noise would not be independent of the latents.
        """
        self.model = model
        self.request = request
        self.noise = noise
        self.on_step = on_step
        self.schedule = schedule or model.family.schedule
        self.attachments = attachments
        self.device = model.device
        self.dtype = model.dtype
        config = model.family.autoencoder
        side = config.factor
        self.shape = (len(request.prompts), config.latent_channels, request.height // side, request.width // side)
        watch(self.device.type, torch.get_num_threads())

    # --- conditioning -----------------------------------------------------------------------------------------------

    @cached_property
    def conditioning(self) -> tuple[Conditioning, Conditioning, list[TokenReport]]:
        """The conditioning of prompts and of negative prompts, and the report on their tokens."""
        request, family = self.request, self.model.family
        prompts, negative = request.texts(len(family.text))
        both = [[*first, *second] for first, second in zip(prompts, negative, strict=True)]
        self.model.bring(self.model.text_encoders)
        encoded, reports = encode_prompts(
            self.model.text_encoders, both, clip_skip=request.clip_skip, chunks=request.chunks, reader=request.reader
        )
        size, negative_size = self._size_ids()
        cond, uncond = (encoded.rows(part) for part in (slice(self.shape[0]), slice(-self.shape[0], None)))
        if family.zero_empty_prompt:
            negatives = zip(*request.negatives[-len(family.text) :], strict=True)
            uncond = _zeroed(uncond, [all(text is None for text in row) for row in negatives])
        return replace(cond, size=size), replace(uncond, size=negative_size), reports

    def _size_ids(self) -> tuple[Tensor | None, Tensor | None]:
        """The time ids (B, 6 or 5) for the prompts and for the negative prompts."""
        request, family = self.request, self.model.family
        if not family.xl:
            return None, None
        here = (request.height, request.width)
        original, target = request.original_size or here, request.target_size or here
        negative_crop = request.negative_crop or ((0, 0) if family.refiner else request.crop)
        ids: tuple[float, ...] = (*original, *request.crop)
        negative: tuple[float, ...] = (*(request.negative_original_size or original), *negative_crop)
        if family.refiner:
            ids, negative = (*ids, request.aesthetic_score), (*negative, request.negative_aesthetic_score)
        else:
            ids, negative = (*ids, *target), (*negative, *(request.negative_target_size or target))
        rows = [torch.tensor([row] * self.shape[0], dtype=torch.float32, device=self.device) for row in (ids, negative)]
        return rows[0], rows[1]

    # --- steps ------------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> SamplingPlan:
        """The scheduler of this run with all of its timesteps."""
        return self.request.plan(self.schedule, self.model.family.xl)

    def calls_before(self, part: float) -> int:
        """Calls of the denoiser in the first `part` (0 to 1) of the noise levels."""
        return self.plan.calls_before(part, self.schedule.train_steps)

    @cached_property
    def attached(self) -> list[Attached]:
        """The attachments, prepared for this run."""
        return [one.prepare(self) for one in self.attachments]

    def unet(self, attached: Sequence[Attached] = ()) -> UNet:
        """The U-Net for one run, with the patches that the request and the given attachments ask for."""
        self.model.bring(self.model.unet)
        values: dict[str, Any] = {**self.request.values, "embedded_guidance": self.request.guidance.embedded}
        for one in attached:
            values[one.patch] = (*values.get(one.patch, ()), one.value)
        return patched(self.model.unet, values)

    def denoiser(self, plan: SamplingPlan, extra: Tensor | None = None) -> Denoise:
        """The U-Net with guidance, to be called once for each step of the plan, in order.

        `extra` (B or 1, C, h, w) are more channels that it reads.
        """
        schedule = self.model.family.schedule

        @lru_cache(maxsize=1)  # anew after a gap, so that DeepCache reuses no result from before it
        def made(numbers: tuple[int, ...]) -> Denoise:
            """The denoiser of steps in which these attachments act."""
            cond, negative, _ = self.conditioning
            attached = [self.attached[number] for number in numbers]
            inputs = {name: pair for one in attached for name, pair in one.inputs.items()}
            cond = replace(cond, more={name: pair[0] for name, pair in inputs.items()})
            negative = replace(negative, more={name: pair[1] for name, pair in inputs.items()})
            unet = self.unet(attached)
            return guided(unet, cond, negative, self.request.guidance, schedule, self.plan.times, extra)

        if not self.attachments:
            return made(())
        count = len(plan.timesteps)
        steps = iter([acting(self.attachments, index, count) for index in range(count)])

        def denoise(x: Tensor, time: Time) -> Tensor:
            return made(next(steps))(x, time)

        return denoise

    def sample(
        self,
        x: Tensor,
        plan: SamplingPlan,
        denoise: Denoise | None = None,
        keep: Callable[[Tensor, Step], Tensor] | None = None,
    ) -> Tensor:
        """Noisy latents (B, C, h, w) through the plan, by default with the run's `denoiser`; `keep` may change the
        latents after each step.

        Raises:
            LdmError: the result is not finite, or memory runs out (`TooManyError`).
        """
        denoise = denoise or self.denoiser(plan)
        arguments = schedulers.step_arguments(plan.scheduler, self.noise.generator, self.request.eta)
        steps = sample(denoise, plan, x, arguments)
        try:
            step = next(steps)
            while True:
                x = step.latents if keep is None else keep(step.latents, step)
                if self.on_step:
                    self.on_step(replace(step, latents=x))
                self.model.bring(self.model.unet)  # a caller may have moved it off the device
                step = steps.send(x)
        except StopIteration:
            pass
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise TooManyError(_too_large(self.request, len(self.request.prompts))) from None
        check_finite(x, "U-Net", "its weights or this dtype are at fault: try another dtype (bf16, fp32)")
        return x

    # --- encoding and decoding --------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> Tensor:
        """Images (B or 1, 3, H, W) in [-1, 1] to latents (B, C, h, w), drawn from the posterior."""
        autoencoder = self.model.autoencoder
        self.model.bring(autoencoder)
        weight = next(autoencoder.parameters())
        x = pixels.to(weight.device, weight.dtype)
        posterior = _or_in_tiles(
            lambda: sliced_encode(autoencoder, x, decodable(*x.shape[2:])),
            lambda: tiled_encode(autoencoder, x),
            "encoding",
        )
        latents = posterior.mode()
        if isinstance(autoencoder, AutoencoderKL):
            shape = (self.shape[0] if self.noise.rng == "ldm" else len(pixels), *latents.shape[1:])
            latents = latents + posterior.std * self.noise.draw(shape, weight.dtype, weight.device)  # type: ignore[union-attr]
        config = autoencoder.config
        return (
            ((latents - config.shift_factor) * config.scaling_factor)
            .to(self.device, self.dtype)
            .expand(self.shape[0], -1, -1, -1)
        )

    def pixels_of(self, image: Any) -> Tensor:
        """An image at this run's size: (1, 3, H, W) in [-1, 1]."""
        return to_tensor([image], self.request.width, self.request.height)


def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1]; in tiles if memory does not suffice.

    Raises:
        LdmError: the images are not finite, or memory does not suffice for tiles either.
    """
    autoencoder = model.autoencoder
    model.bring(autoencoder)
    config = autoencoder.config
    weight = next(autoencoder.parameters())
    z = (latents / config.scaling_factor + config.shift_factor).to(weight.device, weight.dtype)
    side = config.factor
    pixels = _or_in_tiles(
        lambda: sliced_decode(autoencoder, z, decodable(side * z.shape[2], side * z.shape[3])),
        lambda: torch.cat([tiled_decode(autoencoder, row) for row in z.split(1)]),
        "decoding",
    )
    if bool((pixels.amax(dim=(1, 2, 3)) <= -1).any()):
        raise LdmError("the autoencoder gave an image that is all black; decode in bf16 or fp32 (dtype=, --dtype)")
    check_finite(pixels, "autoencoder", "it overflows in fp16: decode in bf16 or fp32 (dtype=, --dtype)")
    return pixels


@torch.inference_mode()
def reconstruct(model: LatentDiffusion, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images of one size, a multiple of the autoencoder's factor, encoded and decoded again.

    Raises:
        LdmError: as `decode`.
    """
    autoencoder = model.autoencoder
    model.bring(autoencoder)
    weight = next(autoencoder.parameters())
    latents = autoencoder.encode(to_tensor(images, *images[0].size).to(weight.device, weight.dtype)).mode()
    config = autoencoder.config
    return to_images(decode(model, (latents - config.shift_factor) * config.scaling_factor))


def _or_in_tiles(whole: Callable[[], T], tiled: Callable[[], T], doing: str) -> T:
    """The result of `whole` or, if memory does not suffice for it, of `tiled`."""
    try:
        return whole()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # outside of the handler, which would keep the tensors of the failed attempt alive
    log.warning("the images do not fit into memory at once: %s them in tiles", doing)
    try:
        return tiled()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise LdmError(f"out of memory while {doing}, even in tiles; make smaller images") from None


def _zeroed(cond: Conditioning, rows: list[bool]) -> Conditioning:
    """The conditioning with zeros in the given rows, as SDXL expects for an empty negative prompt."""
    keep = torch.tensor([not row for row in rows], device=cond.text.device)
    pooled = None if cond.pooled is None else torch.where(keep[:, None], cond.pooled, torch.zeros_like(cond.pooled))
    return Conditioning(torch.where(keep[:, None, None], cond.text, torch.zeros_like(cond.text)), pooled)


def _too_large(request: Request, batch: int) -> str:
    size = f"{request.width}×{request.height}"
    smaller = f"{request.width // 2 // 64 * 64 or 64}×{request.height // 2 // 64 * 64 or 64}"
    what = f"a batch of {batch // 2} would fit better (batch=, --batch)" if batch > 1 else f"try {smaller} (--size)"
    return f"out of memory with {batch} images of {size} at a time; {what}"
