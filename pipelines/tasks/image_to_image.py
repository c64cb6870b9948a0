"""Image to image, which starts from a noisy image (Meng et al. 2021, arXiv 2108.01073); and the refiner's tasks."""

from __future__ import annotations

from torch import Tensor

from ldm.families import Family
from ldm.sampling.schedulers import add_noise
from pipelines.request import Request, whole_steps
from pipelines.run import SamplingRun


def check_image_to_image(request: Request, family: Family) -> None:
    """Raise unless strength leaves a step.

    Raises:
        LdmError: strength leaves no step.
    """
    whole_steps(request.steps, "strength", request.strength)


def first_call(run: SamplingRun) -> int:
    """Calls of the denoiser that `strength` leaves out."""
    steps = run.request.steps
    return (steps - whole_steps(steps, "strength", run.request.strength)) * run.plan.scheduler.order


def image_to_image(run: SamplingRun) -> Tensor:
    """Latents (B, C, h, w) that keep as much of the request's image as its strength leaves."""
    assert run.request.image is not None
    return renoised(run, run.encode(run.pixels_of(run.request.image)))


def renoised(run: SamplingRun, latents: Tensor) -> Tensor:
    """Clean latents (B, C, h, w), with noise added as strength says, and denoised again."""
    plan = run.plan.tail(first_call(run))
    noise = run.noise.draw(run.shape, run.dtype, run.device)
    x = add_noise(plan.scheduler, latents, noise, plan.timesteps[0])
    return run.sample(x, plan)


def continued(run: SamplingRun, latents: Tensor) -> Tensor:
    """Noisy latents (B, C, h, w), which another model left at the part `begin` of the run, denoised to the end."""
    return run.sample(latents.to(run.device, run.dtype), run.plan.tail(run.calls_before(run.request.begin)))
