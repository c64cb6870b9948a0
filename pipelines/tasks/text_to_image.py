"""Text to image: from pure noise."""

from __future__ import annotations

from torch import Tensor

from pipelines.run import SamplingRun


def text_to_image(run: SamplingRun) -> Tensor:
    """Latents (B, C, h, w) for the run's prompts, up to the part of the run where another model takes over."""
    plan = run.plan
    x = run.noise.draw(run.shape, run.dtype, run.device) * plan.scheduler.init_noise_sigma
    return run.sample(x, plan.head(run.calls_before(run.request.end)) if run.request.end < 1 else plan)
