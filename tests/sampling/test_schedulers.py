"""Schedulers on a problem whose exact answer is known, and our solvers' weights against diffusers' own."""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from itertools import product
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import scipy.stats
import torch
from mixture import CENTRES, ORDER, WIDTH, Model, Outcome, geometric, run, schedule
from torch import Tensor

from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.process import PARAMETRISATIONS, NoiseSchedule, noise_levels
from ldm.sampling import solvers
from ldm.sampling.loop import sample
from ldm.sampling.schedulers import (
    OWN_SPACING,
    SCHEDULERS,
    UNSUPPORTED,
    make,
    own_name,
    scheduler_class,
    spacings,
    step_arguments,
)

DISTILLED = ("lcm", "tcd")
FIRST_ORDER = ("ddpm", "euler-a")  # of the stochastic ones
EXTRAPOLATE = ("pndm", "lms")  # their last step, too, looks back at earlier predictions
diffusers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("name", ORDER)
def test_the_error_falls_as_the_method_claims(name: str) -> None:
    """With equal ratios of noise levels; PNDM takes its own timesteps only, whose ratios grow towards the end."""
    errors = [run(schedule(), name, n, "default" if name == "pndm" else geometric(n), 512).error() for n in (20, 80)]
    seen = math.log2(errors[0] / errors[1]) / 2
    slack = {"pndm": 0.7, "lms": 0.7}.get(name, 0.25)  # LMS reaches the fourth order after three steps of lower ones
    assert abs(seen - ORDER[name]) < slack, f"order {seen:.2f}"


def test_ddim_with_eta_draws_noise_and_keeps_the_distribution() -> None:
    """With eta 1 it is the ancestral sampler, with its error; without a generator's noise it would shrink."""
    outcome = run(schedule(), "ddim", 80, "trailing", 4096, eta=1.0)
    assert outcome.distance() < 0.06
    assert outcome.error() > 0.3


def test_pndm_keeps_its_order_whatever_the_model_predicts() -> None:
    errors = [run(schedule(prediction), "pndm", 40, count=512).error() for prediction in PARAMETRISATIONS]
    assert max(errors) < 1.01 * min(errors)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in (*ORDER, *DISTILLED)])
def test_stochastic_samples_have_the_right_distribution(name: str) -> None:
    """Second-order solvers are there in 40 steps; dpm++3m-sde and dpm++sde would not be with diffusers' formulas."""
    few, many = (run(schedule(), name, steps, geometric(steps), 16384).distance() for steps in (10, 40))
    assert many < few / 2
    assert many < (0.1 if name in FIRST_ORDER else 0.03)


@pytest.mark.parametrize("prediction", PARAMETRISATIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_combination_lands_where_it_should(name: str, prediction: str) -> None:
    """30 steps: the mixture's distribution, and what the model says last is what comes out.

    With every spacing where the model predicts noise; for the others two suffice.
    """
    if (name, prediction) in UNSUPPORTED:
        with pytest.raises(LdmError, match=f"scheduler {re.escape(name)} cannot use a model that predicts sample"):
            make(schedule(prediction), 30, name)
        return
    for spacing in spacings(name):
        if prediction != "epsilon" and spacing not in ("default", "list"):
            continue
        outcome = run(schedule(prediction), name, 30, geometric(30) if spacing == "list" else spacing, 1024)
        coarse = spacing == "beta"  # diffusers spreads it over sigma, and leaves long steps in log sigma
        assert outcome.distance() < (0.35 if name in DISTILLED or coarse else 0.15), spacing
        if name in ORDER:
            assert outcome.error() < (0.12 if ORDER[name] == 1 or coarse else 0.025), spacing
        ends_at_zero = name != "tcd" and not (
            name == "deis" and spacing in ("default", "leading", "linspace", "trailing")
        )
        limit = 0.04 if name in EXTRAPOLATE or not ends_at_zero else 1e-5  # the lowest trained noise level is 0.03
        assert outcome.residual() < limit, spacing


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in OWN_SPACING])
def test_noise_levels_are_those_asked_for(name: str) -> None:
    levels = (12.0, 5.0, 2.0, 0.7, 0.2, 0.05)
    plan = make(schedule(), 6, name, levels)
    model = Model(schedule())
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in sample(model, plan, x, step_arguments(plan.scheduler, generator, 0.0)):
        pass
    exact = name not in ("ddim", "ddpm")
    seen = [s for _, s in model.seen]
    for level in levels:
        assert min(abs(math.log(s / level)) for s in seen) < (1e-4 if exact else 0.1)  # timesteps: the nearest


