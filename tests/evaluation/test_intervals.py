"""Intervals hold the truth as often as they say; equal models are told apart no more often than a test may."""

from __future__ import annotations

import math

import pytest
import torch
from gaussians import NEIGHBOURS, Gaussian, comparisons, coverage, detections, pair
from scipy.stats import binomtest
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.metrics.comparison import (
    Comparison,
    compare,
    compare_coverage,
    density_parts,
    frechet_parts,
    inception_parts,
    mmd_parts,
    precision_parts,
)
from ldm.evaluation.metrics.distances import frechet_distance, inception_score, kid, manifold, polynomial
from ldm.evaluation.metrics.intervals import (
    chance_interval,
    frechet_interval,
    inception_interval,
    mean_interval,
    mmd_interval,
    share_interval,
)
from ldm.evaluation.metrics.moments import measure

# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "count", "shift", "change"), [(8, 300, 0.3, 0.2), (12, 200, 0.5, 0.3)])
@pytest.mark.parametrize("known", [False, True])
def test_intervals_hold_the_true_frechet_distance(
    dim: int, count: int, shift: float, change: float, known: bool
) -> None:
    model, reference, truth = pair(dim, 1.0, shift, change)
    found = coverage(
        lambda g: frechet_interval(model.draw(count, g), reference.moments if known else reference.draw(count, g)),
        truth,
        trials=400,
    )
    assert 0.93 <= found <= 0.97


def test_the_bias_of_few_images_is_removed() -> None:
    """With five images for each dimension, the plain distance is off by many standard errors."""
    model, reference, truth = pair(32, 1.0, 0.3, 0.2)
    generator = torch.Generator().manual_seed(0)
    found = [frechet_interval(model.draw(160, generator), reference.draw(160, generator)) for _ in range(40)]
    error = sum(e.error or 0 for e in found) / 40
    assert sum(e.value for e in found) / 40 - truth > 3 * error
    assert abs(sum(e.corrected or 0 for e in found) / 40 - truth) < 3 * error / math.sqrt(40)


def test_too_few_images_have_no_interval_and_say_why() -> None:
    found = frechet_interval(torch.randn(12, 6), torch.randn(200, 6))
    assert found.value > 0 and found.corrected is None and found.low is None and found.high is None
    assert "12 images are too few for 6 features" in found.note and "about 15 images" in found.note


def test_features_that_are_constant_or_repeated_do_not_matter() -> None:
    samples, reference = torch.randn(60, 3), torch.randn(80, 3) * 1.5
    plain = frechet_interval(samples, reference)
    more = [torch.cat([x, torch.full((len(x), 2), 7.0), x[:, :1]], dim=1) for x in (samples, reference)]
    found = frechet_interval(*more)
    assert found.note == "" and math.isfinite(found.low or 0) and math.isfinite(found.high or 0)
    assert found.value > plain.value  # the repeated one counts twice


@pytest.mark.parametrize(("shift", "change", "truth"), [(0.0, 0.0, 0.0), (0.3, 0.2, None)])
def test_intervals_hold_the_true_kid(shift: float, change: float, truth: float | None) -> None:
    model, reference, _ = pair(8, 1.0, shift, change)
    many = torch.Generator().manual_seed(1)
    truth = kid(model.draw(4000, many), reference.draw(4000, many)) if truth is None else truth
    found = coverage(lambda g: mmd_interval(polynomial, model.draw(200, g), reference.draw(200, g)), truth, trials=200)
    assert found >= 0.92


def test_intervals_hold_the_true_inception_score() -> None:
    """Also where the usual parts of few images miss it by far."""
    model, _, _ = pair(10, 0.5, 0.5, 0.3)
    many = model.draw(200000, torch.Generator().manual_seed(1)) * 2
    truth = inception_score(many, splits=1)
    found = coverage(lambda g: inception_interval(model.draw(300, g) * 2), truth, trials=400)
    assert 0.92 <= found <= 0.98


