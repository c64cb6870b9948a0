"""The passes after the first one: a second pass at a higher resolution (hires), and the refiner.

B images, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LdmError
from ldm.families import Family
from ldm.images import to_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.guidance import Guidance
from pipelines.request import Request, check_patches, check_size, whole_steps
from pipelines.run import SamplingRun, decode
from pipelines.tasks.image_to_image import continued, renoised


def check_passes(request: Request, family: Family, refiner: Family | None) -> None:
    """Raise unless the passes after the first one fit the request and the models.

    Raises:
        LdmError: a pass does not fit.
    """
    if request.refiner_at is not None and refiner is None:
        raise LdmError("refiner_at without a refiner: name one (refiner=, --refiner)")
    if request.refiner_at is not None and (request.hires or request.task != "text-to-image"):
        raise LdmError("the refiner takes over within a run only for text to image in one pass; leave refiner_at out")
    if refiner is not None:
        check_patches(request, refiner)
    if request.hires:
        whole_steps(request.steps, "hires_strength", request.hires_strength)
        check_size(enlarged_request(request, family), family)
    if request.refiner_at is not None:
        plan = request.plan(family.schedule, family.xl)
        calls = plan.calls_before(request.refiner_at, family.schedule.train_steps)
        if not 0 < calls < len(plan.timesteps):
            raise LdmError(
                f"refiner_at {request.refiner_at}: of {request.steps} steps, that leaves none for the "
                f"{'refiner' if calls else 'base'}; choose another part, or more steps"
            )
    elif refiner is not None:
        whole_steps(request.steps, "refiner_strength", request.refiner_strength)


def enlarged_request(request: Request, family: Family) -> Request:
    """The request of the second pass, at a higher resolution."""
    factor = family.autoencoder.factor
    width, height = (max(1, round(side * request.hires / factor)) * factor for side in (request.width, request.height))
    return replace(request.changed(width=width, height=height, strength=request.hires_strength), image=None, mask=None)


def largest_request(request: Request, family: Family) -> Request:
    """The request of the pass with the largest images: the second one, if there is one."""
    return enlarged_request(request, family) if request.hires else request


def enlarged(first: SamplingRun, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) of the second pass: image to image on the enlarged image or latents."""
    request = enlarged_request(first.request, first.model.family)
    run = SamplingRun(first.model, request, first.noise, first.on_step, attachments=first.attachments)
    if first.request.hires_latents:
        larger = F.interpolate(latents.float(), size=run.shape[2:], mode="bicubic", antialias=True).to(latents.dtype)
    else:
        images = to_images(decode(first.model, latents))
        larger = run.encode(torch.cat([run.pixels_of(image) for image in images]))
    return renoised(run, larger)


def refined(first: SamplingRun, refiner: LatentDiffusion, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) after the refiner: the end of the run, or image to image on its result."""
    request = first.request
    height, width = (side * first.model.family.autoencoder.factor for side in latents.shape[2:])
    asked = replace(
        request.changed(width=width, height=height, strength=request.refiner_strength),
        prompts=request.prompts_2 or request.prompts, negative=request.negative_2 or request.negative,
        prompts_2=None, negative_2=None, image=None, mask=None, begin=request.refiner_at or 0.0, end=1.0,
        guidance=Guidance(**vars(request.guidance)),
    )  # fmt: skip
    if request.refiner_at is None:
        run = SamplingRun(refiner, asked, first.noise, first.on_step)
        return renoised(run, latents.to(run.device, run.dtype))
    # the base's scheduler goes on, not the one that the refiner was published with
    schedule = replace(first.schedule, prediction_type=refiner.family.schedule.prediction_type)
    return continued(SamplingRun(refiner, asked, first.noise, first.on_step, schedule), latents)
