"""Adapters merged into a copy of a network, whatever has been done to the network for its speed or place.

The network stays as it is, and the copy shares every weight that no adapter changes. So an adapter is taken out by
forgetting the copy, exactly, and calls with other adapters do not see it. Quantised weights cannot be changed: their
layers get a branch beside them.

O output channels, I input channels, R sum of the ranks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.surgery import exchanged, reweighted
from ldm.patches.low_rank import Change, LowRank, add, exact
from ldm.runtime.graphs import record_anew
from ldm.runtime.offload import stored, with_stored

M = TypeVar("M", bound=nn.Module)
Weighted = Sequence[tuple[float, Change]]  # the changes of one parameter by several adapters, with their weights


@torch.inference_mode(False)
@torch.no_grad()
def merged(network: M, changes: Mapping[str, Weighted]) -> M:
    """A copy of a network with changed weights; it shares all others, and the network stays as it is.

    `changes` holds, for names of parameters, each adapter's weight and change. Changes of the same weight add; sums are
    in float32, rounded once to the weight's dtype. A U-Net that records its steps does so anew for the copy.
    """
    layers: dict[str, dict[str, Weighted]] = {}
    for name, own in changes.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = own
    made = {name: _changed(network.get_submodule(name), own) for name, own in layers.items()}
    return record_anew(exchanged(network, made)) if made else network


def _changed(layer: nn.Module, changes: Mapping[str, Weighted]) -> nn.Module:
    """A copy of a layer with changed parameters."""
    offloaded = stored(layer)
    if offloaded is not None:
        return with_stored(layer, {name: _sum(offloaded[name], own) for name, own in changes.items()})
    quantised = {name for name in changes if type(getattr(layer, name)) is not nn.Parameter}
    plain = {name: _parameter(getattr(layer, name), own) for name, own in changes.items() if name not in quantised}
    other = reweighted(layer, plain)
    for name in quantised:
        other = Branched(other, branch(getattr(layer, name), changes[name]))
    return other


def _parameter(weight: nn.Parameter, changes: Weighted) -> nn.Parameter:
    return nn.Parameter(_sum(weight.detach(), changes), requires_grad=weight.requires_grad)


def _sum(weight: Tensor, changes: Weighted) -> Tensor:
    """A weight plus its changes, in its dtype."""
    total = weight.to(torch.float32, copy=True)
    for amount, change in changes:
        add(change, amount, weight, total)
    return total.to(weight.dtype)


# --- beside quantised weights -----------------------------------------------------------------------------------------


class Branched(nn.Module):
    """A linear layer plus a product beside it."""

    def __init__(self, layer: nn.Module, factors: Sequence[Tensor]) -> None:
        """`factors` are multiplied with the input one after the other: (O, I) alone, or (R, I) and (O, R)."""
        super().__init__()
        self.layer = layer
        self.factors = nn.ParameterList(nn.Parameter(factor, requires_grad=False) for factor in factors)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (…, I) to (…, O)."""
        y = x
        for factor in self.factors:
            y = F.linear(y, factor)
        return self.layer(x) + y


def branch(weight: Tensor, changes: Weighted) -> list[Tensor]:
    """The changes of a quantised weight (O, I), in the dtype that it computes in, as factors of a `Branched`.

    Low-rank changes stay so, one beside the other; with others among them all are one matrix (O, I).
    """
    low = [(amount * c.scale, c) for amount, c in changes if isinstance(c, LowRank) and c.core is None]
    if len(low) < len(changes):
        base = weight.dequantize()
        total = torch.zeros_like(base, dtype=torch.float32)
        for amount, change in changes:
            add(change, amount, base, total)
        return [total.to(base.dtype)]
    downs = [exact(lora.down.flatten(1), weight.device) for _, lora in low]
    ups = [amount * exact(lora.up.flatten(1), weight.device) for amount, lora in low]
    return [torch.cat(downs).to(weight.dtype), torch.cat(ups, dim=1).to(weight.dtype)]
