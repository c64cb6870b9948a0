"""Check the confidence intervals and tests of `ldm.evaluation` on features with known true values (tests/gaussians.py).

Measures how often the 95 % interval of each metric contains the true value, how often two equal models are called
different at the 5 % level, and how often a slightly worse model is detected. With 400 trials, a share of 95 % is
measured to ±2 %.

    python tools/check_intervals.py --trials 400
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gaussians import NEIGHBOURS, Gaussian, comparisons, coverage, detections, pair

from ldm.evaluation.metrics.distances import information, kid, manifold, polynomial
from ldm.evaluation.metrics.intervals import frechet_interval, inception_interval, mmd_interval

Draw = torch.Generator
FRECHET = [  # feature dimensions, model's images, reference images (0: known), decay, shift, change
    (8, 200, 200, 0.0, 0.3, 0.2), (8, 400, 400, 0.0, 0.2, 0.1), (16, 200, 200, 1.0, 0.3, 0.2),
    (16, 500, 500, 1.0, 0.3, 0.3), (16, 500, 0, 1.0, 0.3, 0.2), (16, 80, 80, 1.0, 0.5, 0.3),
    (64, 320, 320, 1.0, 0.3, 0.2), (48, 120, 4800, 1.5, 0.3, 0.2), (16, 300, 300, 1.0, 0.0, 0.0),
]  # fmt: skip


def row(what: str, share: float, wanted: str) -> None:
    """Print one line of the table."""
    print(f"| {what} | {share:.1%} | {wanted} |", flush=True)


def intervals(trials: int) -> None:
    """Measure the coverage of the intervals."""
    for dim, n, m, decay, shift, change in FRECHET:
        model, reference, truth = pair(dim, decay, shift, change)

        def frechet(g: Draw, model: Gaussian = model, reference: Gaussian = reference, n: int = n, m: int = m):
            return frechet_interval(model.draw(n, g), reference.draw(m, g) if m else reference.moments)

        wanted = "95 %" if shift or change else "≥ 95 %"
        row(f"FD {truth:.3f}, D={dim}, N={n}, M={m or 'known'}", coverage(frechet, truth, trials), wanted)
    many = torch.Generator().manual_seed(1)
    for shift, change in ((0.3, 0.2), (0.0, 0.0)):
        model, reference, _ = pair(8, 1.0, shift, change)
        truth = kid(model.draw(20000, many), reference.draw(20000, many)) if shift else 0.0
        share = coverage(lambda g: mmd_interval(polynomial, model.draw(300, g), reference.draw(300, g)), truth, trials)  # noqa: B023
        row(f"KID {truth:.3g}, N=M=300", share, "95 %" if shift else "≥ 95 %")
    model, reference, _ = pair(10, 0.5, 0.5, 0.3)
    truth = float(information(model.draw(1000000, many) * 2).mean().exp())
    row("Inception score", coverage(lambda g: inception_interval(model.draw(500, g) * 2), truth, trials), "95 %")
    model, reference, _ = pair(4, 0.5, 0.3, 0.3)
    truths = [manifold(model.draw(200, many), reference.draw(200, many), 5) for _ in range(2000)]
    for name, interval in NEIGHBOURS.items():
        expected = sum(getattr(truth, name) for truth in truths) / len(truths)
        share = coverage(
            lambda g: interval(model.draw(200, g), reference.draw(200, g), 5),  # noqa: B023
            expected,
            trials,
        )
        row(f"{name} {expected:.3f}, N=M=200, k=5", share, "≥ 95 %")


def tests(trials: int) -> None:
    """Measure how often the tests find a difference between equal models, and between slightly different ones."""
    first, reference, _ = pair(8, 0.5, 0.1, 0.1)
    worse = Gaussian(first.mean * 3, first.factor * 0.85)
    for name, test in comparisons(k=5).items():
        for what, second, wanted in (("equal", first, "≤ 5 %"), ("worse", worse, "often")):
            share = detections(
                lambda g: test(first.draw(200, g), second.draw(200, g), reference.draw(200, g)),  # noqa: B023
                trials,
            )
            row(f"{name}, {what} models, N=M=200", share, wanted)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    options = parser.parse_args()
    print("| case | share | wanted |\n|---|---|---|")
    intervals(options.trials)
    tests(options.trials)


if __name__ == "__main__":
    main()
