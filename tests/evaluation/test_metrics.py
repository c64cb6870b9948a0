"""Metrics against torchmetrics, brute force and known values; which metric sees which defect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.errors import LdmError
from ldm.evaluation.metrics.distances import (
    clip_scores,
    cmmd,
    frechet_distance,
    inception_score,
    kid,
    manifold,
    memorisation,
    nearest,
    r_precision,
    spatial_features,
)
from ldm.evaluation.metrics.moments import measure


class Given(nn.Module):
    """An extractor for torchmetrics whose images are features already."""

    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


def sets(n: int = 90, m: int = 70, dim: int = 12) -> tuple[Tensor, Tensor]:
    """Features of a model and of a reference, which are correlated, skewed, and differ."""
    mix = torch.randn(dim, dim)
    return torch.randn(n, dim).relu() @ mix + 0.3, torch.randn(m, dim).exp() @ mix / 2


@pytest.mark.parametrize("count", [90, 8])  # 8 images span fewer than the 12 features
def test_fid_against_torchmetrics(count: int) -> None:
    samples, reference = (x.double() for x in sets(count))
    theirs = FrechetInceptionDistance(feature=Given())
    theirs.update(reference, real=True)
    theirs.update(samples, real=False)
    # where covariances are singular, the eigenvalues of their product are known to the root of the rounding
    expected = pytest.approx(theirs.compute().item(), rel=1e-9 if count > 12 else 1e-6)
    assert frechet_distance(measure(samples), measure(reference)) == expected


def test_fid_of_known_gaussians() -> None:
    """Diagonal covariances: |μ₁ - μ₂|² + Σ (σ₁ - σ₂)²; one of them singular."""
    base = torch.cat([torch.eye(4), -torch.eye(4)]).double() * math.sqrt(7 / 2)  # covariance: the identity
    scale = torch.tensor([1.0, 2.0, 0.5, 0.0])
    distance = frechet_distance(measure(base), measure(base * scale + 3))
    assert distance == pytest.approx(4 * 9 + 0 + 1 + 0.25 + 1, rel=1e-12)
    assert frechet_distance(measure(base), measure(base)) == pytest.approx(0, abs=1e-12)


def test_kid_against_torchmetrics() -> None:
    samples, reference = (x.double() for x in sets(80, 80))
    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=80)
    theirs.update(reference, real=True)
    theirs.update(samples, real=False)
    assert kid(samples, reference) == pytest.approx(theirs.compute()[0].item(), rel=1e-9)


def test_kid_is_what_random_subsets_average_to() -> None:
    samples, reference = (x.double() for x in sets(60, 50))
    theirs = KernelInceptionDistance(feature=Given(), subsets=400, subset_size=40)
    theirs.update(reference, real=True)
    theirs.update(samples, real=False)
    mean, spread = theirs.compute()
    assert abs(kid(samples, reference) - mean.item()) < 4 * spread.item() / 20


def test_inception_score_against_torchmetrics() -> None:
    logits = torch.randn(60, 7, dtype=torch.float64) * 3
    theirs = InceptionScore(feature=Given(), splits=1)
    theirs.update(logits)
    assert inception_score(logits, splits=1) == pytest.approx(theirs.compute()[0].item(), rel=1e-9)
    parts = []
    for part in logits.split(20):
        p = part.softmax(1)
        parts.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    assert inception_score(logits, splits=3) == pytest.approx(sum(parts) / 3, rel=1e-9)
    certain = torch.eye(5).repeat(20, 1) * 1e4  # one class each, all equally often: log 0 must not show
    assert inception_score(certain, splits=2) == pytest.approx(5, rel=1e-6)


def test_cmmd_by_hand() -> None:
    x, y = torch.randn(9, 5), torch.randn(7, 5) + 1

    def mean(a: Tensor, b: Tensor, same: bool = False) -> float:
        """The mean of the kernel over pairs, in plain Python."""
        units = [v / v.norm() for v in a.double()], [v / v.norm() for v in b.double()]
        values = [
            math.exp(-((p - q) ** 2).sum().item() / 200)
            for (i, p), (j, q) in itertools.product(enumerate(units[0]), enumerate(units[1]))
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert cmmd(x * 4, y) == pytest.approx(cmmd(x, y), rel=1e-9)  # lengths do not matter


@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_by_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.evaluation.metrics.moments.NUMBERS", 200)  # several blocks
    samples, reference = sets(31, 27, 3)

    def radius(points: Tensor, i: int) -> float:
        return sorted(math.dist(points[i].tolist(), points[j].tolist()) for j in range(len(points)) if j != i)[k - 1]

    def held(point: Tensor, centres: Tensor) -> int:
        return sum(math.dist(point.tolist(), c.tolist()) <= radius(centres, i) for i, c in enumerate(centres))

    found = manifold(samples, reference, k)
    counts = [held(x, reference) for x in samples]
    assert found.precision == pytest.approx(sum(c > 0 for c in counts) / 31)
    assert found.density == pytest.approx(sum(counts) / k / 31)
    assert found.recall == pytest.approx(sum(held(y, samples) > 0 for y in reference) / 27)
    covered = [
        min(math.dist(y.tolist(), x.tolist()) for x in samples) <= radius(reference, i) for i, y in enumerate(reference)
    ]
    assert found.coverage == pytest.approx(sum(covered) / 27)


def test_clip_scores_by_hand() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    texts = torch.tensor([[6.0, 8.0], [1.0, 1.0], [1.0, -1.0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0])


def test_r_precision_is_the_probability_of_winning_the_draw() -> None:
    images, texts = torch.randn(8, 3), torch.randn(8, 3)
    captions = list("abcdefgh")
    found = r_precision(images, texts, captions, distractors=3)
    scores = nn.functional.normalize(images) @ nn.functional.normalize(texts).T
    for i, row in enumerate(scores):
        draws = list(itertools.combinations([j for j in range(8) if j != i], 3))
        assert found[i].item() == pytest.approx(sum(all(row[j] < row[i] for j in draw) for draw in draws) / len(draws))


def test_equal_captions_are_no_distractors() -> None:
    images = torch.eye(3)[[0, 0, 1, 2]]
    texts = images.clone()
    found = r_precision(images, texts, ["fox", "fox", "owl", "cat"], distractors=2)
    assert found.tolist() == pytest.approx([1, 1, 1, 1])
    with pytest.raises(LdmError, match="2 other captions, but 3 distractors"):
        r_precision(images, texts, ["fox", "fox", "owl", "cat"], distractors=3)


def test_copies_of_training_images_are_found() -> None:
    training = torch.randn(200, 6)
    held_out, _ = nearest(torch.randn(99, 6), training)
    fresh = memorisation(nearest(torch.randn(150, 6), training)[0], held_out)
    assert fresh.p > 0.05 and fresh.expected == pytest.approx(0.05)
    copies = torch.cat([torch.randn(120, 6), training[:30] + 0.001])
    distances, which = nearest(copies, training)
    found = memorisation(distances, held_out)
    assert found.p < 1e-3 and found.share >= 0.2
    assert bool(found.close[120:].all()) and which[120:].tolist() == list(range(30))


def test_the_p_value_of_memorisation_is_exact() -> None:
    """It is uniform but for its steps: at most 5 % of p-values of equal distributions are at most 5 %."""
    p = torch.tensor([memorisation(torch.rand(40), torch.rand(39), 0.25).p for _ in range(1000)])
    assert (p <= 0.05).double().mean() <= 0.05 + 2 * 0.007
    assert (p <= 0.5).double().mean() > 0.35


def test_the_features_of_sfid() -> None:
    maps = torch.randn(2, 192, 17, 17)
    found = spatial_features(maps)
    assert found.shape == (2, 2023)
    assert torch.equal(found[1, (3 * 17 + 5) * 7 : (3 * 17 + 5) * 7 + 7], maps[1, :7, 3, 5])


# --- which metric sees which defect -----------------------------------------------------------------------------------


def images(count: int) -> Tensor:
    """Discs of eight colours in eight places on grey: (N, 3, 12, 12)."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    kind = torch.arange(count) % 8
    angle = kind * math.pi / 4
    centre = 5.5 + 3 * torch.stack([angle.sin(), angle.cos()], dim=1) + torch.randn(count, 2) * 0.3
    disc = ((y - centre[:, :1, None]) ** 2 + (x - centre[:, 1:, None]) ** 2 < 6).float()  # (N, 12, 12)
    colour = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin()], dim=1) + torch.randn(count, 3) * 0.1
    return disc[:, None] * colour[:, :, None, None] + torch.randn(count, 3, 12, 12) * 0.05