def k_diffusion(spacing: str, steps: int, low: float, high: float) -> Tensor:
    """Its get_sigmas_karras and get_sigmas_exponential, and the web interface's beta_scheduler, without the last 0."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "karras":
        ends = low ** (1 / 7), high ** (1 / 7)
        return (ends[1] + ramp * (ends[0] - ends[1])) ** 7
    if spacing == "exponential":
        return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    return low + torch.tensor(scipy.stats.beta.ppf(1 - ramp, 0.6, 0.6)) * (high - low)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in OWN_SPACING])
def test_levels_go_from_the_highest_to_the_lowest(name: str, spacing: str) -> None:
    """As in k-diffusion, whatever the timesteps that a model was published with: of SD 1.5, or SDXL's "leading"."""
    for family, steps in product(("sd15", "sdxl"), (1, 2, 8, 20)):
        published = FAMILIES[family].schedule
        ends = noise_levels(published.alpha_bars()).tolist()
        levels = k_diffusion(spacing, steps, ends[0], ends[-1])
        plan = make(published, steps, name, spacing)
        model = Model(published)
        arguments = step_arguments(plan.scheduler, torch.Generator().manual_seed(0), 0.0)
        for _ in sample(model, plan, torch.zeros(1, 1, 1, 1, dtype=torch.float64), arguments):
            pass
        seen = torch.tensor([s for _, s in model.seen], dtype=torch.float64)
        assert seen[0].item() == pytest.approx(14.6146, abs=1e-3)
        exact = name not in ("ddim", "ddpm")  # which know whole timesteps only
        off = (levels.log()[:, None] - seen.log()).abs().min(dim=1).values
        assert off.max() < (1e-3 if exact else 0.4)


