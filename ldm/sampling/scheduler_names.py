"""The names of schedulers and spacings in diffusers, AUTOMATIC1111's programs, ComfyUI, InvokeAI and kohya's scripts.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from functools import cache

from ldm.errors import LdmError

SAMPLERS = {  # AUTOMATIC1111's name -> ours
    "DDIM": "ddim", "PLMS": "pndm", "LMS": "lms", "Euler": "euler", "Euler a": "euler-a", "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2-a", "DPM++ 2M": "dpm++2m", "DPM++ 2M SDE": "dpm++2m-sde", "DPM++ 3M SDE": "dpm++3m-sde",
    "DPM++ SDE": "dpm++sde", "UniPC": "unipc", "DEIS": "deis", "LCM": "lcm", "TCD": "tcd",
    "DDPM": "ddpm",
}  # fmt: skip
A1111_NAMES = {ours: theirs for theirs, ours in SAMPLERS.items()}
OTHER_NAMES: dict[str, tuple[str, ...]] = {  # our name -> diffusers' class, then names of ComfyUI, InvokeAI, kohya
    "ddim": ("DDIMScheduler",),
    "ddpm": ("DDPMScheduler",),
    "pndm": ("PNDMScheduler",),
    "lms": ("LMSDiscreteScheduler",),
    "euler": ("EulerDiscreteScheduler",),
    "euler-a": ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
    "heun": ("HeunDiscreteScheduler",),
    "dpm2": ("KDPM2DiscreteScheduler", "dpm_2", "kdpm_2"),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", "dpm_2_a", "kdpm_2_a"),
    "dpm++2m": ("DPMSolverMultistepScheduler", "dpmpp_2m", "dpmsolver++"),
    "dpm++2m-sde": ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    "dpm++3m-sde": ("dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
    "dpm++2s": ("DPMSolverSinglestepScheduler", "dpmpp_2s", "dpmsingle"),
    "dpm++sde": ("dpmpp_sde", "dpmpp_sde_gpu"),
    "unipc": ("UniPCMultistepScheduler", "uni_pc", "uni_pc_bh2"),
    "deis": ("DEISMultistepScheduler",),
    "lcm": ("LCMScheduler",),
    "tcd": ("TCDScheduler",),
}
SPACINGS = {"Karras": "karras", "Exponential": "exponential", "Beta": "beta", "Align Your Steps": "ays"}
OTHER_SPACINGS: dict[str, tuple[str, ...]] = {  # our name -> AUTOMATIC1111's and ComfyUI's; what they are in diffusers
    "default": ("Automatic", "Uniform"),
    "leading": ("ddim_uniform",),
    "linspace": ("Normal",),
    "trailing": ("SGM Uniform", "Simple"),
    "karras": ("Karras",),
    "exponential": ("Exponential",),
    "beta": ("Beta",),
    "ays": ("Align Your Steps",),
}
ABSENT = {  # a sampler that does not exist here -> the nearest
    "DPMSolverSDEScheduler": "dpm++sde", "DPM++ 2S a": "dpm++sde", "dpmpp_2s_ancestral": "dpm++sde",
    "DPM++ 2M SDE Heun": "dpm++2m-sde", "dpmpp_2m_sde_heun": "dpm++2m-sde", "DPM fast": "dpm++2s",
    "DPM adaptive": "dpm++2s", "dpmsolver": "dpm++2m", "dpmpp_3m": "dpm++3m-sde", "Restart": "heun", "heunpp2": "heun",
    "euler_cfg_pp": "euler", "euler_ancestral_cfg_pp": "euler-a", "ipndm": "pndm", "ipndm_v": "pndm",
    "DDIM CFG++": "ddim", "EDMEulerScheduler": "euler", "EDMDPMSolverMultistepScheduler": "dpm++2m",
    "SASolverScheduler": "dpm++2m-sde", "IPNDMScheduler": "pndm", "VQDiffusionScheduler": "ddpm",
    "FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun",
}  # fmt: skip


def plain(name: str) -> str:
    """A name without what programs write differently: case, spaces, hyphens, and ++ as pp."""
    words = re.sub(r"[\s_-]+", "", name.lower()).replace("pp", "++")
    return words.removesuffix("scheduler") or words


@cache
def _schedulers() -> dict[str, str]:
    names = {ours: (ours, *theirs) for ours, theirs in OTHER_NAMES.items()}
    found = {plain(name): ours for ours, own in names.items() for name in own}
    return {plain(theirs): ours for theirs, ours in SAMPLERS.items()} | found


@cache
def _spacings() -> dict[str, str]:
    return {plain(name): ours for ours, theirs in OTHER_SPACINGS.items() for name in (ours, *theirs)}


def other_names(scheduler: str) -> list[str]:
    """The names of a scheduler in other programs."""
    theirs = [name for name, ours in SAMPLERS.items() if ours == scheduler]
    return [name for name in (*theirs, *OTHER_NAMES.get(scheduler, ())) if name.lower() != scheduler]


def spacing_named(name: str) -> str:
    """Our name of a spacing; an unknown name stays as it is."""
    return _spacings().get(plain(name), name)


def scheduler_named(name: str) -> tuple[str, str | None]:
    """Our name of a scheduler, and the spacing in the given name, if there is one; an unknown name stays as it is.

    `Euler a`, `k_euler_a` and `EulerAncestralDiscreteScheduler` are euler-a; `DPM++ 2M Karras`, `dpmpp_2m_karras` and
    InvokeAI's `dpmpp_2m_k` are dpm++2m with the spacing karras.

    Raises:
        LdmError: the name is that of a spacing, or of a sampler that does not exist here.
    """
    whole = plain(name)
    for text, spacing in _split(name):
        key = plain(text)
        for known in (key, key.removeprefix("sample"), key.removeprefix("k")):
            if known in _schedulers():
                return _schedulers()[known], spacing
        near = {plain(absent): near for absent, near in ABSENT.items()}.get(key)
        if near:
            raise LdmError(f"scheduler {name!r} does not exist here; the nearest: {near}")
    if whole in _spacings():
        raise LdmError(f"scheduler {name!r} is a spacing of the steps; give spacing={_spacings()[whole]}")
    return name, None


def _split(name: str) -> list[tuple[str, str | None]]:
    """A name as a whole, and without the spacing at its end."""
    found: list[tuple[str, str | None]] = [(name, None)]
    for spacing, theirs in OTHER_SPACINGS.items():
        for own in (spacing, *theirs):
            ending = re.escape(own.replace("_", " "))
            end = re.search(rf"[\s-]+{ending}$", name.replace("_", " "), re.IGNORECASE)
            if end and spacing != "default":
                found.append((name[: end.start()], spacing))
    if name.lower().endswith("_k"):  # InvokeAI
        found.append((name[:-2], "karras"))
    return found
