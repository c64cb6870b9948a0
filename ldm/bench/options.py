"""What `ldm bench` measures: the options of the command, the sides by name, and the call that all of them make."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.weights.builtin import DEFAULT

PROMPT = "a photograph of an astronaut riding a horse"
OURS = "ldm"
RIVALS = {
    "diffusers": "diffusers as it comes",
    "channels-last": "diffusers at its best without compiling",
    "compiled": "diffusers as its documentation says: channels last, fused projections, torch.compile",
    "compiled-blocks": "the same, with the blocks of the U-Net compiled each for itself",
    "openvino": "diffusers' pipeline with its networks run by OpenVINO, on the CPU",
    "plain": "ours, with plain layers and PyTorch's attention",
}


@dataclass(frozen=True)
class BenchOptions:
    """What the command was asked for."""

    source: str = DEFAULT
    size: str | None = None
    batch: int = 1
    steps: int = 4
    rounds: int = 5
    dtype: str | None = None
    rival_dtype: str | None = None
    device: str | None = None
    against: str = "diffusers"
    compile: bool = False  # of ours alone
    quantize: str | None = None  # likewise
    cold: bool = False
    out: str | None = None


@dataclass(frozen=True)
class Call:
    """What all sides make."""

    width: int
    height: int
    batch: int
    guidance: float
