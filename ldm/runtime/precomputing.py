"""Outputs of a U-Net's layers that do not depend on the latents, computed before the steps.

Keys and values of the text, and the embedding of pooled text and time ids, are the same at every step; what the time
adds in each block is computed for all timesteps of a run at once. A layer says which of its parts depend on what
(`precomputable`: name of a part -> "text", "conditioning", "time", or the name of a patch's input in
`Conditioning.more`). These parts are replaced by their outputs in a copy that shares all else with the U-Net, so that
no forward pass changes. A patch that needs an input as it is holds a `RunInput`.

B images, M text tokens, C channels, E time embedding channels, K timesteps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.surgery import rebuilt, replaced
from ldm.models.unet import Conditioning, UNet, UNetHalf

H = TypeVar("H", bound=UNetHalf)
AHEAD = 64  # timesteps whose outputs are in memory at a time


class PrecomputedOutput(nn.Module):
    """A layer replaced by its precomputed output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any) -> Tensor:
        return self.output


class TimestepOutput(PrecomputedOutput):
    """A layer replaced by its output at one timestep, which a `TimeTable` sets."""


class RunInput(nn.Module):
    """The place of a patch's input in `Conditioning.more`, which `precomputed` replaces by the input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self) -> Tensor:
        raise RuntimeError(f"the input {self.name} is not known before the network is `precomputed`")


def precomputed_outputs(module: nn.Module) -> list[PrecomputedOutput]:
    """All layers in a module that are replaced by their outputs."""
    return [layer for layer in module.modules() if isinstance(layer, PrecomputedOutput)]


def precomputable_parts(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The parts of a module that compute their output from one source alone, with the name of the source.

    Parts without weights are left out: they are precomputed already, or cost next to nothing.
    """
    sources: Mapping[str, str] = getattr(module, "precomputable", {})
    return {
        name: (part, sources[name])
        for name, part in module.named_children()
        if name in sources and next(part.parameters(), None) is not None
    }


def reads_conditioning(unet: nn.Module) -> bool:
    """Whether any layer still computes something from the conditioning alone."""
    return any(
        isinstance(module, RunInput) or any(source != "time" for _, source in precomputable_parts(module).values())
        for module in unet.modules()
    )


def precomputed(unet: UNet, cond: Conditioning) -> UNet:
    """A copy of the U-Net for calls with this conditioning: layers that read nothing else become their outputs."""

    def outputs(module: nn.Module) -> dict[str, nn.Module]:
        inputs = {name: part for name, part in module.named_children() if isinstance(part, RunInput)}
        parts = {name: found for name, found in precomputable_parts(module).items() if found[1] != "time"}
        return {
            **{name: PrecomputedOutput(cond.more[part.name]) for name, part in inputs.items()},
            **{name: PrecomputedOutput(part(known[source])) for name, (part, source) in parts.items()},
        }

    known = {**cond.more, "text": cond.text, "conditioning": cond}
    return rebuilt(unet, outputs)


class TimeTable:
    """A U-Net whose layers that read the time alone are replaced by rows of a table, one for each timestep of a run.

    `unet` is the network to call, after `set` has chosen the timestep. Networks within it that embed the time on their
    own, such as a ControlNet, are treated like it.
    """

    def __init__(self, unet: UNet, cond: Conditioning, times: Sequence[float]) -> None:
        """`unet` is `precomputed` for the conditioning; `times` are the timesteps of a run, in their order."""
        self.cond, self.times = cond, list(dict.fromkeys(times))
        self.sources: list[tuple[UNetHalf, list[nn.Module]]] = []  # each network, and its blocks' layers
        self.outputs: list[TimestepOutput] = []  # of each network: the embedding's place, then those of the layers
        self.unet = self._timed(unet)
        self.results: list[Tensor] = []  # for each output (K, B, E) or (K, B, C)
        self.rows: dict[float, int] = {}  # row of `results` for each timestep

    def _timed(self, network: H) -> H:
        """A copy of a network that reads the table."""
        embedding, projections, outputs = TimestepOutput(torch.empty(0)), [], []

        def replacements(module: nn.Module) -> dict[str, nn.Module]:
            found: dict[str, nn.Module] = {}
            for name, (part, source) in precomputable_parts(module).items():
                if source == "time":
                    found[name] = output = TimestepOutput(torch.empty(0))
                    projections.append(part)
                    outputs.append(output)
            return found | {
                name: self._timed(part) for name, part in module.named_children() if isinstance(part, UNetHalf)
            }

        timed = replaced(rebuilt(network, replacements), time_embedding=embedding)
        self.sources.append((network, projections))
        self.outputs += [embedding, *outputs]
        return timed

    def set(self, time: float) -> None:
        """Choose the timestep of the next calls."""
        if time not in self.rows:
            self._compute(time)
        for layer, results in zip(self.outputs, self.results, strict=True):
            layer.output = results[self.rows[time]]

    def _compute(self, time: float) -> None:
        """Fill the table for a timestep and those after it, as `UNet.embed_time` does for one."""
        begin = self.times.index(time) if time in self.times else len(self.times)
        ahead = self.times[begin : begin + AHEAD] or [time]
        text, made = self.cond.text, []
        for network, projections in self.sources:
            embedded = network.time_embedding(torch.tensor(ahead, device=text.device), text.dtype)[:, None]  # (K, 1, E)
            activated = F.silu(embedded + network.add_embedding(self.cond))  # (K, 1 or B, E)
            made += [embedded, *(part(activated) for part in projections)]
        self.results = [result.expand(-1, len(text), -1).contiguous() for result in made]
        self.rows = {value: row for row, value in enumerate(ahead)}
