"""A U-Net whose self-attentions of the level with the most tokens see similar tokens as one.

Bolya and Hoffman 2023 (arXiv 2303.17604), token merging: what an attention costs grows with the square of its tokens,
of which many say nearly the same. What the images lose by it has to be looked at: it is for drafts, and for large
images.

B batch, H×W height and width of the map, N = H·W tokens, D targets (a token of each cell of 2×2), S = N - D others,
R of them are merged, C channels
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Attention, Transformer, TransformerBlock
from ldm.models.surgery import replaced
from ldm.models.unet import DownBlock, UNet, UpBlock

MOST = 0.75  # one token of each cell stays


def merging(unet: UNet, part: float) -> UNet:
    """The same U-Net, one of whose levels has a transformer, with `part` (0 to `MOST`) of the tokens merged.

    That is done in the outermost level with a transformer, before each self-attention; after it all have their place
    again. The middle of the U-Net stays as it is.
    """
    level = [depth > 0 for depth in unet.config.depth].index(True)
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    down[level] = _merging(cast("DownBlock", down[level]), part)
    up[-1 - level] = _merging(cast("UpBlock", up[-1 - level]), part)
    return replaced(unet, down_blocks=nn.ModuleList(down), up_blocks=nn.ModuleList(up))


def _merging(block: DownBlock | UpBlock, part: float) -> nn.Module:
    """A level of the U-Net, all of whose transformers merge tokens."""
    transformers = (Mapped(cast("Transformer", transformer), part) for transformer in block.attentions)
    return replaced(block, attentions=nn.ModuleList(transformers))


class Layout:
    """Which tokens of a map are the targets, for the self-attentions of one transformer."""

    def __init__(self) -> None:
        self.targets = 0  # D
        self.order = torch.empty(0, dtype=torch.long)  # (N,) indices of the targets, then of the others

    def fit(self, height: int, width: int, device: torch.device) -> None:
        """A map of that size: the targets lie top left and bottom right in turns, like the fields of a chessboard.

        Images change less by that than with all of them top left. Cells at odd edges have fewer rows or columns.
        """
        row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        odd = (row // 2 + column // 2) % 2
        target_row, target_column = (
            (row // 2 * 2 + odd).clamp(max=height - 1),
            (column // 2 * 2 + odd).clamp(max=width - 1),
        )
        other = (row != target_row) | (column != target_column)
        self.targets = -(-height // 2) * -(-width // 2)
        self.order = other.flatten().int().argsort(stable=True)


class Mapped(nn.Module):
    """Stands in the place of a transformer, and tells its self-attentions where the tokens lie."""

    def __init__(self, transformer: Transformer, part: float) -> None:
        super().__init__()
        self.layout = Layout()
        blocks = cast("list[TransformerBlock]", list(transformer.transformer_blocks))
        blocks = [replaced(block, attn1=Merged(block.attn1, part, self.layout)) for block in blocks]
        self.transformer = replaced(transformer, transformer_blocks=nn.ModuleList(blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.layout.fit(x.shape[2], x.shape[3], x.device)
        return self.transformer(x, text)


class Merged(nn.Module):
    """Stands in the place of a self-attention, which is given fewer tokens."""

    def __init__(self, attention: Attention, part: float, layout: Layout) -> None:
        super().__init__()
        self.attention = attention
        self.part = part
        self.layout = layout

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Tokens `x` (B, N, C), which are the `context` too."""
        fewer, places = merged(x, self.layout, self.part)
        return picked(self.attention(fewer, fewer), places)


def merged(tokens: Tensor, layout: Layout, part: float) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) of a map, `part` of them, rounded down, merged into others: (B, N - R, C); and for each token
    where it is among these: (B, N).

    Each token but the targets has the one that it is most similar to (by the cosine), wherever that lies; the most
    similar pairs are merged, a target and all that goes into it by their mean. An image's tokens depend on no other
    image, and no shape on the numbers.
    """
    targets, others = tokens[:, layout.order].tensor_split([layout.targets], dim=1)  # (B, D, C), (B, S, C)
    count = min(int(part * tokens.shape[1]), others.shape[1])  # R
    similarity, target = (F.normalize(others, dim=-1) @ F.normalize(targets, dim=-1).transpose(1, 2)).max(dim=-1)
    gone, kept = similarity.argsort(dim=1, descending=True, stable=True).tensor_split([count], dim=1)  # (B, R), …
    into = target.gather(1, gone)  # (B, R)

    # sums by a product of matrices, since a GPU's additions to places given by index come in an order that changes; and
    # of shares, since thousands of equal tokens add up to more than fp16 can hold
    numbers = torch.arange(tokens.shape[1] - count, device=tokens.device).expand(len(tokens), -1)  # (B, N - R)
    own, after = numbers.tensor_split([layout.targets], dim=1)
    belongs = (into[:, None, :] == own[:, :, None]).to(tokens.dtype)  # (B, D, R)
    sizes = belongs.sum(dim=-1, keepdim=True) + 1  # (B, D, 1)
    means = torch.baddbmm(targets / sizes, belongs, picked(others, gone) / picked(sizes, into))
    fewer = torch.cat([means, picked(others, kept)], dim=1)

    old = layout.order[torch.cat([own, layout.targets + gone, layout.targets + kept], dim=1)]  # (B, N) in the map
    return fewer, torch.empty_like(old).scatter(1, old, torch.cat([own, into, after], dim=1))


def picked(tokens: Tensor, indices: Tensor) -> Tensor:
    """Of tokens (B, N, C) those with the given indices (B, R): (B, R, C)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
