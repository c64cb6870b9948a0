"""What can be checked of an evaluation before PyTorch is imported: numbers, and whether published weights are there."""

from __future__ import annotations

from collections.abc import Collection

from ldm.errors import LdmError, check_whole
from ldm.weights.published import INCEPTION, SSCD, published

SIDES = ("A", "B")  # names of the sides
OF_FEATURES = frozenset(
    {"fid", "sfid", "kid", "is", "precision", "recall", "density", "coverage", "rfid"}
)  # metrics of the network `features`
OF_COPIES = frozenset({"memorisation"})  # of the network `copies`


def check_numbers(sides: int, n: int | None, batch: int, seed: int) -> None:
    """Check the numbers of an evaluation: of sides, and those of `EvaluationPlan`.

    Raises:
        LdmError: one is out of bounds.
    """
    if not 1 <= sides <= len(SIDES):
        raise LdmError(f"{sides} models or folders; evaluate one, or two to compare them")
    if n is not None:
        check_whole("evaluation", "n", n, 2, 10**7)
    check_whole("evaluation", "batch", batch, 1, 10**5)
    check_whole("evaluation", "seed", seed, 0, 2**32)


def check_published(metrics: Collection[str], features: str, copies: str) -> None:
    """Check that the published weights which metrics need, by the names of two networks, are there.

    Raises:
        LdmError: a file is missing.
    """
    if features == "inception" and OF_FEATURES & set(metrics):
        published(INCEPTION, "inception")
    if copies == "sscd" and OF_COPIES & set(metrics):
        published(SSCD, "sscd")
