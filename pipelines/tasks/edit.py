"""Editing an image by an instruction, given as prompt (InstructPix2Pix: Brooks et al. 2022, arXiv 2211.09800).

The U-Net reads the image's latents, as the autoencoder gives them, beside the noisy ones.
"""

from __future__ import annotations

from torch import Tensor

from ldm.errors import LdmError
from ldm.families import Family
from ldm.sampling.guidance import edited
from pipelines.request import Request
from pipelines.run import SamplingRun


def check_edit(request: Request, family: Family) -> None:
    """Raise unless there is an image and no mask, one pass, and guidance of the kind that editing has.

    Raises:
        LdmError: something is missing, or has no meaning for a model that edits.
    """
    if request.mask or not request.image:
        raise LdmError(f"a {family.name} model edits an image by instruction: give an image, and no mask (--image)")
    if request.guidance.perturbed or request.guidance.interval != (0, 1):
        raise LdmError(f"a {family.name} model has guidance of its own; leave perturbed and interval out")
    if request.hires or request.refined:
        raise LdmError(f"a {family.name} model edits in one pass; leave hires and the refiner out")


def edit(run: SamplingRun) -> Tensor:
    """Latents (B, C, h, w) of the request's image after the edit, from pure noise."""
    request, model = run.request, run.model
    assert request.image is not None
    model.bring(model.autoencoder)
    weight = next(model.autoencoder.parameters())
    latents = model.autoencoder.encode(run.pixels_of(request.image).to(weight.device, weight.dtype)).mode()
    x = run.noise.draw(run.shape, run.dtype, run.device) * run.plan.scheduler.init_noise_sigma
    cond, negative, _ = run.conditioning
    image = latents.to(run.device, run.dtype).expand(len(x), -1, -1, -1)
    schedule, times = model.family.schedule, run.plan.times
    return run.sample(x, run.plan, edited(run.unet(), cond, negative, request.guidance, schedule, times, image))
