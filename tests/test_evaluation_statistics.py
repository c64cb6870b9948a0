"""Moments in pieces, over ranks and in files; features in files; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest
import torch

from ldm.errors import LdmError
from ldm.evaluation.statistics import (
    Moments,
    blocks,
    load_features,
    load_moments,
    measure,
    merge,
    over_ranks,
    save_features,
    save_moments,
)


def same(a: Moments, b: Moments) -> None:
    for mine, expected in zip(vars(a).values(), vars(b).values(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_pieces_give_the_whole() -> None:
    features = torch.randn(50, 6) + 1000  # far from 0: sums of squares would lose the digits
    found = reduce(merge, [measure(piece) for piece in features.split([1, 20, 3, 26])])
    same(found, measure(features))
    torch.testing.assert_close(found.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-12)


def test_ranks_give_the_whole() -> None:
    features = torch.randn(40, 5)
    parts = [measure(part) for part in features.split([7, 1, 32])]
    mean = measure(features).mean

    def sums(first: torch.Tensor) -> torch.Tensor:
        """What three ranks would add up, told apart by the shape of what this one hands in."""
        if first.ndim == 1:
            return sum(torch.cat([part.count.view(1), part.count * part.mean]) for part in parts)
        return sum(part.scatter + part.count * torch.outer(part.mean - mean, part.mean - mean) for part in parts)

    same(over_ranks(parts[0], sums), measure(features))


def test_blocks_are_small_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.evaluation.statistics.NUMBERS", 60)
    features = torch.randn(23, 4)
    found = list(blocks(features, width=20))
    assert max(len(rows) for rows in found) == 3
    torch.testing.assert_close(torch.cat(found), features.double())


def test_files_keep_every_bit(tmp_path: Path) -> None:
    features = torch.randn(9, 4, dtype=torch.float16)
    save_features(tmp_path / "f.safetensors", features, {"extractor": "x"})
    found, metadata = load_features(tmp_path / "f.safetensors")
    assert torch.equal(found, features) and found.dtype == torch.float16 and metadata["extractor"] == "x"
    save_moments(tmp_path / "m.safetensors", measure(features), {"extractor": "y"})
    moments, metadata = load_moments(tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(vars(moments).values(), vars(measure(features)).values(), strict=True))
    assert metadata["extractor"] == "y"


def test_damaged_and_strange_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_moments(path, measure(torch.randn(9, 4)), {})
    with pytest.raises(LdmError, match="not features of images"):
        load_features(path)
    with pytest.raises(LdmError, match="exists"):
        save_moments(path, measure(torch.randn(9, 4)), {})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(LdmError, match="has changed since it was written"):
        load_moments(path)


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
