"""The noise process: parametrisations against their definitions and diffusers, and that nobody else interprets them."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from ldm.process import BETA_SCHEDULES, PARAMETRISATIONS, NoiseSchedule, alpha_at, noise_levels

ROOT = Path(__file__).parent.parent
LATENTS, NOISE = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
STEPS = torch.tensor([0, 500, 999])


@pytest.mark.parametrize("name", PARAMETRISATIONS)
@pytest.mark.parametrize("t", [0.0, 41.5, 500.0, 998.75, 999.0])
def test_predictions_clean_latents_and_noise_are_turned_into_each_other(name: str, t: float) -> None:
    schedule = NoiseSchedule(name)
    alpha, sigma = schedule.scales(t)
    assert alpha**2 + sigma**2 == pytest.approx(1)
    x = alpha * LATENTS + sigma * NOISE
    one = schedule.parametrisation
    prediction = one.target(LATENTS, NOISE, torch.tensor(alpha), torch.tensor(sigma))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(one.to_clean(prediction, x, alpha, sigma), LATENTS, **close)
    torch.testing.assert_close(one.from_clean(LATENTS, x, alpha, sigma), prediction, **close)
    torch.testing.assert_close(one.to_noise(prediction, x, alpha, sigma), NOISE, **close)
    level = torch.tensor(sigma / alpha, dtype=torch.float64)
    torch.testing.assert_close(one.denoised(prediction, x / alpha, level), LATENTS, **close)
    assert alpha_at(float(level)) == pytest.approx(alpha)
    anything = torch.rand_like(LATENTS)
    torch.testing.assert_close(
        one.to_clean(one.from_clean(anything, x, alpha, sigma), x, alpha, sigma), anything, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", BETA_SCHEDULES)
def test_targets_weights_and_levels_are_those_of_diffusers(kind: str) -> None:
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
    schedule = NoiseSchedule(beta_schedule=kind)
    bars = schedule.alpha_bars()
    torch.testing.assert_close(bars.float(), theirs.alphas_cumprod, rtol=2e-4, atol=0)  # theirs are rounded
    rows = bars[STEPS][:, None, None, None]
    alpha, sigma = rows.sqrt(), (1 - rows).sqrt()
    wanted = {"epsilon": NOISE, "v_prediction": theirs.get_velocity(LATENTS, NOISE, STEPS), "sample": LATENTS}
    snr = noise_levels(bars[STEPS]) ** -2
    torch.testing.assert_close(snr.float(), compute_snr(theirs, STEPS), rtol=1e-3, atol=0)
    capped = snr.clamp(max=5.0)
    weights = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}
    for name, one in PARAMETRISATIONS.items():
        torch.testing.assert_close(one.target(LATENTS, NOISE, alpha, sigma), wanted[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.weight(snr, 5.0), weights[name])


def test_scales_between_two_timesteps_lie_between_theirs() -> None:
    schedule = NoiseSchedule(zero_terminal_snr=True)
    bars = schedule.alpha_bars()
    assert schedule.scales(999.0) == (0.0, 1.0)
    assert schedule.scales(10.25)[0] ** 2 == pytest.approx(float(0.75 * bars[10] + 0.25 * bars[11]))


def test_nobody_else_interprets_a_prediction_type() -> None:
    """No comparison with its name, and no table by its name, but where file formats' names are translated."""
    found = []
    for path in sorted(path for top in ("ldm", "pipelines", "tools") for path in (ROOT / top).rglob("*.py")):
        place = path.relative_to(ROOT)
        if place == Path("ldm/process.py") or place.parts[:2] == ("ldm", "weights"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[ast.AST | None] = []
            if isinstance(node, ast.Compare):
                names = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            elif isinstance(node, ast.Dict):
                names = list(node.keys)
            elif isinstance(node, ast.MatchValue):
                names = [node.value]
            if any(isinstance(name, ast.Constant) and name.value in PARAMETRISATIONS for name in names):
                found.append(f"{place}:{node.lineno}")
    assert not found
