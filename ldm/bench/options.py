"""The options of `ldm bench`, the sides by name, and the call that all sides make."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.weights.builtin import DEFAULT

PROMPT = "a photograph of an astronaut riding a horse"
OURS = "ldm"
RIVALS = {
    "diffusers": "diffusers with its default settings",
    "channels-last": "diffusers with channels last, its fastest setting without compilation",
    "compiled": "diffusers with channels last, fused projections and torch.compile, as in its documentation",
    "compiled-blocks": "like compiled, but each block of the U-Net is compiled separately",
    "openvino": "diffusers' pipeline with its networks run by OpenVINO, on the CPU",
    "plain": "ours, with plain layers and PyTorch's attention",
}


@dataclass(frozen=True)
class BenchOptions:
    """The command's options."""

    source: str = DEFAULT
    size: str | None = None
    batch: int = 1
    steps: int = 4
    rounds: int = 5
    dtype: str | None = None
    rival_dtype: str | None = None
    device: str | None = None
    against: str = "diffusers"
    compile: bool = False  # only for our side
    quantize: str | None = None  # only for our side
    cold: bool = False
    out: str | None = None
    compare: str | None = None  # a file that `out` was


@dataclass(frozen=True)
class Call:
    """The size, batch and guidance scale of the images that all sides make."""

    width: int
    height: int
    batch: int
    guidance: float
