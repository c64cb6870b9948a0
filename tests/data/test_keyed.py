"""Random numbers depend on what they are for, and on nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import combinations

import torch

from ldm.data.keyed import generator, uniform

KEYS: list[tuple[int, str, tuple[int | str, ...]]] = [
    (0, "crop", ("a", 1)),
    (1, "crop", ("a", 1)),
    (0, "flip", ("a", 1)),
    (0, "crop", ("a", 2)),
    (0, "crop", ("a", "1")),
    (0, "crop", ("a1",)),
    (0, "crop", ("a', '1",)),
    (0, "crop", ("b", 1)),
]


def test_every_part_of_the_key_counts() -> None:
    for a, b in combinations(KEYS, 2):
        assert uniform(a[0], a[1], *a[2]) != uniform(b[0], b[1], *b[2]), (a, b)
        first, second = (torch.randn(4, generator=generator(k[0], k[1], *k[2])) for k in (a, b))
        assert not torch.equal(first, second), (a, b)


def test_nothing_else_counts() -> None:
    """Neither the global generators nor the process, whose hashes of strings differ."""
    code = (
        "import torch; from ldm.data.keyed import *; "
        "print(uniform(3, 'x', 'ä\\udcff', 2), torch.rand((), generator=generator(3, 'x', 'ä', 2)).item())"
    )
    surrogate = "ä\udcff"  # of a file name that is no UTF-8
    before = torch.get_rng_state(), random.getstate()
    here = f"{uniform(3, 'x', surrogate, 2)} {torch.rand((), generator=generator(3, 'x', 'ä', 2)).item()}"
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert there.stdout.strip() == here


def test_numbers_are_uniform() -> None:
    numbers = torch.tensor([uniform(0, "x", i) for i in range(4000)], dtype=torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 43.8  # chi square with 19 degrees of freedom, p = 0.001


def test_recorded_numbers() -> None:
    """A change here changes every run."""
    assert uniform(0, "crop", "a", 1) == 0.9160339766705092
