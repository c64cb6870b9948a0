"""Schedulers by short name, and the spacings of their steps over the noise levels.

Euler's method is our own. The others are diffusers' classes, some of them corrected, imported only when chosen.

A scheduler keeps the state of a run, so each run makes its own. Its tables stay on the CPU, so that no step waits for
the GPU.
"""

from __future__ import annotations

import difflib
import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.process import NoiseSchedule, noise_levels
from ldm.sampling.euler import SPREADS, EulerDiscreteScheduler, spread


class Scheduler(Protocol):
    """diffusers' interface of a scheduler."""

    order: int
    timesteps: Tensor
    init_noise_sigma: Any
    config: Any

    def set_timesteps(self, num_inference_steps: int, *, device: Any = ...) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any: ...
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> diffusers' class, options that make it this one
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++3m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm++2s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    "dpm++sde": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
SPACINGS: dict[str, dict[str, Any]] = {  # name -> options; a scheduler without them is given Euler's noise levels
    "default": {},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
# Align Your Steps (Sabour et al. 2024, arXiv 2404.14507): noise levels for 10 steps, to be interpolated for others
ALIGN_YOUR_STEPS = {
    False: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),  # SD 1 and 2
    True: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),  # SDXL
}
MOST_STEPS = 1000
LEVELS = ("ays", "list")  # spacings that are noise levels, not options
OWN_SPACING = {  # scheduler -> why it can be spaced by its own options only
    "pndm": "its weights hold for steps of equal length",
    "lcm": "it is for models distilled at certain timesteps",
    "tcd": "it is for models distilled at certain timesteps",
}
_NOT_SPACED = {  # options of published models that would change the spacing, turned off
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}
UNSUPPORTED = {  # scheduler and prediction type: pairs that diffusers does not implement
    ("euler-a", "sample"), ("dpm2", "sample"), ("dpm2-a", "sample"),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingPlan:
    """A scheduler set up for one run, and the run's timesteps."""

    scheduler: Scheduler
    timesteps: list[Tensor]  # scalars on the CPU, one for each call of the denoiser, from noise to image
    begin: int = 0  # calls left out at the start (image to image)

    def tail(self, begin: int) -> SamplingPlan:
        """The same run from call number `begin` on."""
        set_begin = getattr(self.scheduler, "set_begin_index", None)
        if set_begin:
            set_begin(self.begin + begin)
        return SamplingPlan(self.scheduler, self.timesteps[begin:], self.begin + begin)

    def head(self, end: int) -> SamplingPlan:
        """The same run up to call number `end`."""
        return SamplingPlan(self.scheduler, self.timesteps[:end], self.begin)

    @property
    def times(self) -> list[float]:
        """The timesteps as numbers."""
        return [float(t) for t in self.timesteps]

    def calls_before(self, part: float, train_steps: int) -> int:
        """Calls of the denoiser in the first `part` (0 to 1) of the noise levels, whole steps only."""
        cutoff = round(train_steps * (1 - part))
        calls = sum(t >= cutoff for t in self.times)
        return calls - calls % self.scheduler.order


_IMPORTING = threading.Lock()  # diffusers imports its classes when they are first used, which one thread alone may do


def scheduler_class(name: str) -> type:
    """The class of a scheduler by its short name: ours if we have one, else diffusers'.

    Raises:
        LdmError: the name is not known; the message suggests the nearest ones.
    """
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, 3, 0.4) or SCHEDULERS
        raise LdmError(f"scheduler {name!r} is not known; choose {' or '.join(near)}")
    if name == "euler":
        return EulerDiscreteScheduler
    kind = SCHEDULERS[name][0]
    with _IMPORTING:
        import diffusers  # takes seconds

        from ldm.sampling import solvers

        return getattr(solvers, kind, None) or getattr(diffusers, kind)


@cache
def _option_names(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]


def spacings(name: str) -> list[str]:
    """The names of the spacings that a scheduler can use."""
    if name not in OWN_SPACING:
        return [*SPACINGS, *LEVELS]
    known = _option_names(scheduler_class(name))
    return [spacing for spacing, options in SPACINGS.items() if options.keys() <= known]


def own_name(schedule: NoiseSchedule) -> str:
    """The short name of the scheduler that a model is published with."""
    fits = [name for name, (kind, _) in SCHEDULERS.items() if kind == schedule.scheduler]
    algorithm = schedule.options.get("algorithm_type")
    exact = [name for name in fits if SCHEDULERS[name][1].get("algorithm_type") == algorithm]
    return (exact or fits or ["ddim"])[0]