def test_the_groups_of_the_jackknife_are_left_out() -> None:
    """The standard errors against those of the metric computed again without each group."""
    samples, reference = torch.randn(70, 3), torch.randn(63, 3) * 1.3
    whole = manifold(samples, reference, k=3)
    for name, interval in NEIGHBOURS.items():
        estimate = interval(samples, reference, k=3)
        assert estimate.value == pytest.approx(getattr(whole, name))
        variance = 0.0
        for side in (0, 1):
            left = []
            for group in range(20):
                kept = [samples, reference]
                kept[side] = kept[side][torch.arange(len(kept[side])) % 20 != group]
                left.append(getattr(manifold(*kept, k=3), name))
            variance += 19 * torch.tensor(left, dtype=torch.float64).var(correction=0).item()
        assert estimate.error == pytest.approx(math.sqrt(variance)), name


def test_intervals_of_neighbours_hold_their_expectation() -> None:
    model, reference, _ = pair(3, 0.5, 0.3, 0.3)
    generator = torch.Generator().manual_seed(1)
    truths = [manifold(model.draw(80, generator), reference.draw(80, generator), 3) for _ in range(300)]
    drawn = [(model.draw(80, generator), reference.draw(80, generator)) for _ in range(100)]
    for name, interval in NEIGHBOURS.items():
        truth = sum(getattr(t, name) for t in truths) / len(truths)
        found = [interval(*sides, 3) for sides in drawn]
        assert sum((e.low or 0) <= truth <= (e.high or 0) for e in found) >= 92, name


def test_the_intervals_of_means_and_shares() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 5.0])
    found = mean_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - 3.182446 * 0.912871, 3 + 3.182446 * 0.912871))
    share = share_interval(torch.arange(10) < 3)
    expected = binomtest(3, 10).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high))
    assert share_interval(torch.zeros(10, dtype=torch.bool)).high == pytest.approx(0.2775, abs=1e-3)  # not 0
    sure = chance_interval(torch.ones(10))
    assert (sure.low, sure.high) == pytest.approx((1 - 0.2775, 1), abs=1e-3)  # as a share's
    chances = torch.tensor([0.1, 0.9, 0.6, 0.4] * 200)
    assert chance_interval(chances).low == pytest.approx(mean_interval(chances).low, abs=1e-3)  # as a mean's


# --- two models -------------------------------------------------------------------------------------------------------

TESTS = comparisons(k=3)


