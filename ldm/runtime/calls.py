"""Recordings of a step on the CPU: the calls of kernels that it makes, in a row, without Python between them.

A recording reads and writes the same places in memory every time, as a CUDA graph does (`graphs.py`), so that it keeps
all tensors of a step. What PyTorch computes in a step is called again by Python, between calls of our own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.runtime.fused import LAST
from ldm.runtime.kernels import layers
from ldm.runtime.kernels.compiled import Calls, fits, recording

Step = Callable[[], Tensor]
aten = torch.ops.aten
MAKERS = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)


class CallRecorder:
    """Records steps as calls of kernels."""

    def __call__(self, step: Step) -> Step:
        """Run a step, record it, and return a function that makes its calls again; its result is the same tensor.

        It is recorded anew when weights have changed that it reads reordered copies of.
        """
        watch = Watch.over(step)

        def again() -> Tensor:
            nonlocal watch
            if not watch.valid():
                watch = Watch.over(step)
            for part in watch.parts:
                part.again()
            return watch.out

        return again


class PyTorchCall:
    """A call of PyTorch's, whose results are copied to where they were at first."""

    def __init__(self, function: Any, given: tuple[Any, dict[str, Any]], results: list[Tensor]) -> None:
        self.function, self.given, self.results = function, given, results
        self.changes = function._schema.is_mutable

    def again(self) -> None:
        """Make the call."""
        made = self.function(*self.given[0], **self.given[1])
        if not self.changes:
            for place, result in zip(self.results, tree_leaves(made), strict=True):
                place.copy_(result)


class Watch(TorchDispatchMode):
    """Notes what a step calls."""

    out: Tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: otherwise PyTorch imports its compiler at the first call, which takes a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Calls | PyTorchCall] = []
        self.weights: list[Callable[[], bool]] = []  # which say whether weights are as they were

    @classmethod
    def over(cls, step: Step) -> Watch:
        """What a step calls once it has brought weights into their orders, which its first call does.

        Raises:
            RuntimeError: its calls depend on numbers that it computes.
        """
        step()
        watch = cls()
        watch.begin()
        recording.weights = watch.weights
        try:
            with watch:
                watch.out = step()
        finally:
            recording.calls, recording.weights = None, None
        watch.drop_unread()
        return watch

    def begin(self) -> None:
        """Note calls of our own kernels as one part."""
        recording.calls = calls = Calls()
        self.parts.append(calls)

    def valid(self) -> bool:
        """Whether the weights are as they were."""
        return all(same() for same in self.weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OWN.get(func)
        made = own(*args, **kwargs) if own else None
        if made is not None:
            return made
        result = func(*args, **kwargs)
        self.note(func, (args, kwargs), result)
        return result

    def note(self, function: Any, given: tuple[Any, dict[str, Any]], result: Any) -> None:
        """Note a call of PyTorch's, unless it makes a view or an empty tensor."""
        results = tree_leaves(result)
        if not all(isinstance(one, Tensor) for one in results):
            raise RuntimeError(f"the step reads a number that it computes ({function})")
        places = {_place(one) for one in tree_leaves(given) if isinstance(one, Tensor)}
        views = all(_place(one) in places for one in results)
        if function.overloadpacket in MAKERS or (views and not function._schema.is_mutable):
            return
        self.parts.append(PyTorchCall(function, given, results))
        self.begin()

    def drop_unread(self) -> None:
        """Drop calls of PyTorch's whose results nothing reads."""
        read = {_place(self.out)}
        parts: list[Calls | PyTorchCall] = []
        for part in reversed(self.parts):
            if isinstance(part, Calls):
                read |= {_place(one) for one in part.kept}
                if part.made:
                    parts.append(part)
            elif part.changes or any(_place(one) in read for one in part.results):
                read |= {_place(one) for one in tree_leaves(part.given) if isinstance(one, Tensor)}
                parts.append(part)
        self.parts = parts[::-1]


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; one in an order of oneDNN's, which does not tell, is a place of its own."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


# --- what PyTorch would compute, by our own kernels -------------------------------------------------------------------


def _sum(a: Any, b: Any, alpha: float = 1) -> Tensor | None:
    alike = isinstance(a, Tensor) and isinstance(b, Tensor) and fits(a, b) and a.shape == b.shape and alpha == 1
    return layers.add(a, b) if alike and a.stride() == b.stride() and _dense(a) else None


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    images = len(tensors) == 2 and dim == 1 and all(one.dim() == 4 for one in tensors) and fits(*tensors)
    return layers.join(*tensors) if images and all(one.is_contiguous(memory_format=LAST) for one in tensors) else None


def _silu(x: Tensor) -> Tensor | None:
    return layers.silu(x) if fits(x) and _dense(x) else None


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=LAST))


OWN: dict[Any, Callable[..., Tensor | None]] = {
    aten.add.Tensor: _sum,
    aten.cat.default: _joined,
    aten.silu.default: _silu,
}
