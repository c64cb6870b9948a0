"""What makes pictures quicker on a CPU: layers that read memory less often, and pictures that lie channels last.

Each stands in for the layer that it is made of, with the same parameters under the same names, and gives the same
numbers but for rounding. Where gradients are wanted it does what that layer does.

B batch, C channels, H×W height and width, E time channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.kernels import layers as kernels
from ldm.kernels.compiled import fits, usable
from ldm.models.layers import GEGLU, ResnetBlock, Upsample


def quicken(model: nn.Module) -> None:
    """Put quicker layers in the place of a network's own, if its weights are on the CPU; they stay its weights."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return
    model.to(memory_format=torch.channels_last)
    own: dict[type[nn.Module], type[nn.Module]] = {Upsample: QuickUpsample}
    if weight.dtype == torch.bfloat16 and usable():
        own |= {nn.GroupNorm: QuickNorm, ResnetBlock: QuickResnetBlock, GEGLU: QuickGEGLU}
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))


def _fits(norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernel can do this norm of it."""
    return isinstance(norm, QuickNorm) and fits(x, norm.weight) and x.is_contiguous(memory_format=torch.channels_last)


class QuickNorm(nn.GroupNorm):
    """In one pass for the statistics and one for the result."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.group_norm(self, x) if _fits(self, x) else super().forward(x)


class QuickResnetBlock(ResnetBlock):
    """With group norm and SiLU as one, which takes the time embedding along."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if not _fits(self.norm1, x) or not _fits(self.norm2, x):
            return super().forward(x, time)
        h = self.conv1(kernels.group_norm(self.norm1, x, silu=True))
        offset = None if time is None else self.time_emb_proj(F.silu(time))
        h = self.conv2(kernels.group_norm(self.norm2, h, offset, silu=True))
        return self.conv_shortcut(x) + h


class QuickGEGLU(GEGLU):
    """With GELU and the product as one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if not fits(x):
            value, gate = x.chunk(2, dim=-1)
            return value * F.gelu(gate)
        return kernels.geglu(x)


class QuickUpsample(Upsample):
    """Doubling and convolution as one transposed convolution of 4×4, in which equal pixels are multiplied once: 16
    products in place of 36."""

    made_of: tuple[int, int, torch.dtype] | None = None  # what tells the convolution's weights from others
    doubling: Tensor  # (C, C, 4, 4)

    def _double(self) -> None:
        """Its weights, anew if the convolution's have changed."""
        weight = self.conv.weight
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype)
        if state == self.made_of:
            return
        flipped = weight.detach().float().flip(2, 3)
        total = flipped.new_zeros(*weight.shape[:2], 4, 4)
        for row in (0, 1):
            for column in (0, 1):
                total[:, :, row : row + 3, column : column + 3] += flipped
        self.doubling, self.made_of = total.transpose(0, 1).to(weight.dtype), state

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        doubled = tuple(size) == tuple(2 * side for side in x.shape[2:])
        if torch.is_grad_enabled() or not doubled:
            return super().forward(x, size)
        self._double()
        return F.conv_transpose2d(x, self.doubling, self.conv.bias, stride=2, padding=1)
