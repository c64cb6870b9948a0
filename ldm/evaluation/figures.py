"""Figures of metrics, and comparisons of two sides, as the rows and tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldm.evaluation.features import Networks
from ldm.evaluation.metrics.table import METRICS, Features
from ldm.evaluation.pages.words import verdict
from ldm.evaluation.report import Row, Table

ROLES = ("features", "clip", "copies", "lpips", "")  # roles of networks, in the order of their tables


def rows(
    names: Sequence[str], sides: Sequence[Features], references: Sequence[Features], compare: bool, networks: Networks
) -> list[Row]:
    """The figures of each side, and their comparison.

    Args:
        names: names of the metrics.
        sides: for each side, features of its images.
        references: for each side, features of its reference images.
        compare: whether the two sides, with images of the same prompts and seeds, are compared.
        networks: the networks that gave the features.

    Raises:
        LdmError: there are too few images, or their features do not fit.
    """
    found = []
    for name in names if sides else ():
        one = METRICS[name]
        figures = tuple(one.estimate(side, other) for side, other in zip(sides, references, strict=True))
        difference = one.compare(sides[0], sides[1], references[0]) if compare else None
        words = verdict(difference, one.better) if difference else ""
        found.append(Row(name, _label(name, networks), one.better, figures, difference, words, one.difference))
    return found


def _label(name: str, networks: Networks) -> str:
    """A metric's label; the names FID and the like are for features of Inception alone."""
    one = METRICS[name]
    network = networks.opened.get(one.network)
    return one.plain if one.plain and network and not network.name.startswith("Inception") else one.label


def tables(found: Sequence[Row], networks: Networks) -> Iterator[Table]:
    """A table for each network, because figures of different networks are not comparable."""
    for role in ROLES:
        own = tuple(row for row in found if METRICS[row.metric].network == role)
        if own:
            yield Table(networks.used.get(role), own)