def features(images: Tensor) -> Tensor:
    """Of a small random network, the same each time: (N, 24)."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(12, 3, 3, 3, generator=generator) / 5
    second = torch.randn(24, 12, 3, 3, generator=generator) / 10
    hidden = nn.functional.conv2d(images, first, stride=2).relu()
    return nn.functional.conv2d(hidden, second).relu().mean(dim=(2, 3))


def noisy(images: Tensor, amount: float) -> Tensor:
    return images + torch.randn_like(images) * amount * 0.3


def blurred(images: Tensor, amount: float) -> Tensor:
    soft = nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    return images + amount * (soft - images)


def recoloured(images: Tensor, amount: float) -> Tensor:
    """A share of the images with red and blue exchanged."""
    swapped = torch.arange(len(images)) % 10 < 10 * amount
    return torch.where(swapped[:, None, None, None], images.flip(1), images)


def dropped(images: Tensor, amount: float) -> Tensor:
    """Without some of the eight kinds, others in their place."""
    return images[torch.arange(len(images)) % 8 < 8 * (1 - amount)].repeat(8, 1, 1, 1)[: len(images)]


@pytest.mark.parametrize("spoil", [noisy, blurred, recoloured, dropped])
def test_defects_increase_distances(spoil: Callable[[Tensor, float], Tensor]) -> None:
    reference, fresh = features(images(800)), images(800)
    found = [features(spoil(fresh, amount)) for amount in (0.0, 0.25, 0.5, 0.75)]
    for distance in (kid, cmmd, lambda a, b: frechet_distance(measure(a), measure(b))):
        values = [distance(x, reference) for x in found]
        assert values == sorted(values) and values[1] > values[0], values


def test_noise_costs_precision_and_dropped_modes_cost_recall() -> None:
    reference, fresh = features(images(800)), images(800)
    noise = [manifold(features(noisy(fresh, amount)), reference, 5) for amount in (0.0, 0.25, 0.5)]
    modes = [manifold(features(dropped(fresh, amount)), reference, 5) for amount in (0.0, 0.25, 0.5)]
    for name, values in (("precision", noise), ("density", noise), ("recall", modes), ("coverage", modes)):
        figures = [getattr(value, name) for value in values]
        assert figures[0] > figures[1] > figures[2], (name, figures)
    assert modes[2].precision > 0.9 * modes[0].precision  # what is left is as good as before


def test_what_cannot_be_compared_is_said() -> None:
    a, b = torch.randn(5, 3), torch.randn(5, 4)
    with pytest.raises(LdmError, match="3 features of an image, compared with 4"):
        frechet_distance(measure(a), measure(b))
    with pytest.raises(LdmError, match="a single image has no covariance"):
        frechet_distance(measure(a[:1]), measure(a))
    with pytest.raises(LdmError, match="reference: 4 features of an image, compared with 3"):
        kid(a, b)
    with pytest.raises(LdmError, match="reference: 3 images; at least 4"):
        manifold(a, a[:3], 3)
    with pytest.raises(LdmError, match="embedding 1 is 0"):
        cmmd(a * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])[:, None], a)
