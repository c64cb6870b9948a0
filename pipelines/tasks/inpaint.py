"""Inpainting: only the masked part of an image is made anew.

With an ordinary U-Net, the known part is put back after each step, at that step's noise level (Lugmayr et al. 2022,
arXiv 2201.09865, without its resampling). A U-Net with 9 channels also reads the mask and the masked image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.families import Family
from ldm.images import WHITE, check_same_size, mask_to_tensor
from ldm.sampling.loop import Step
from ldm.sampling.schedulers import add_noise
from pipelines.request import Request, whole_steps
from pipelines.run import SamplingRun
from pipelines.tasks.image_to_image import first_call


def check_inpaint(request: Request, family: Family) -> None:
    """Raise unless there are an image and a mask of the same size with white in it, and strength leaves a step.

    Raises:
        LdmError: an image or a mask is missing, or does not fit.
    """
    if request.mask and not request.image:
        raise LdmError("a mask without an image: give the image that it belongs to (image=, --image)")
    if not request.mask or not request.image:
        raise LdmError(f"a {family.name} model fills in images: give an image and a mask (--image, --mask)")
    check_same_size(request.mask, request.image)
    brightest = request.mask.getextrema()[1]
    if brightest < WHITE:  # type: ignore[operator]
        raise LdmError(
            f"the mask has no white pixel ({WHITE} or more), its largest is {brightest}: paint white what should be "
            "made anew; transparent parts count as black"
        )
    whole_steps(request.steps, "strength", request.strength)
    if family.task == "inpaint" and request.hires:
        raise LdmError(f"a {family.name} model fills in images in one pass; leave hires out")


def inpaint(run: SamplingRun) -> Tensor:
    """Latents (B, C, h, w) of the request's image with the masked part made anew."""
    request = run.request
    assert request.image is not None
    assert request.mask is not None
    reads_mask = run.model.family.task == "inpaint"
    pixels = run.pixels_of(request.image)
    mask = mask_to_tensor(request.mask, request.width, request.height)
    known = None if reads_mask and request.strength == 1 else run.encode(pixels)
    noise = run.noise.draw(run.shape, run.dtype, run.device)
    plan = run.plan.tail(first_call(run))
    # a latent is free if any of its pixels is: (1, 1, h, w)
    small = F.adaptive_max_pool2d(mask, run.shape[2:]).to(run.device, run.dtype)
    if known is None or request.strength == 1:
        x = noise * plan.scheduler.init_noise_sigma
    else:
        x = add_noise(plan.scheduler, known, noise, plan.timesteps[0])
    if reads_mask:
        masked = run.encode(pixels * (mask < 0.5))
        extra = torch.cat([small.expand(len(masked), -1, -1, -1), masked], dim=1)
        return run.sample(x, plan, run.denoiser(plan, extra))

    if run.noise.rng == "diffusers":  # diffusers encodes the masked image for every U-Net, which draws noise
        run.noise.draw((1, *run.shape[1:]), run.dtype, run.device)

    def keep(latents: Tensor, step: Step) -> Tensor:
        assert known is not None
        last = step.index == step.count - 1
        proper = known if last else add_noise(plan.scheduler, known, noise, plan.timesteps[step.index + 1])
        return (1 - small) * proper + small * latents

    return run.sample(x, plan, keep=keep)


def pasted(made: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The made image where the mask is white, and the original's pixels elsewhere."""
    size = made.size
    image = original if original.size == size else original.resize(size, Image.Resampling.LANCZOS)
    white = mask_to_tensor(mask, *size)[0, 0, :, :, None].numpy().astype(bool)
    return Image.fromarray(np.where(white, np.asarray(made), np.asarray(image)))