def make(
    schedule: NoiseSchedule,
    steps: int,
    name: str | None = None,
    spacing: str | Sequence[float] = "default",
    xl: bool = False,
) -> SamplingPlan:
    """A scheduler for one run of `steps` steps.

    Args:
        schedule: how noise was added in training.
        steps: number of steps, from 1 to 1000 (50 for lcm and tcd).
            One step begins at the highest noise level, whatever the spacing.
        name: short name; by default that of the scheduler that the model is published with.
        spacing: a name of `SPACINGS`, "ays", or noise levels sigma of the user's own, falling, one for each step.
        xl: whether "ays" means SDXL's noise levels.

    Raises:
        LdmError: a name is not known, the combination is not possible (the message lists others), or a number is out
            of bounds.
    """
    name = name or own_name(schedule)
    kind = scheduler_class(name)
    label = spacing if isinstance(spacing, str) else "list"
    _check(schedule, steps, name, kind, label)
    if label == "default":
        spacing = label = _published_spacing(schedule, kind)
    levels = _levels(schedule, steps, kind, spacing, xl)
    options = _options(schedule, name, label, levels is not None)
    if steps == 1:  # with "leading" and "linspace" it would begin at the lowest level
        options["timestep_spacing"] = "trailing"
    scheduler: Any = kind(**{key: value for key, value in options.items() if key in _option_names(kind)})
    try:
        if levels:
            _set_levels(scheduler, name, levels)
        else:
            scheduler.set_timesteps(steps, device="cpu")
    except ValueError as error:
        raise LdmError(f"scheduler {name} cannot do {steps} steps: {' '.join(str(error).split())}") from None
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return SamplingPlan(scheduler, list(scheduler.timesteps))


def _check(schedule: NoiseSchedule, steps: int, name: str, kind: type, spacing: str) -> None:
    """Raise unless a scheduler can do so many steps of this spacing with a model of this noise schedule."""
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MOST_STEPS:
        raise LdmError(f"{steps!r} steps; choose a whole number from 1 to {MOST_STEPS}")
    if spacing not in spacings(name):
        known = spacing in SPACINGS or spacing in LEVELS
        why = f"does not go with scheduler {name}: {OWN_SPACING[name]}" if known else "is not known"
        others = [other for other in SCHEDULERS if known and spacing in spacings(other)]
        more = f"; {spacing} goes with: {', '.join(others)}" if others else ""
        raise LdmError(f"spacing {spacing!r} {why}; choose one of: {', '.join(spacings(name))}{more}")
    prediction = schedule.prediction_type
    if (name, prediction) in UNSUPPORTED:
        fits = [other for other in SCHEDULERS if (other, prediction) not in UNSUPPORTED]
        raise LdmError(f"scheduler {name} cannot use a model that predicts {prediction}; choose {', '.join(fits)}")
    if schedule.zero_terminal_snr and "rescale_betas_zero_snr" not in _option_names(kind):
        fits = [other for other in SCHEDULERS if "rescale_betas_zero_snr" in _option_names(scheduler_class(other))]
        raise LdmError(
            f"scheduler {name} cannot start from pure noise, which this model needs; choose {', '.join(fits)}"
        )


def _options(schedule: NoiseSchedule, name: str, spacing: str, levels: bool) -> dict[str, Any]:
    """Options of a scheduler, some of which its class may lack; with `levels`, noise levels are set afterwards."""
    options = {
        "clip_sample": False,  # diffusers clips to [-1, 1] by default, which latents exceed
        **schedule.options,
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "prediction_type": schedule.prediction_type,
        **SCHEDULERS[name][1],
    }
    if spacing != "default":
        options |= _NOT_SPACED | SPACINGS.get(spacing, {})
    if levels:
        # the last level may be the lowest trained one, from which only a step to the clean latents is left
        options |= _NOT_SPACED | {"use_exponential_sigmas": True, "set_alpha_to_one": True, "final_sigmas_type": "zero"}
    if schedule.zero_terminal_snr:
        options["rescale_betas_zero_snr"] = True
    return options


def _levels(
    schedule: NoiseSchedule, steps: int, kind: type, spacing: str | Sequence[float], xl: bool
) -> list[float] | None:
    """Noise levels to set, or None if the scheduler has options for that spacing."""
    if spacing == "list":
        raise LdmError("spacing 'list' means noise levels of your own; give falling numbers, one for each step")
    if not isinstance(spacing, str):
        return _checked(spacing, steps)
    if spacing == "ays":
        return _align_your_steps(steps, xl)
    if spacing in SPREADS:
        return _from_end_to_end(schedule, steps, spacing)
    if SPACINGS[spacing].keys() <= _option_names(kind):
        return None
    return make(schedule, steps, "euler", spacing).scheduler.sigmas[:-1].tolist()  # type: ignore[attr-defined]