def test_a_published_spacing_goes_from_the_highest_to_the_lowest_too() -> None:
    options = {"use_karras_sigmas": True, "timestep_spacing": "leading"}
    for kind in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        published, plain = (NoiseSchedule(scheduler=kind, options=given) for given in (options, {}))
        found: Any = make(published, 8).scheduler
        expected: Any = make(plain, 8, None, "karras").scheduler
        assert torch.equal(found.sigmas, expected.sigmas)
        assert found.sigmas[0].item() == pytest.approx(14.6146, abs=1e-3)
    ends = NoiseSchedule(scheduler="EulerDiscreteScheduler", options=options | {"sigma_min": 0.1, "sigma_max": 9.0})
    assert make(ends, 8).scheduler.sigmas[[0, 7]].tolist() == pytest.approx([9.0, 0.1])  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["sd15", "sd2-v", "sdxl"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_begins_at_the_highest_level(name: str, family: str) -> None:
    """Not at timestep 0 or 1, as "linspace" and "leading" do in diffusers: nothing is left to make there."""
    for spacing in spacings(name):
        if spacing != "list":
            assert float(make(FAMILIES[family].schedule, 1, name, spacing).timesteps[0]) >= 998, spacing


@pytest.mark.parametrize("name", OWN_SPACING)
def test_spacings_that_make_no_sense_are_refused_with_the_reason(name: str) -> None:
    reason = re.escape(f"does not go with scheduler {name}: {OWN_SPACING[name]}; choose one of: default")
    for spacing in ("ays", "karras", (9.0, 3.0, 0.3)):
        with pytest.raises(LdmError, match=reason):
            make(schedule(), 3, name, spacing)
    with pytest.raises(LdmError, match="spacing 'list' means noise levels of your own; give falling numbers"):
        make(schedule(), 3, "euler", "list")


@pytest.mark.parametrize("spacing", ["ays", "beta"])  # close together at the lower end, at both ends
def test_each_timestep_is_used_once(spacing: str) -> None:
    timesteps = [int(t) for t in make(schedule(), 200, "ddim", spacing).timesteps]
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert 0 <= timesteps[-1] < timesteps[0] <= 999
    with pytest.raises(LdmError, match="40 noise levels, but 20 training timesteps; choose fewer steps"):
        make(NoiseSchedule(train_steps=20), 40, "ddim", "ays")


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_end_where_the_next_begins(name: str, spacing: str) -> None:
    """150 steps do not divide 1000 timesteps, so that diffusers' own steps would all be too short."""
    assert run(schedule(), name, 150, spacing, 512).error() < (0.015 if name == "ddim" else 0.002)


def test_a_published_spacing_gives_way_to_another() -> None:
    published = NoiseSchedule(scheduler="EulerDiscreteScheduler", options={"use_karras_sigmas": True})
    plain = NoiseSchedule(scheduler="EulerDiscreteScheduler")
    for spacing in ("trailing", "exponential", "ays"):
        levels, expected = (make(s, 8, None, spacing).scheduler.sigmas for s in (published, plain))  # type: ignore[attr-defined]
        assert torch.equal(levels, expected)


def steps_of(kind: Any, steps: int, options: dict[str, Any]) -> Tensor:
    """Latents after a run with a made-up model, with noise levels in double precision: our arithmetic or diffusers'."""
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    scheduler.set_timesteps(steps, device="cpu")
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = step_arguments(scheduler, torch.Generator().manual_seed(1), 0.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(1.3 * scaled) + 0.3 * scaled.roll(1, -1), t, x, **arguments)[0]
    return x


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[
            (
                "DPMSolverMultistepScheduler",
                {"algorithm_type": kind, "solver_order": order, "solver_type": solver, **end},
            )
            for kind in ("dpmsolver++", "sde-dpmsolver++")
            for order in (1, 2, 3)
            for solver in ("midpoint", "heun")
            for end in ({}, {"final_sigmas_type": "sigma_min"})
            if (kind, order) != ("sde-dpmsolver++", 3)  # where diffusers is wrong
        ],
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        *[
            (
                "UniPCMultistepScheduler",
                {"solver_order": order, "solver_type": solver, "final_sigmas_type": "sigma_min", **more},
            )
            for order in (1, 2, 3)
            for solver in ("bh1", "bh2")
            for more in ({}, {"predict_x0": False})
        ],
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        *[("DEISMultistepScheduler", {"solver_order": order}) for order in (1, 2, 3)],
        ("LMSDiscreteScheduler", {}),
    ],
)
def test_weights_are_those_of_diffusers(name: str, options: dict[str, Any]) -> None:
    for steps in (4, 18):
        made, expected = (steps_of(getattr(home, name), steps, options) for home in (solvers, diffusers))
        torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)  # the noise is in single precision


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_samplers_return_the_denoised_image(name: str) -> None:
    outcome: Outcome = run(schedule(), name, 8)
    assert (outcome.samples[:, None] - CENTRES).abs().min(dim=1).values.mean() < 2 * WIDTH


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    zero = NoiseSchedule(
        "v_prediction", zero_terminal_snr=True, scheduler="DDIMScheduler", options={"clip_sample": False}
    )
    assert zero.alpha_bars()[-1] == 0
    for spacing in ("trailing", "karras"):
        plan = make(zero, 10, "ddim", spacing)
        assert plan.scheduler.alphas_cumprod[-1] < 1e-6  # type: ignore[attr-defined]
        assert int(plan.timesteps[0]) == 999
    with pytest.raises(
        LdmError, match="cannot start from pure noise, which this model needs; choose ddim, ddpm, euler"
    ):
        make(zero, 10, "heun")


def test_published_schedulers_have_short_names() -> None:
    assert [own_name(FAMILIES[name].schedule) for name in ("sd15", "sd2-v", "sdxl")] == ["pndm", "ddim", "euler"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_not_clipped(name: str) -> None:
    """Whatever scheduler a model was published with, whose options may not say so."""
    config = make(NoiseSchedule("v_prediction", options={}), 4, name).scheduler.config
    assert not config.get("clip_sample")
    assert not config.get("thresholding")


def test_one_thread_at_a_time_imports_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of a server would find none in a module that is half imported."""
    inside, most, found = [0], [0], []

    class LazyModule(SimpleNamespace):
        def __getattr__(self, name: str) -> type:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1
            return type(name, (), {})

    monkeypatch.setitem(sys.modules, "diffusers", LazyModule())  # type: ignore[arg-type]
    threads = [threading.Thread(target=lambda: found.append(scheduler_class("euler-a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and most == [1]
