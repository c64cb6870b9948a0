"""The report of an evaluation, from images with their features: figures, comparisons, sweeps, galleries and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.evaluation import figures
from ldm.evaluation.features import MeasuredImages, Networks, in_pairs
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.table import Features
from ldm.evaluation.pages import galleries
from ldm.evaluation.plan import EvaluationPlan, Model
from ldm.evaluation.report import Gallery, Report, Row, Side, Sweep
from ldm.evaluation.sides import Notes

Reconstructions = tuple[MeasuredImages, MeasuredImages]  # a model's reconstructions, and the originals


@dataclass(frozen=True)
class Results:
    """All images of an evaluation, with their features."""

    sides: Mapping[str, Model | str | Path]  # by name: A, B
    plan: EvaluationPlan
    networks: Networks
    data: Images | None  # the reference images
    reference: MeasuredImages | None  # the reference images with features, if a metric needs them
    training: MeasuredImages | None
    measured: Mapping[str, MeasuredImages]
    rebuilt: Mapping[str, Reconstructions]
    swept: Mapping[str, Sequence[Sequence[MeasuredImages]]]  # by setting: for each value, the images of each side

    @property
    def of_sets(self) -> list[str]:
        """The metrics of sets of images."""
        return [name for name, one in self.networks.metrics.items() if not one.reconstruction]

    @property
    def of_autoencoders(self) -> list[str]:
        """The metrics of reconstructions."""
        return [name for name, one in self.networks.metrics.items() if one.reconstruction]


def report_of(results: Results, folder: Path, notes: Notes) -> Report:
    """The report of an evaluation.

    Args:
        results: of the evaluation.
        folder: for copies of the images that the report shows.
        notes: notes of the report; more are added.
    """
    pairs = _paired(results.measured, notes)
    compared = pairs or results.measured
    rows = _rows(results, list(compared.values()), compare=bool(pairs)) + _rebuilt_rows(results, notes)
    sweeps = [
        Sweep(over, tuple(results.plan.sweeps[over]), tuple(tuple(_rows(results, sides)) for sides in points))
        for over, points in results.swept.items()
    ]
    rebuilt = {name: one for name, (one, _) in results.rebuilt.items()}
    shown = _galleries(results, pairs, folder)
    _note_figures(results, compared, notes)
    return Report(
        sides=tuple(_side(results, name, one) for name, one in (results.measured or rebuilt).items()),
        reference=_reference_side(results),
        tables=tuple(figures.tables(rows, results.networks)),
        galleries=shown,
        histograms=tuple(galleries.histograms(results.measured, rebuilt, results.reference)),
        sweeps=tuple(sweeps),
        notes=tuple(notes.texts),
    )


def _paired(measured: Mapping[str, MeasuredImages], notes: Notes) -> Mapping[str, MeasuredImages]:
    """Two sides, reduced to the images that both have; empty if they cannot be compared."""
    if len(measured) < 2:
        return {}
    a, b = measured.values()
    pairs = in_pairs(a, b)
    if pairs is None:
        notes.add("A and B are not compared: that needs the same names, or prompts and seeds, for the images of both")
        return {}
    if len(pairs[0].index) < max(len(a.images), len(b.images)):
        notes.add(f"figures are of the {len(pairs[0].index)} images that both A and B have")
    return dict(zip(measured, pairs, strict=True))


def _reference_features(results: Results) -> Features:
    return Features() if results.reference is None else results.reference.features


def _rows(results: Results, sides: Sequence[MeasuredImages], compare: bool = False) -> list[Row]:
    """Figures of sides against the reference images."""
    references = [_reference_features(results)] * len(sides)
    return figures.rows(results.of_sets, [side.features for side in sides], references, compare, results.networks)


def _rebuilt_rows(results: Results, notes: Notes) -> list[Row]:
    """Figures of the models' reconstructions against the originals."""
    one_size = len({side.size for side in results.sides.values() if isinstance(side, Model)}) < 2
    if results.rebuilt and not one_size:
        notes.add("A and B are for images of different sizes: their autoencoders are not compared")
    own = [one.features for one, _ in results.rebuilt.values()]
    originals = [one.features for _, one in results.rebuilt.values()]
    return figures.rows(results.of_autoencoders, own, originals, one_size and len(own) == 2, results.networks)


def _galleries(results: Results, pairs: Mapping[str, MeasuredImages], folder: Path) -> tuple[Gallery, ...]:
    """The galleries of the report, with both sides' images beside each other where they are pairs."""
    groups = [pairs] if pairs else [{name: one} for name, one in results.measured.items()]
    shown = galleries.ShownFolder(folder)
    return (
        *galleries.samples(groups, shown),
        *galleries.prompts(groups, shown),
        *galleries.copies(results.measured, results.training, shown),
        *galleries.reconstructions(results.rebuilt, shown),
    )


def _note_figures(results: Results, sides: Mapping[str, MeasuredImages], notes: Notes) -> None:
    """Add the notes of metrics, and a note about images that are in the reference too."""
    features = {name: one.features for name, one in sides.items()}
    for name in results.of_sets:
        if note := results.networks.metrics[name].note:
            notes.add(note(features, _reference_features(results)))
    reference = results.reference
    for name, one in sides.items():
        if reference is None or one.pixels is None or reference.pixels is None:
            continue
        if shared := int(torch.isin(one.pixels, reference.pixels).sum()):
            notes.add(
                f"{shared} of {len(one.index)} images of {name} are in the reference too, so that distances from "
                "it are too small"
            )


def _side(results: Results, name: str, measured: MeasuredImages) -> Side:
    side, count = results.sides[name], len(measured.index)
    if not isinstance(side, Model):
        return Side(name, str(side), measured.digest, count)
    settings = {**side.settings, "seed": results.plan.seed, "batch": results.plan.batch}
    return Side(name, side.source, side.digest, count, settings)


def _reference_side(results: Results) -> Side | None:
    if results.data is None:
        return None
    reference, source = results.reference, str(results.plan.data)
    if reference is None:
        return Side("reference", source, "", len(results.data))
    return Side("reference", source, reference.digest, len(reference.index))
