"""Check schedulers on a problem with a known solution: a mixture of Gaussians and its true denoiser (tests/mixture.py).

For deterministic schedulers: the error against the exact solution of the probability-flow ODE at the last model call,
and the measured order of convergence beside the method's stated order. For stochastic schedulers: the Wasserstein
distance of the samples from the mixture. "Left" is the difference between the samples and the model's last prediction.

    python tools/check_schedulers.py --spacing list
    python tools/check_schedulers.py --scheduler unipc --scheduler deis --prediction v_prediction
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mixture import ORDER, geometric, run, schedule

from ldm.errors import LdmError
from ldm.process import PARAMETRISATIONS
from ldm.sampling.schedulers import LEVELS, SCHEDULERS, SPACINGS, spacings

STEPS = (10, 20, 40, 80)


def row(name: str, spacing: str, prediction: str, count: int) -> str:
    """One line of the table; for a refused combination it holds the reason."""
    cells = []
    measured = []
    for steps in STEPS:
        levels = geometric(steps) if spacing == "list" else spacing
        try:
            outcome = run(schedule(prediction), name, steps, levels, count if name not in ORDER else 512)
        except LdmError as error:
            cells.append("refused")
            if not measured:
                return f"| {name} | {spacing} | {prediction} | refused: {str(error).split(';')[0]} |"
            continue
        measured.append(outcome.error() if name in ORDER else outcome.distance())
        cells.append(f"{measured[-1]:.2g}")
    seen = f"{math.log2(measured[-2] / measured[-1]):.1f}" if name in ORDER else ""
    kind = "error" if name in ORDER else "distance"
    ends = [name, spacing, prediction, kind], [seen, str(ORDER.get(name, "")), f"{outcome.residual():.1g}"]
    return f"| {' | '.join([*ends[0], *cells, *ends[1]])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", action="append", choices=list(SCHEDULERS), help="only this one (repeatable)")
    parser.add_argument("--spacing", action="append", choices=[*SPACINGS, *LEVELS], help="the same")
    parser.add_argument("--prediction", action="append", choices=PARAMETRISATIONS, help="the same")
    parser.add_argument("--samples", type=int, default=65536, help="number of samples for stochastic schedulers")
    options = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    columns = ["scheduler", "spacing", "prediction", "measure", *map(str, STEPS), "order", "claimed", "left"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.scheduler or SCHEDULERS:
        for spacing in options.spacing or spacings(name):
            for prediction in options.prediction or PARAMETRISATIONS:
                if spacing in spacings(name):
                    print(row(name, spacing, prediction, options.samples), flush=True)


if __name__ == "__main__":
    main()
