"""Token merging (ToMe): the self-attentions of the level with the most tokens compute similar tokens as one.

Bolya and Hoffman 2023 (arXiv 2303.17604). The cost of attention grows with the square of the number of tokens, many of
which are nearly alike. Images change visibly: it is for drafts, and for large images.

B batch, H×W height and width of the map, N = H·W tokens, D targets (one token of each cell of 2×2), S = N - D others,
of which R are merged, C channels
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Attention, Transformer, TransformerBlock
from ldm.models.surgery import replaced
from ldm.models.unet import DownBlock, UNet, UpBlock

MOST = 0.75  # part of the tokens that can be merged: one token of each cell stays


def merge_tokens(unet: UNet, ratio: float) -> UNet:
    """A U-Net whose outermost level with a transformer merges the part `ratio` (0 to `MOST`) of its tokens.

    Tokens are merged before each self-attention, and its result is copied back to all of them. At least one level must
    have a transformer; the middle of the U-Net stays as it is.
    """
    level = [depth > 0 for depth in unet.config.depth].index(True)
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    down[level] = _merging_level(cast("DownBlock", down[level]), ratio)
    up[-1 - level] = _merging_level(cast("UpBlock", up[-1 - level]), ratio)
    return replaced(unet, down_blocks=nn.ModuleList(down), up_blocks=nn.ModuleList(up))


def _merging_level(block: DownBlock | UpBlock, ratio: float) -> nn.Module:
    """A level of the U-Net, all of whose transformers merge tokens."""
    transformers = (MergingTransformer(cast("Transformer", transformer), ratio) for transformer in block.attentions)
    return replaced(block, attentions=nn.ModuleList(transformers))


class MergeTargets:
    """The tokens of a map into which others are merged, for the self-attentions of one transformer."""

    of_one_call: ClassVar = True  # each call fills it anew: calls of several runs can be made together

    def __init__(self) -> None:
        self.count = 0  # D
        self.order = torch.empty(0, dtype=torch.long)  # (N,) indices of the targets, then of the others

    def fit(self, height: int, width: int, device: torch.device) -> None:
        """Choose the targets of a map: top left and bottom right of its cells in turns, like a chessboard's fields.

        This changes images less than targets that are all top left. Cells at odd edges have fewer rows or columns.
        """
        row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        odd = (row // 2 + column // 2) % 2
        target_row, target_column = (
            (row // 2 * 2 + odd).clamp(max=height - 1),
            (column // 2 * 2 + odd).clamp(max=width - 1),
        )
        other = (row != target_row) | (column != target_column)
        self.count = -(-height // 2) * -(-width // 2)
        self.order = other.flatten().int().argsort(stable=True)


class MergingTransformer(nn.Module):
    """A transformer whose self-attentions merge tokens; it chooses the targets for the size of its map."""

    def __init__(self, transformer: Transformer, ratio: float) -> None:
        super().__init__()
        self.targets = MergeTargets()
        blocks = cast("list[TransformerBlock]", list(transformer.transformer_blocks))
        blocks = [replaced(block, attn1=MergingAttention(block.attn1, ratio, self.targets)) for block in blocks]
        self.transformer = replaced(transformer, transformer_blocks=nn.ModuleList(blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.targets.fit(x.shape[2], x.shape[3], x.device)
        return self.transformer(x, text)


class MergingAttention(nn.Module):
    """A self-attention over merged tokens."""

    def __init__(self, attention: Attention, ratio: float, targets: MergeTargets) -> None:
        super().__init__()
        self.attention = attention
        self.ratio = ratio
        self.targets = targets

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Self-attention of tokens `x` (B, N, C), which are the `context` too."""
        fewer, places = merged(x, self.targets, self.ratio)
        return gathered(self.attention(fewer, fewer), places)


def merged(tokens: Tensor, targets: MergeTargets, ratio: float) -> tuple[Tensor, Tensor]:
    """`tokens` (B, N, C) of a map, merged to (B, N - R, C); and for each old token the index of its merged one (B, N).

    The part `ratio` of the tokens, rounded down, is merged: each token but the targets is paired with the target most
    similar to it (by cosine), wherever that lies; of the most similar pairs, a target and all tokens that go into it
    become their mean. An image's tokens depend on no other image, and no shape depends on the numbers.
    """
    target_tokens, others = tokens[:, targets.order].tensor_split([targets.count], dim=1)  # (B, D, C), (B, S, C)
    count = min(int(ratio * tokens.shape[1]), others.shape[1])  # R
    similarity, target = (F.normalize(others, dim=-1) @ F.normalize(target_tokens, dim=-1).transpose(1, 2)).max(dim=-1)
    gone, kept = similarity.argsort(dim=1, descending=True, stable=True).tensor_split([count], dim=1)  # (B, R), …
    into = target.gather(1, gone)  # (B, R)

    # means as a product of matrices: a GPU adds to indexed places in an order that changes from run to run; each token
    # is divided before the sum, since thousands of equal tokens add up to more than fp16 can hold
    numbers = torch.arange(tokens.shape[1] - count, device=tokens.device).expand(len(tokens), -1)  # (B, N - R)
    own, after = numbers.tensor_split([targets.count], dim=1)
    belongs = (into[:, None, :] == own[:, :, None]).to(tokens.dtype)  # (B, D, R)
    sizes = belongs.sum(dim=-1, keepdim=True) + 1  # (B, D, 1)
    means = torch.baddbmm(target_tokens / sizes, belongs, gathered(others, gone) / gathered(sizes, into))
    fewer = torch.cat([means, gathered(others, kept)], dim=1)

    old = targets.order[torch.cat([own, targets.count + gone, targets.count + kept], dim=1)]  # (B, N) in the map
    return fewer, torch.empty_like(old).scatter(1, old, torch.cat([own, into, after], dim=1))


def gathered(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens (B, R, C) of (B, N, C) at the given indices (B, R)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
