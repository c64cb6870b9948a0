"""Weights in the order in which a kernel reads them, in place of the order in which they are defined.

A kernel's order is made once from a layer's weight. If it can be turned back to the bit, the weight itself is freed
while nobody holds it, so that weights are in memory once: whoever reads `layer.weight`, directly or as one of the
network's parameters, gets it made anew. A weight that somebody holds, or that is mapped from a file, stays, and when
it changes the kernel's order is made again; the pages of a file are no longer in memory until somebody reads them.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from functools import cache, partial
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ldm.runtime.kernels.compiled import recording
from ldm.runtime.kernels.memory import drop_pages, give_back

LARGE = 2**16  # bytes of a weight that it pays to free
ONE_ORDER = 2**22  # bytes of a weight that is kept in one order only; smaller ones may be in several
PIECE = 2**27  # bytes of freed weights after which memory is given back to the system
AT_A_TIME = 4  # weights made anew that are freed, if nobody holds them any longer, when another one is made
Layer = nn.Conv2d | nn.Linear


class Order:
    """An order of weights: how it is made from them, and how it is turned back, if that is possible."""

    def __init__(
        self, make: Callable[[Tensor, Any, list[int]], Tensor], undo: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.make = make  # from weights, their layer, and the shape of its input
        self.undo = undo

    def of(self, layer: Layer, x: Tensor) -> Tensor:
        """A layer's weights in this order, made for the shape of `x`; they serve inputs of other shapes too."""
        known = dict.get(layer._parameters, "weight")
        found = known.current(self) if type(known) is Reordered else None
        del known  # it may be the weight itself, which is not freed while it is held
        if found is None:
            found = _reordered(layer, self, list(x.shape))
        if recording.weights is not None:
            recording.weights.append(_unchanged(layer, self))
        return found


class Reordered:
    """A weight in other orders, and the weight itself while somebody may hold it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight: nn.Parameter | None = weight
        self.dtype, self.requires_grad = weight.dtype, weight.requires_grad
        self._note(weight)
        self.lent = False  # whether others have held the weight since its orders were made
        self.orders: dict[Order, Tensor] = {}
        self.back: Callable[[], Tensor] | None = None  # makes the weight anew; None: it cannot be

    def current(self, order: Order) -> Tensor | None:
        """The weight in an order, if it is there and the weight has not changed since."""
        if self.changed() or (not self.free() and self.changed()):
            return None
        return self.orders.get(order)

    def changed(self) -> bool:
        """Whether the weight has changed since its orders were made."""
        weight = self.weight
        return weight is not None and self.state != _state(weight)

    def _note(self, weight: Tensor) -> None:
        """Note the state that orders are made from."""
        self.state: tuple[Any, ...] = _state(weight)
        self.memory = StorageWeakRef(weight.untyped_storage())  # whose identity is not another's meanwhile

    def read(self) -> nn.Parameter:
        """The weight, made anew if it is free."""
        with _LOCK:
            if self.weight is None:
                for _ in range(min(AT_A_TIME, len(_MADE_ANEW))):
                    other = _MADE_ANEW.popleft()()
                    if other is not None and not other.free():
                        _MADE_ANEW.append(ref(other))
                self._keep(self._made_anew())
                _MADE_ANEW.append(ref(self))
            return cast("nn.Parameter", self.weight)

    def save_memory(self, weight: nn.Parameter, order: Order, undo: Callable[[Tensor], Tensor]) -> None:
        """Let the weight be freed, as it can be made anew from an order; one mapped from a file leaves its pages.

        A large one is then in no other order that can be turned back, such as that for images of another size.
        """
        if weight.nbytes >= ONE_ORDER:
            for other in [one for one in self.orders if one.undo is not None and one is not order]:
                del self.orders[other]
                self.back = None
        plain = type(weight) is nn.Parameter and weight.is_contiguous()
        if not plain or weight.untyped_storage().nbytes() > weight.nbytes:
            drop_pages(weight)
        elif self.back is None and _same(undo(self.orders[order]), weight):
            self.back = partial(undo, self.orders[order])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _made_anew(self) -> Tensor:
        return cast("Callable[[], Tensor]", self.back)()

    def _keep(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self.requires_grad)
        self._note(self.weight)
        self.lent = True
        _KNOWN[self.weight] = ref(self)

    def free(self) -> bool:
        """Free the weight if it can be made anew, is unchanged, and nobody else holds it; return whether it is free."""
        if self.weight is None or self.back is None:
            return self.weight is None
        with _LOCK:
            return self.weight is None or (not (self.changed() or _marked(self.weight)) and self._freed())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _freed(self) -> bool:
        weight = cast("nn.Parameter", self.weight)
        self.requires_grad = weight.requires_grad
        same, holders = weight.data, TensorWeakRef(weight)  # a detached tensor would hold the weight itself
        self.weight = weight = None  # type: ignore[assignment]
        self.weight = holders()
        if self.weight is None:
            viewed = not _alone(same)  # by tensors made with `.data`: others hold the weight itself
            changed = not viewed and self.lent and not _same(self._made_anew(), same)  # by `.data`
            if viewed or changed:
                self._keep(same)
            if changed:
                self.state = ()
        self.lent = self.weight is not None
        return not self.lent


_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows; in a forked process, a lock of another thread is held for ever
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
_KNOWN: Any = WeakTensorKeyDictionary()  # weight -> a weak reference to its `Reordered`
_MADE_ANEW: deque[ref[Reordered]] = deque()
_unreturned = 0  # bytes of weights freed since memory was last given back to the system


def stored(layer: Layer) -> Any:
    """A layer's weight, or its `Reordered` if it is free; both have dtype and requires_grad."""
    weight = dict.get(layer._parameters, "weight")
    if type(weight) is Reordered and weight.weight is None:
        return weight
    return layer.weight


