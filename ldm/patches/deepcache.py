"""A U-Net whose inner levels run in one call of several; in the others their last result counts.

Ma et al. 2023 (arXiv 2312.00858), DeepCache: from step to step little changes in there, and most of the work is done
there. What the images lose by it has to be looked at: it is for drafts, and for schedules of many steps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm.models.surgery import replaced
from ldm.models.unet import UNet


def reusing(unet: UNet, every: int) -> UNet:
    """The same U-Net, of two levels or more, for one run: those but the outermost run in one call of `every` only."""
    memory = Memory(every)
    first, *inner = unet.down_blocks
    *back, last = unet.up_blocks
    return replaced(
        unet,
        down_blocks=nn.ModuleList([first, First(inner[0], memory), *(Inner(block, memory) for block in inner[1:])]),
        mid_block=Skipped(unet.mid_block, memory),
        up_blocks=nn.ModuleList([*(Skipped(block, memory) for block in back[:-1]), Last(back[-1], memory), last]),
    )


class Memory:
    """What the inner levels gave last, and whether they run in this call."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.calls = 0
        self.running = True
        self.result: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """A call; with another batch than before nothing can be reused."""
        fits = self.result is not None and len(self.result) == len(x)
        self.calls = self.calls + 1 if fits else 0
        self.running = self.calls % self.every == 0


class Part(nn.Module):
    """Stands in the place of a block of the U-Net."""

    def __init__(self, block: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.block = block
        self.memory = memory


class Inner(Part):
    """A level on the way down."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.block(x, time, text) if self.memory.running else (x, [])


class First(Inner):
    """The first of them."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.memory.begin(x)
        return super().forward(x, time, text)


class Skipped(Part):
    """The middle, or a level on the way up."""

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.block(x, *inputs) if self.memory.running else x


class Last(Part):
    """The last inner level on the way up, whose result is kept."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        if self.memory.running:
            self.memory.result = self.block(x, time, text, skips)
        else:
            skips.pop()  # what the outermost level gave the next one
        assert self.memory.result is not None
        return self.memory.result