def paired(model: Gaussian, other: Gaussian, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of two models for the same prompts and seeds: half of what they show is common."""
    a, b, common = (torch.randn(count, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    return tuple((x + common) / math.sqrt(2) @ m.factor.T + m.mean for x, m in ((a, model), (b, other)))


@pytest.mark.parametrize("name", TESTS)
def test_equal_models_are_rarely_called_different(name: str) -> None:
    """At the level of 5 %, more than 8 % of 300 trials would have a chance of 1 %."""
    model, reference, _ = pair(4, 0.5, 0.2, 0.2)
    found = detections(lambda g: TESTS[name](*paired(model, model, 60, g), reference.draw(60, g)), trials=300)
    assert found <= 0.08


def test_fewer_images_than_features_can_still_be_compared() -> None:
    """No interval exists then; but the exchange of images is as exact as ever, and finds what is large."""
    model, reference, _ = pair(40, 0.5, 0.2, 0.2)

    def test(other: Gaussian, generator: torch.Generator) -> Comparison:
        a, b = model.draw(25, generator), other.draw(25, generator)
        return compare(*frechet_parts(a, b, measure(reference.draw(200, generator))))

    assert detections(lambda g: test(model, g), trials=300) <= 0.08
    assert detections(lambda g: test(Gaussian(model.mean, model.factor * 1.3), g), trials=50) > 0.9


@pytest.mark.parametrize("name", TESTS)
def test_a_worse_model_is_found(name: str) -> None:
    """One that shows a smaller part, a little off; and the sign says which."""
    model, reference, _ = pair(4, 0.5, 0.0, 0.1)
    worse = Gaussian(model.mean + 0.3, model.factor * 0.6)
    generator = torch.Generator().manual_seed(0)
    a, b = paired(model, worse, 200, generator)
    found = TESTS[name](a, b, reference.draw(200, generator))
    assert found.p < 0.01 and found.needed is None
    better_is_smaller = name in ("FD", "KID")
    b_is_denser = name in ("density", "precision")  # what is drawn in to the middle
    assert (found.difference < 0) == (better_is_smaller or b_is_denser)


def test_a_lost_mode_is_found_by_coverage() -> None:
    places = torch.randint(0, 8, (300,)) * 5.0
    lost = torch.where(places == 35, torch.zeros(()), places)
    others = torch.randint(0, 8, (300,)) * 5.0
    a, b, reference = (x[:, None] + torch.randn(300, 2) * 0.2 for x in (places, lost, others))
    found = compare_coverage(a, b, reference, 5)
    assert found.p < 0.01
    expected = manifold(a, reference, 5).coverage - manifold(b, reference, 5).coverage
    assert found.difference == pytest.approx(expected)


def test_parts_add_up_to_the_difference_of_the_figures() -> None:
    a, b, reference = torch.randn(400, 5), torch.randn(400, 5) * 1.1 + 0.05, torch.randn(300, 5) + 0.3
    parts = mmd_parts(polynomial, a, b, reference)
    assert compare(*parts).difference == pytest.approx(kid(a, reference) - kid(b, reference), rel=1e-9)
    first, second = (frechet_distance(measure(x), measure(reference)) for x in (a, b))
    found = compare(*frechet_parts(a, b, measure(reference)))
    assert found.difference == pytest.approx(first - second, rel=0.05)
    logarithms = math.log(inception_score(a, 1)) - math.log(inception_score(b, 1))
    assert compare(*inception_parts(a, b)).difference == pytest.approx(logarithms, rel=0.05)
    for name, parts_of in (("precision", precision_parts), ("density", density_parts)):
        expected = getattr(manifold(a, reference, 3), name) - getattr(manifold(b, reference, 3), name)
        assert compare(*parts_of(a, b, reference, 3)).difference == pytest.approx(expected)


def test_pairs_decide_what_unpaired_images_cannot() -> None:
    prompts = torch.randn(50) * 10
    a, b = prompts + torch.randn(50) * 0.1, prompts + torch.randn(50) * 0.1 + 0.1
    assert compare(a, b).p < 0.01
    assert compare(a, b[torch.randperm(50)]).p > 0.05


def test_how_many_images_would_be_needed() -> None:
    """With as many, the difference is found in about 80 % of cases."""
    pilot = torch.randn(100)
    pilot = (pilot - pilot.mean()) / pilot.std() + 0.1  # a tenth of the standard deviation: 785 pairs
    found = compare(pilot, torch.zeros(100))
    assert found.p > 0.05 and found.needed == pytest.approx(785, abs=2)
    power = detections(lambda g: compare(torch.randn(785, generator=g) + 0.1, torch.zeros(785)), 100, 0)
    assert 0.68 <= power <= 0.92
    sure = compare(torch.tensor([1.0, 1.1, 0.9]), torch.zeros(3))
    assert (sure.p > 0.05, sure.needed) == (True, 6)  # of 2^5 ways to exchange five pairs, two are as extreme


def test_equal_images_are_equal() -> None:
    features = torch.randn(30, 4)
    found = compare(*frechet_parts(features, features, measure(torch.randn(40, 4))))
    assert found.difference == 0 and found.p == 1 and found.needed is None
    rounded = compare(features[:, 0], features[:, 0] * (1 + 1e-8 * torch.randn(30)))
    assert rounded.difference == 0 and rounded.needed is None


def test_a_comparison_repeats_and_needs_pairs() -> None:
    a, b = torch.randn(40), torch.randn(40)
    assert compare(a, b) == compare(a, b)
    with pytest.raises(LdmError, match="40 images of model A and 39 of model B"):
        compare(a, b[1:])
