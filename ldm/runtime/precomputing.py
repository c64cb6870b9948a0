"""A U-Net for one denoiser: what does not depend on the latents is computed before they come.

Keys and values of the text are products of the same numbers at every step, as is what pooled text and size ids become;
and what every block adds for the time is known for all timesteps of a run. The layers that make them are replaced in a
copy, which shares all else with the U-Net: no forward pass knows of it.

B images, M text tokens, C channels, E time embedding channels, K timesteps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import ResnetBlock, TransformerBlock
from ldm.models.surgery import rebuilt, replaced
from ldm.models.unet import Conditioning, SizeEmbedding, UNet

M = TypeVar("M", bound=nn.Module)
AHEAD = 64  # timesteps for which results lie in memory


class Given(nn.Module):
    """In the place of a layer whose result is known: that."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_: Any) -> Tensor:
        return self.result


class GivenTime(Given):
    """Likewise, at one timestep: a `TimeTable` sets it to others."""


def known(module: nn.Module) -> list[Given]:
    """All layers of a module whose results are known."""
    return [layer for layer in module.modules() if isinstance(layer, Given)]


def prepared(unet: UNet, cond: Conditioning) -> UNet:
    """The same U-Net for calls with this conditioning alone, which differ in latents and time."""
    size = unet.add_embedding
    given = {"add_embedding": Given(size(cond))} if isinstance(size, SizeEmbedding) else {}

    def knowing(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, TransformerBlock):
            return None
        cross = module.attn2
        both = {name: Given(getattr(cross, name)(cond.text)) for name in ("to_k", "to_v")}
        return replaced(module, attn2=replaced(cross, **both))

    return replaced(rebuilt(unet, knowing), **given)


class TimeTable:
    """A U-Net that knows what becomes of the time, and is told it before each call."""

    def __init__(self, unet: UNet, cond: Conditioning, times: Sequence[float]) -> None:
        """`unet` is prepared for the conditioning; `times` are the timesteps of a run, in their order."""
        self.makers: list[tuple[nn.Module, GivenTime]] = []

        def telling(module: nn.Module) -> nn.Module | None:
            if not isinstance(module, ResnetBlock):
                return None
            return replaced(module, time_emb_proj=self._given(module.time_emb_proj))

        self.source, self.cond, self.times = unet, cond, list(dict.fromkeys(times))
        self.embedding = GivenTime(torch.empty(0))
        self.unet = replaced(rebuilt(unet, telling), time_embedding=self.embedding)
        self.results: list[Tensor] = []  # (K, B, E), then for each block (K, B, C)
        self.rows: dict[float, int] = {}  # of them

    def _given(self, maker: nn.Module) -> GivenTime:
        given = GivenTime(torch.empty(0))
        self.makers.append((maker, given))
        return given

    def set(self, time: float) -> None:
        """Let the next calls be at that timestep."""
        if time not in self.rows:
            self._compute(time)
        layers = [self.embedding, *(given for _, given in self.makers)]
        for layer, results in zip(layers, self.results, strict=True):
            layer.result = results[self.rows[time]]

    def _compute(self, time: float) -> None:
        """By the U-Net's own layers, for a timestep and those after it."""
        begin = self.times.index(time) if time in self.times else len(self.times)
        ahead = self.times[begin : begin + AHEAD] or [time]
        text = self.cond.text
        embedded = self.source.time_embedding(torch.tensor(ahead, device=text.device), text.dtype)[:, None]  # (K, 1, E)
        activated = F.silu(embedded + self.source.add_embedding(self.cond))  # (K, 1 or B, E)
        made = [embedded, *(maker(activated) for maker, _ in self.makers)]
        self.results = [result.expand(-1, len(text), -1).contiguous() for result in made]
        self.rows = {value: row for row, value in enumerate(ahead)}
