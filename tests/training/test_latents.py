"""Moments of latents, in pieces and over ranks, against those of the whole."""

from __future__ import annotations

from functools import reduce

import pytest
import torch

from ldm.training.latents import LatentMoments, measure, merge, over_ranks


def test_pieces_give_the_whole() -> None:
    latents = torch.randn(10, 4, 6, 5) * torch.tensor([1.0, 2.0, 5.0, 0.1]).view(4, 1, 1) + 1000  # far from 0
    found = reduce(merge, [measure(piece) for piece in latents.split([1, 4, 2, 3])])
    whole = latents.double()
    torch.testing.assert_close(found.channel_std, whole.transpose(0, 1).flatten(1).std(dim=1, correction=0))
    assert found.count == 300
    assert found.shift == pytest.approx(whole.mean().item(), rel=1e-12)
    assert found.scale == pytest.approx(1 / whole.std(correction=0).item(), rel=1e-9)


def test_latents_have_mean_0_and_std_1_afterwards() -> None:
    latents = torch.randn(8, 3, 4, 4) * 3 + torch.tensor([1.0, -2.0, 4.0]).view(3, 1, 1)
    found = measure(latents)
    scaled = (latents - found.shift) * found.scale
    assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_ranks_give_the_whole() -> None:
    latents = torch.randn(6, 4, 3, 3) + 50
    parts = [measure(latents[:1]), measure(latents[1:3]), measure(latents[3:])]
    whole = measure(latents)

    def sums(first: torch.Tensor) -> torch.Tensor:
        """What three ranks would add up, told apart by the length of what this one hands in."""
        if first.numel() == 5:
            return sum(torch.cat([part.count.view(1), part.count * part.mean]) for part in parts)
        return sum(part.squares + part.count * (part.mean - whole.mean) ** 2 for part in parts)

    found = over_ranks(parts[0], sums)
    for mine, expected in zip(vars(found).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(mine, expected)
    assert isinstance(found, LatentMoments)