def _published_spacing(schedule: NoiseSchedule, kind: type) -> str:
    """The one of `SPREADS` that a model is published with, if the scheduler has its option; else "default"."""
    found = [name for name in SPREADS if schedule.options.get(f"use_{name}_sigmas")]
    return found[0] if len(found) == 1 and SPACINGS[found[0]].keys() <= _option_names(kind) else "default"


def _from_end_to_end(schedule: NoiseSchedule, steps: int, spacing: str) -> list[float]:
    """Levels from the highest trained one to the lowest, as in k-diffusion; or between the ends that a model publishes.

    In diffusers they lie between the first timestep and the last one of the run, which with the timesteps "leading" is
    half way down: 7.4 in place of 14.6 with 8 steps.
    """
    scheduler: Any = make(schedule, 1, "euler", "trailing").scheduler
    low, high = scheduler.sigma_min, scheduler.sigma_max
    trained = scheduler.trained.tolist()
    return spread(spacing, steps, trained[0] if low is None else low, trained[-1] if high is None else high).tolist()


def _align_your_steps(steps: int, xl: bool) -> list[float]:
    """The published noise levels, their logarithms interpolated to the number of steps as its authors do."""
    levels = np.log(ALIGN_YOUR_STEPS[xl][::-1])
    points = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(levels)), levels)
    return np.exp(points)[::-1][:-1].tolist()


def _checked(levels: Sequence[float], steps: int) -> list[float]:
    try:
        values = [float(level) for level in levels]
    except (TypeError, ValueError):
        raise LdmError(f"spacing {levels!r}: a name, or falling noise levels, one for each step, are needed") from None
    if (
        len(values) != steps
        or not all(np.isfinite(values))
        or any(a <= b for a, b in zip(values, [*values[1:], 0], strict=True))
    ):
        raise LdmError(f"noise levels {values}: {steps} positive numbers are needed, each smaller than the one before")
    return values


def _set_levels(scheduler: Any, name: str, levels: list[float]) -> None:
    """Set a scheduler up for these noise levels. DDIM and DDPM know timesteps only: the nearest ones."""
    if name == "euler":
        scheduler.set_levels(np.array(levels))
        return
    if name in ("ddim", "ddpm"):
        scheduler.set_timesteps(timesteps=_nearest(levels, scheduler), device="cpu")
        return
    if hasattr(scheduler, "_convert_to_exponential"):  # diffusers takes the levels from here, then finds timesteps
        scheduler._convert_to_exponential = lambda **_: np.array(levels)
    scheduler.set_timesteps(len(levels), device="cpu")
    if len(scheduler.timesteps) == len(levels):  # one call a level: some schedulers cut the timestep's fraction off
        trained = _trained(scheduler)
        scheduler.timesteps = torch.from_numpy(np.interp(np.log(levels), trained, np.arange(len(trained)))).float()
    if name == "euler-a":
        scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)


def _trained(scheduler: Any) -> np.ndarray:
    """The logarithm of the noise level at each training timestep: (train_steps,)."""
    bars = scheduler.alphas_cumprod.clamp(min=2**-24)  # what diffusers takes for pure noise
    return noise_levels(bars).log().numpy()


def _nearest(levels: list[float], scheduler: Any) -> list[int]:
    """The training timesteps with the nearest noise levels; a neighbour replaces one that is already taken."""
    trained = _trained(scheduler)
    if len(levels) > len(trained):
        raise LdmError(f"{len(levels)} noise levels, but {len(trained)} training timesteps; choose fewer steps")
    steps = [-1]
    for level in reversed(levels):
        steps.append(max(int(np.abs(trained - np.log(level)).argmin()), steps[-1] + 1))
    return [min(step, len(trained) - 1 - place) for place, step in enumerate(steps[:0:-1])]


def add_noise(scheduler: Scheduler, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents (B, C, h, w) with the noise of a timestep ().

    diffusers moves the scheduler's table to the latents' device, where later steps would wait for it; here the table is
    moved back to the CPU.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    noisy = scheduler.add_noise(latents, noise, timestep[None])
    if table is not None:
        scheduler.alphas_cumprod = table  # type: ignore[attr-defined]
    return noisy


def step_arguments(scheduler: Scheduler, generator: Any, eta: float) -> dict[str, Any]:
    """Further arguments of this scheduler's `step`: generators of noise, DDIM's and TCD's eta, and the flag with which
    diffusers returns a plain tuple."""
    names = inspect.signature(scheduler.step).parameters
    wanted = {"generator": generator, "eta": eta, "return_dict": False}
    return {name: value for name, value in wanted.items() if name in names}
