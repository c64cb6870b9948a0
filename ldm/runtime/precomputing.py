"""Outputs of a U-Net's layers that do not depend on the latents, computed before the steps.

Keys and values of the text, and the embedding of pooled text and time ids, are the same at every step; what the time
adds in each block is computed for all timesteps of a run at once. A layer's class says which of its parts depend on
what (`precomputable`). These parts are replaced by their outputs in a copy that shares all else with the U-Net, so that
no forward pass changes.

B images, M text tokens, C channels, E time embedding channels, K timesteps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.surgery import rebuilt, replaced
from ldm.models.unet import Conditioning, UNet

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


def precomputed_outputs(module: nn.Module) -> list[PrecomputedOutput]:
    """All layers in a module that are replaced by their outputs."""
    return [layer for layer in module.modules() if isinstance(layer, PrecomputedOutput)]


def parts_reading(module: nn.Module, source: str) -> dict[str, nn.Module]:
    """The parts of a module that compute their output from `source` alone: "text", "conditioning" or "time".

    Parts without weights are left out: they are precomputed already, or cost next to nothing.
    """
    sources: Mapping[str, str] = getattr(type(module), "precomputable", {})
    return {
        name: part
        for name, part in module.named_children()
        if sources.get(name) == source and next(part.parameters(), None) is not None
    }


def reads_conditioning(unet: nn.Module) -> bool:
    """Whether any layer still computes something from the conditioning alone."""
    return any(parts_reading(module, source) for module in unet.modules() for source in ("text", "conditioning"))


def precomputed(unet: UNet, cond: Conditioning) -> UNet:
    """A copy of the U-Net for calls with this conditioning: layers that read nothing else become their outputs."""

    def outputs(module: nn.Module) -> dict[str, nn.Module]:
        return {
            name: PrecomputedOutput(part(value))
            for source, value in (("text", cond.text), ("conditioning", cond))
            for name, part in parts_reading(module, source).items()
        }

    return rebuilt(unet, outputs)


class TimeTable:
    """A U-Net whose layers that read the time alone are replaced by rows of a table, one for each timestep of a run.

    `unet` is the network to call, after `set` has chosen the timestep.
    """

    def __init__(self, unet: UNet, cond: Conditioning, times: Sequence[float]) -> None:
        """`unet` is `precomputed` for the conditioning; `times` are the timesteps of a run, in their order."""
        self.source, self.cond, self.times = unet, cond, list(dict.fromkeys(times))
        self.embedding = TimestepOutput(torch.empty(0))
        self.projections: list[tuple[nn.Module, TimestepOutput]] = []  # each block's layer, and its replacement
        self.unet = replaced(rebuilt(unet, self._replacements), time_embedding=self.embedding)
        self.results: list[Tensor] = []  # the embedding (K, B, E), then each projection (K, B, C)
        self.rows: dict[float, int] = {}  # row of `results` for each timestep

    def _replacements(self, module: nn.Module) -> dict[str, nn.Module]:
        found = {name: (part, TimestepOutput(torch.empty(0))) for name, part in parts_reading(module, "time").items()}
        self.projections += found.values()
        return {name: output for name, (_, output) in found.items()}

    def set(self, time: float) -> None:
        """Choose the timestep of the next calls."""
        if time not in self.rows:
            self._compute(time)
        layers = [self.embedding, *(output for _, output in self.projections)]
        for layer, results in zip(layers, self.results, strict=True):
            layer.output = results[self.rows[time]]

    def _compute(self, time: float) -> None:
        """Fill the table for a timestep and those after it, as `UNet.embed_time` does for one."""
        begin = self.times.index(time) if time in self.times else len(self.times)
        ahead = self.times[begin : begin + AHEAD] or [time]
        text = self.cond.text
        embedded = self.source.time_embedding(torch.tensor(ahead, device=text.device), text.dtype)[:, None]  # (K, 1, E)
        activated = F.silu(embedded + self.source.add_embedding(self.cond))  # (K, 1 or B, E)
        made = [embedded, *(part(activated) for part, _ in self.projections)]
        self.results = [result.expand(-1, len(text), -1).contiguous() for result in made]
        self.rows = {value: row for row, value in enumerate(ahead)}
