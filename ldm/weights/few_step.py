"""Models and adapters distilled for few steps, recognised by name, metadata and configuration.

LCM (Luo et al. 2023, arXiv 2310.04378), SDXL Turbo and SD Turbo (Sauer et al. 2023, arXiv 2311.17042), SDXL-Lightning
(Lin et al. 2024, arXiv 2402.13929), TCD (Zheng et al. 2024, arXiv 2402.19159), Hyper-SD (Ren et al. 2024, arXiv
2404.13686). The settings are those of the released models' cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ldm.families import Family, FewStep

_TITLES = ("modelspec.title", "ss_output_name")  # metadata that say what a file is
_NAMELESS = re.compile(r"pytorch-lora-weights|diffusion-pytorch-model|adapter-model|model|unet|lora")
_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".fp16")
EMBEDDED_GUIDANCE = 8.5  # usual scale of a U-Net that reads it


def made_for(path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> FewStep | None:
    """The settings that a file, folder or Hub name was distilled for, by its name and metadata; None for all others.

    A file with a common name (`pytorch_lora_weights.safetensors`) is called as its folder is.
    """
    for name in _names(Path(path), metadata or {}):
        for pattern, settings in _KNOWN:
            found = re.search(pattern, name)
            if found:
                return settings(found[1] if found.lastindex else "", name)
    return None


def few_step_family(family: Family, few: FewStep | None) -> Family:
    """A family with the settings of few steps that its files say or, without, its scheduler and U-Net show."""
    if few is None and family.schedule.scheduler in ("LCMScheduler", "TCDScheduler"):
        few = _lcm("", "") if family.schedule.scheduler == "LCMScheduler" else _tcd("", "")
    if few is None and family.unet.guidance_dim:
        few = _lcm("", "")
    if few is None:
        return family
    if family.unet.guidance_dim:
        few = replace(few, guidance=EMBEDDED_GUIDANCE)
    kind = few.prediction_type or family.schedule.prediction_type
    return replace(family, few_step=few, schedule=replace(family.schedule, prediction_type=kind))


def _names(path: Path, metadata: Mapping[str, str]) -> Iterator[str]:
    """The names of a file or folder in small letters, with hyphens between words."""
    own = path.name
    for ending in _ENDINGS:
        own = own.removesuffix(ending)
    titles = [metadata[title] for title in _TITLES if title in metadata]
    for name in (_plain(own), *map(_plain, titles)):
        if not _NAMELESS.fullmatch(name):
            yield name
        elif len(path.parts) > 1:
            yield from _names(path.parent, {})


def _plain(name: str) -> str:
    return re.sub(r"[\s_.]+", "-", name.lower())


def _lcm(steps: str, name: str) -> FewStep:
    return FewStep("LCM", 4, "lcm")


def _tcd(steps: str, name: str) -> FewStep:
    return FewStep("TCD", 4, "tcd", eta=0.3)


def _turbo(kind: str, name: str) -> FewStep:
    return FewStep("Turbo", 1, "euler" if kind == "sd" else "euler-a", "trailing")


def _lightning(steps: str, name: str) -> FewStep:
    return FewStep("Lightning", int(steps), "euler", "trailing", prediction_type="sample" if "-x0" in name else None)


def _hyper(steps: str, name: str) -> FewStep:
    if steps == "1":
        return FewStep("Hyper-SD", 1, "tcd", eta=1.0)
    return FewStep("Hyper-SD", int(steps), "ddim", "trailing", guidance=5.0 if "-cfg" in name else 1.0)


# a pattern in a plain name, and the settings for its group and the name; the U-Net of Hyper-SD for one step begins at
# timestep 800, and no setting does
_KNOWN: tuple[tuple[str, Callable[[str, str], FewStep]], ...] = (
    (r"^hyper-?sd(?:15|xl)?-(\d{1,2})-?steps?(?!.*unet)", _hyper),
    (r"lightning-(\d{1,2})-?steps?", _lightning),
    (r"^(sd-?xl|sd)-turbo", _turbo),
    (r"(?:^|-)tcd(?:-|$)", _tcd),
    (r"(?:^|-)lcm(?:-|$)", _lcm),
)
