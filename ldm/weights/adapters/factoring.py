"""Low-rank factors by singular values: out of the difference of two models, and of an adapter at a smaller rank.

O output channels, I input channels, kh×kw kernel of a convolution, R rank
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.patches.low_rank import Change, Decomposed, Difference, LowRank
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.names import written
from ldm.weights.components import Components

Changes = dict[str, dict[str, Change]]  # component -> parameter -> change
_TABLE = re.compile(r"\b(token|position)_embedding\b")  # of a text encoder: its rows are no linear layer's
OnLayer = Callable[[], None]  # called after each parameter that was compared


@dataclass(frozen=True)
class Reduction:
    """The bounds of a reduction: a largest rank, a least share of the energy, or both."""

    rank: int | None = None  # at most this rank
    energy: float | None = None  # the smallest rank with this share of the sum of squares, above 0 to 1


@dataclass
class Kept:
    """The sums of squares of all changes, and of their factors."""

    total: float = 0.0
    kept: float = 0.0
    largest: int = 0  # rank

    @property
    def share(self) -> float:
        """The share of the energy that the factors keep, 0 to 1."""
        return self.kept / self.total if self.total else 1.0


def extracted(
    base: Components, tuned: Components, reduction: Reduction, on_layer: OnLayer
) -> tuple[Changes, Kept, int]:
    """The difference of two models as LoRA; what is kept of it, and how many other parameters differ and are left out.

    Linear layers and convolutions that have names in adapters' formats are factored; biases, norms and embeddings are
    not.

    Raises:
        LdmError: the models differ in shape, or not at all.
    """
    modules, others = base.modules(), tuned.modules()
    shapes, theirs = _shapes(base), _shapes(tuned)
    if shapes != theirs:
        place = min(set(shapes.items()) ^ set(theirs.items()))[0]
        raise LdmError(
            f"the models differ in shape, first at {'.'.join(place)} ({shapes.get(place, 'missing')} and "
            f"{theirs.get(place, 'missing')}); name two models of one family"
        )
    named = {(place.component, f"{place.layer}.weight") for place in written(base, "diffusers")}
    changes: Changes = {}
    kept, left_out = Kept(), 0
    for component, name in shapes:
        before, after = (some[component].get_parameter(name).detach() for some in (modules, others))
        if not torch.equal(before, after):
            if before.ndim < 2 or (component, name) not in named or _TABLE.search(name):
                left_out += 1
            else:
                change = factored(after.float() - before.float(), reduction, kept)
                changes.setdefault(component, {})[name] = change
        on_layer()
    if not changes:
        raise LdmError("the two models have the same weights in all layers that an adapter can change")
    return changes, kept, left_out


def _shapes(model: Components) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (component, name): tuple(parameter.shape)
        for component, network in model.modules().items()
        for name, parameter in network.named_parameters()
    }


def resized(adapter: Adapter, model: Components, reduction: Reduction) -> tuple[Adapter, Kept]:
    """The adapter with changes of a smaller rank, all of them LoRA; differences of biases and norms stay as they are.

    Of the model's weights the shapes alone are read, so that it may be on the meta device. DoRA keeps its norms.
    """
    kept = Kept()
    # the weights' shapes, without memory of their own
    weights = {place: torch.zeros(()).expand(shape) for place, shape in _shapes(model).items()}

    def smaller(change: Change, weight: Tensor) -> Change:
        if isinstance(change, Decomposed):
            return replace(change, change=smaller(change.change, weight))
        if weight.ndim < 2:
            return change
        if isinstance(change, LowRank) and change.core is None:
            return _refactored(change, reduction, kept)
        return factored(change.delta(weight), reduction, kept, _dtype(change))

    changes = {
        component: {name: smaller(change, weights[component, name]) for name, change in own.items()}
        for component, own in adapter.changes.items()
    }
    return replace(adapter, changes=changes), kept


def factored(delta: Tensor, reduction: Reduction, kept: Kept, dtype: torch.dtype = torch.float32) -> LowRank:
    """The best low-rank factors of a change (O, I) or (O, I, kh, kw); adds to `kept`."""
    left, values, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return _cut(left, values, right, delta.shape, reduction, kept, dtype)


def _refactored(change: LowRank, reduction: Reduction, kept: Kept) -> LowRank:
    """The best factors of factors, whose product is never made."""
    up, down = change.scale * change.up.flatten(1).float(), change.down.flatten(1).float()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    shape = torch.Size((len(up), *change.down.shape[1:]))
    return _cut(q_up @ left, values, right @ q_down.T, shape, reduction, kept, change.up.dtype)


def _cut(
    left: Tensor, values: Tensor, right: Tensor, shape: torch.Size, reduction: Reduction, kept: Kept, dtype: torch.dtype
) -> LowRank:
    """Singular vectors (O, K), (K, I·kh·kw) and values (K,), as many as wanted, as a LoRA whose alpha is its rank."""
    energy = values.double().square()
    rank = len(values) if reduction.rank is None else min(reduction.rank, len(values))
    if reduction.energy is not None and energy.sum() > 0:
        enough = int((energy.cumsum(0) / energy.sum() < reduction.energy).sum()) + 1
        rank = min(rank, enough)
    kept.total += float(energy.sum())
    kept.kept += float(energy[:rank].sum())
    kept.largest = max(kept.largest, rank)
    root = values[:rank].sqrt()
    up, down = (left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype)
    return LowRank(up.reshape(len(up), rank, *(1 for _ in shape[2:])), down.reshape(rank, *shape[1:]))


def _dtype(change: Change) -> torch.dtype:
    """The dtype that a change is stored in."""
    if isinstance(change, Difference):
        return change.value.dtype
    first = getattr(change, "first", getattr(change, "up", None))
    stored = getattr(first, "a", first)
    return stored.dtype if isinstance(stored, Tensor) else torch.float32


def check_reduction(rank: int | None, energy: float | None) -> Reduction:
    """The reduction that these options ask for.

    Raises:
        LdmError: neither or a meaningless one is given.
    """
    if rank is None and energy is None:
        raise LdmError("name a rank (--rank 16), a share of the energy (--energy 0.95), or both")
    if rank is not None and not 1 <= rank <= 4096:
        raise LdmError(f"--rank {rank}: a whole number from 1 to 4096 is needed")
    if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
        raise LdmError(f"--energy {energy}: a number above 0, at most 1, is needed")
    return Reduction(rank, energy)
