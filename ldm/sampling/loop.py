"""The sampling loop: from noise to latents, a step at a time.

B images, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.sampling.schedulers import SamplingPlan


@dataclass(frozen=True)
class Time:
    """One timestep: a number for decisions on the CPU, and a tensor for the model that is never read back."""

    value: float  # 0 … train_steps - 1; a fraction with some spacings
    tensor: Tensor  # the same on the model's device: ()


Denoise = Callable[[Tensor, Time], Tensor]  # scaled noisy latents (B, C, h, w) -> prediction (B, C, h, w)


@dataclass(frozen=True)
class Step:
    """A step of the loop and its tensors."""

    index: int  # from 0
    count: int  # of all steps
    time: Time
    latents: Tensor  # (B, C, h, w) after the step
    model_input: Tensor  # (B, C, h, w) scaled noisy latents before the step
    prediction: Tensor  # (B, C, h, w) by the model, from the model input


def sample(
    denoise: Denoise, plan: SamplingPlan, x: Tensor, arguments: Mapping[str, Any]
) -> Generator[Step, Tensor | None, None]:
    """Denoise latents `x` (B, C, h, w) through all timesteps of the plan, yielding a `Step` after each.

    A caller changes the latents between steps by sending new ones into the generator.
    """
    scheduler = plan.scheduler
    values = plan.times
    on_device = [t.to(x.device, non_blocking=True) for t in plan.timesteps]
    for index, t in enumerate(plan.timesteps):
        time = Time(values[index], on_device[index])
        model_input = scheduler.scale_model_input(x, t)
        prediction = denoise(model_input, time)
        x = scheduler.step(prediction, t, x, **arguments)[0]
        changed = yield Step(index, len(values), time, x, model_input, prediction)
        x = x if changed is None else changed
