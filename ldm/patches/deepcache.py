"""DeepCache: the inner levels of a U-Net run in one call of several; the other calls reuse their last result.

Ma et al. 2023 (arXiv 2312.00858). From step to step the inner levels' result changes little, and most of the work is
done there. Images change visibly: it is for drafts, and for schedules of many steps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm.models.surgery import replaced
from ldm.models.unet import UNet


def reuse_inner_levels(unet: UNet, every: int) -> UNet:
    """A U-Net for one run whose inner levels, all but the outermost, run in one call of `every`."""
    cache = InnerCache(every)
    outermost, *down = unet.down_blocks
    *up, last = unet.up_blocks
    first_down = FirstInnerDownLevel(down[0], cache)
    return replaced(
        unet,
        down_blocks=nn.ModuleList([outermost, first_down, *(InnerDownLevel(block, cache) for block in down[1:])]),
        mid_block=InnerUpLevel(unet.mid_block, cache),
        up_blocks=nn.ModuleList(
            [*(InnerUpLevel(block, cache) for block in up[:-1]), LastInnerUpLevel(up[-1], cache), last]
        ),
    )


class InnerCache:
    """The last result of the inner levels, and whether they run in the present call."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.calls = 0
        self.running = True
        self.result: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """Begin a call; a batch of another size cannot reuse the last result, so the inner levels run."""
        fits = self.result is not None and len(self.result) == len(x)
        self.calls = self.calls + 1 if fits else 0
        self.running = self.calls % self.every == 0


class InnerLevel(nn.Module):
    """A block of the U-Net that runs only when the cache says so."""

    def __init__(self, block: nn.Module, cache: InnerCache) -> None:
        super().__init__()
        self.block = block
        self.cache = cache


class InnerDownLevel(InnerLevel):
    """An inner level on the way down; it gives no skips when it does not run."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.block(x, time, text) if self.cache.running else (x, [])


class FirstInnerDownLevel(InnerDownLevel):
    """The first inner level on the way down, where the cache learns of a new call."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.cache.begin(x)
        return super().forward(x, time, text)


class InnerUpLevel(InnerLevel):
    """The middle, or an inner level on the way up."""

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.block(x, *inputs) if self.cache.running else x


class LastInnerUpLevel(InnerLevel):
    """The last inner level on the way up, whose result is kept for the calls in which it does not run."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        if self.cache.running:
            self.cache.result = self.block(x, time, text, skips)
        else:
            skips.pop()  # the outermost level's skip for the inner ones, which this level would pop
        assert self.cache.result is not None
        return self.cache.result