def _unchanged(layer: Layer, order: Order) -> Callable[[], bool]:
    """A function that says whether a layer's weight, which has just been reordered, is still the same.

    Like a call of the layer, it frees a weight that has been read meanwhile.
    """
    known = dict.get(layer._parameters, "weight")
    if type(known) is not Reordered:
        return lambda: False
    return lambda: dict.get(layer._parameters, "weight") is known and known.current(order) is not None


@torch.inference_mode(False)
@torch.no_grad()
def _reordered(layer: Layer, order: Order, shape: list[int]) -> Tensor:
    """Make a layer's weights in an order, remember them for all layers of that weight, and free the weight."""
    with _LOCK:
        weight = cast("nn.Parameter", layer.weight)
        known = _KNOWN.get(weight, lambda: None)()
        if known is None or known.changed():
            known = Reordered(weight)
            _KNOWN[weight] = ref(known)
        if order not in known.orders:
            known.orders[order] = order.make(weight.detach(), layer, shape)
            if order.undo is not None and weight.nbytes >= LARGE:
                known.save_memory(weight, order, order.undo)
        if "weight" in layer._parameters:
            if not isinstance(layer._parameters, WeightsOnDemand):
                layer._parameters = WeightsOnDemand(layer._parameters)
            dict.__setitem__(layer._parameters, "weight", known)
        size = weight.nbytes
        del weight
        if known.free():
            _give_back(size)
        return known.orders[order]


def _give_back(freed: int) -> None:
    """Give freed weights' memory back to the system, some at a time: other tensors seldom fit in its place."""
    global _unreturned
    _unreturned += freed
    if _unreturned >= PIECE:
        give_back()
        _unreturned = 0


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What differs once a weight has changed, in place or by `.data`."""
    memory = weight.untyped_storage()._cdata  # its address alone may be that of memory freed before
    return memory, weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype


def _marked(weight: nn.Parameter) -> bool:
    """Whether a weight has what one made anew would not: gradients, hooks, attributes."""
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return weight.grad is not None or bool(hooks) or bool(weight.__dict__)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _holders(tensor: Tensor) -> int:
    """How many tensors share the memory of this one, as PyTorch counts."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares the memory of this one."""
    return _holders(tensor) <= _holders_of_one()


@cache
def _holders_of_one() -> int:
    return _holders(torch.zeros(1)) if hasattr(torch._C, "_storage_Use_Count") else -1


class WeightsOnDemand(dict[str, Any]):
    """The parameters of a layer, by name; a weight that is kept in other orders alone is made anew when it is read."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value.read() if type(value) is Reordered else value

    def __iter__(self) -> Iterator[str]:  # without it `{**parameters}` would not ask `__getitem__`
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if dict.__contains__(self, name) else default

    def items(self) -> Any:
        return ItemsView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def pop(self, name: str, *default: Any) -> Any:
        value = super().pop(name, *default)
        return value.read() if type(value) is Reordered else value

    def copy(self) -> WeightsOnDemand:
        """The same parameters, of which none is made anew."""
        other = WeightsOnDemand()
        other.update(zip(dict.keys(self), dict.values(self), strict=True))
        return other

    def __or__(self, others: Any) -> Any:
        return dict(self.items()) | others

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """A copy of all weights but those that `memo` says are shared."""
        other = self.copy()
        for name, value in dict.items(self):
            if memo.get(id(value)) is not value:
                other[name] = copy.deepcopy(self[name], memo)
        return other

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)
