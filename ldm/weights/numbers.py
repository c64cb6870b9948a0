"""The numbers of weights, as far as they can be judged without a digest: finite, of sensible size, not left unwritten.

On loading, a few numbers of each tensor are looked at, which leaves the rest of the files unread; `ldm info --verify`
looks at all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LdmError, listing
from ldm.weights.tensors import Excerpt, Store

LARGEST = 1e6  # absolute value of a weight; those of the released models are below 1,000
SAMPLE = 64  # numbers at the start, in the middle and at the end of each tensor
UNWRITTEN = 8  # neighbouring tensors of zeros are a part of the file that was never written
_FAR, _TIMES = 256.0, 1000.0  # a suspicious weight is larger than this, and than so many times the mean of its tensor


def check_sample(store: Store, names: Collection[str]) -> None:
    """Check a sample of the numbers of tensors.

    Raises:
        LdmError: a number is not finite or absurdly large, or neighbouring tensors hold nothing but zeros.
    """
    for sample in store.sample([name for name in names if store.infos[name].numel], SAMPLE):
        numbers = sample.numbers.float()
        wrong = ~(numbers.abs() <= LARGEST)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            name = sample.names[int(np.searchsorted(sample.ends, at, "right"))]
            raise LdmError(f"{_file(store)}: {name} holds {_value(numbers[at])}; {DAMAGED}")
        if zeros := _unwritten(sample, numbers):
            raise LdmError(f"{_file(store)}: {listing(zeros)} hold nothing but zeros, as unwritten parts do; {DAMAGED}")


DAMAGED = "the file is damaged, or its training went wrong: fetch or write it again"


def _file(store: Store) -> str:
    return " or ".join(map(str, store.files[:2])) + (" or …" if len(store.files) > 2 else "")


def _value(number: Tensor) -> str:
    return f"the number {number.item():.3g}"


def _unwritten(sample: Excerpt, numbers: Tensor) -> list[str]:
    """The first of so many neighbouring tensors that hold nothing but zeros, if there are such beside others."""
    starts = np.concatenate([[0], sample.ends[:-1]])
    zero = ~np.maximum.reduceat((numbers != 0).numpy(), starts)
    if zero.all():  # a stand-in for a model, which somebody made on purpose
        return []
    count = 0
    for index, empty in enumerate(zero):
        count = count + 1 if empty else 0
        if count == UNWRITTEN:
            return sample.names[index + 1 - UNWRITTEN : index + 1]
    return []


@dataclass
class Findings:
    """Tensors whose numbers look wrong, and may be right."""

    zeros: list[str] = field(default_factory=list)  # tensors of zeros alone, but for biases
    far: list[str] = field(default_factory=list)  # tensors with a number far from all others

    def lines(self) -> Iterator[str]:
        """A line for each kind of finding."""
        if self.zeros:
            yield f"{len(self.zeros)} tensors hold nothing but zeros, which is unusual: {listing(self.zeros)}"
        if self.far:
            yield f"{len(self.far)} tensors hold a number far from their others, which is unusual: {listing(self.far)}"


def look_at(name: str, tensor: Tensor, findings: Findings) -> None:
    """Look at all numbers of a tensor.

    Raises:
        LdmError: a number is not finite, or absurdly large.
    """
    numbers = tensor.float()
    bad = int((~numbers.isfinite()).sum())
    if bad:
        raise LdmError(f"{name} holds {bad} numbers that are not finite")
    if not numbers.numel():
        return
    sizes = numbers.abs()
    largest = float(sizes.max())
    if largest > LARGEST:
        raise LdmError(f"{name} holds {_value(numbers.flatten()[sizes.argmax()])}; {DAMAGED}")
    if not largest and not name.endswith("bias"):
        findings.zeros.append(name)
    if largest > max(_FAR, _TIMES * float(sizes.mean(dtype=torch.float64))):
        findings.far.append(f"{name} ({largest:.4g})")
