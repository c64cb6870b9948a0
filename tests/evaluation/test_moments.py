"""Moments in pieces, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import pytest
import torch

from ldm.errors import LdmError
from ldm.evaluation.metrics.moments import (
    Moments,
    blocks,
    measure,
    merge,
)


def same(a: Moments, b: Moments) -> None:
    for mine, expected in zip(vars(a).values(), vars(b).values(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_pieces_give_the_whole() -> None:
    features = torch.randn(50, 6) + 1000  # far from 0: sums of squares would lose the digits
    found = reduce(merge, [measure(piece) for piece in features.split([1, 20, 3, 26])])
    same(found, measure(features))
    torch.testing.assert_close(found.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-12)


def test_blocks_are_small_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.evaluation.metrics.moments.NUMBERS", 60)
    features = torch.randn(23, 4)
    found = list(blocks(features, width=20))
    assert max(len(rows) for rows in found) == 3
    torch.testing.assert_close(torch.cat(found), features.double())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.empty(0, 3), "0 images; at least 1"),
        (lambda: torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), "image 1 are not finite"),
        (lambda: torch.ones(4), "one row for each image"),
    ],
)
def test_features_that_are_none(make: Callable[[], torch.Tensor], words: str) -> None:
    with pytest.raises(LdmError, match=words):
        measure(make())
