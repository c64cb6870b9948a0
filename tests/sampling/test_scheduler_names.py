"""The names of schedulers and spacings in other programs."""

from __future__ import annotations

import pytest

from ldm.errors import LdmError
from ldm.sampling.scheduler_names import ABSENT, OTHER_NAMES, OTHER_SPACINGS, SAMPLERS, scheduler_named, spacing_named
from ldm.sampling.schedulers import SCHEDULERS, SPACINGS


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("DPMSolverMultistepScheduler", ("dpm++2m", None)),  # diffusers
        ("EulerAncestralDiscreteScheduler", ("euler-a", None)),
        ("KDPM2AncestralDiscreteScheduler", ("dpm2-a", None)),
        ("UniPCMultistepScheduler", ("unipc", None)),
        ("DPM++ 2M Karras", ("dpm++2m", "karras")),  # AUTOMATIC1111
        ("DPM++ 2M SDE Exponential", ("dpm++2m-sde", "exponential")),
        ("DPM++ 3M SDE Karras", ("dpm++3m-sde", "karras")),
        ("DPM++ SDE", ("dpm++sde", None)),
        ("Euler a", ("euler-a", None)),
        ("Euler SGM Uniform", ("euler", "trailing")),
        ("DPM2 a Karras", ("dpm2-a", "karras")),
        ("LMS Karras", ("lms", "karras")),
        ("PLMS", ("pndm", None)),
        ("DPM++ 2M Align Your Steps", ("dpm++2m", "ays")),
        ("dpmpp_2m_sde", ("dpm++2m-sde", None)),  # ComfyUI
        ("dpmpp_2m_sde_gpu", ("dpm++2m-sde", None)),
        ("euler_ancestral", ("euler-a", None)),
        ("dpm_2_ancestral", ("dpm2-a", None)),
        ("uni_pc_bh2", ("unipc", None)),
        ("dpmpp_2m_karras", ("dpm++2m", "karras")),
        ("sample_dpmpp_2m", ("dpm++2m", None)),  # k-diffusion
        ("k_euler_a", ("euler-a", None)),  # kohya
        ("k_dpm_2", ("dpm2", None)),
        ("dpmsolver++", ("dpm++2m", None)),
        ("dpmpp_2m_sde_k", ("dpm++2m-sde", "karras")),  # InvokeAI
        ("kdpm_2_a_k", ("dpm2-a", "karras")),
        ("heun_k", ("heun", "karras")),
        ("dpm++2m", ("dpm++2m", None)),
        ("dpm++2m-karras", ("dpm++2m", "karras")),
        ("eulre", ("eulre", None)),
    ],
)
def test_names_of_other_programs(name: str, ours: tuple[str, str | None]) -> None:
    assert scheduler_named(name) == ours
    assert scheduler_named(name.upper() if ours[0] in SCHEDULERS else name) == ours


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPM++ 2S a Karras", "scheduler 'DPM++ 2S a Karras' does not exist here; the nearest: dpm++sde"),
        ("dpmpp_2m_sde_heun", "does not exist here; the nearest: dpm++2m-sde"),
        ("DPMSolverSDEScheduler", "does not exist here; the nearest: dpm++sde"),
        ("karras", "scheduler 'karras' is a spacing of the steps; give spacing=karras"),
        ("sgm_uniform", "give spacing=trailing"),
    ],
)
def test_what_does_not_exist_is_answered(name: str, message: str) -> None:
    with pytest.raises(LdmError) as caught:
        scheduler_named(name)
    assert message in str(caught.value)


def test_spacings_of_other_programs() -> None:
    names = ("Karras", "SGM Uniform", "simple", "normal", "ddim_uniform", "Automatic", "align_your_steps", "wide")
    ours = ["karras", "trailing", "trailing", "linspace", "leading", "default", "ays", "wide"]
    assert [spacing_named(name) for name in names] == ours


def test_the_table_is_whole() -> None:
    """Every scheduler has other names, each class of diffusers is a name, and no name has two meanings."""
    assert OTHER_NAMES.keys() == SCHEDULERS.keys()
    assert OTHER_SPACINGS.keys() == SPACINGS.keys() | {"ays"}
    for ours, names in OTHER_NAMES.items():
        assert all(scheduler_named(name) == (ours, None) for name in (ours, *names))
    for theirs, ours in SAMPLERS.items():
        assert scheduler_named(theirs) == (ours, None)
    for kind in {kind for kind, _ in SCHEDULERS.values()}:
        assert SCHEDULERS[scheduler_named(kind)[0]][0] == kind
    assert set(ABSENT.values()) <= SCHEDULERS.keys()
    for name in ABSENT:
        with pytest.raises(LdmError, match="does not exist here"):
            scheduler_named(name)
