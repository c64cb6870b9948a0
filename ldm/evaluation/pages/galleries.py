"""Galleries and histograms of a report: samples, the best and the worst, near copies, reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.image_set import made
from ldm.evaluation.features import MeasuredImages
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.table import METRICS, clip_score
from ldm.evaluation.report import Gallery, GalleryRow, Histogram
from ldm.images import save_png

SAMPLES = 24  # rows of the gallery of samples
EXTREMES = 8  # rows of the galleries of the best and the worst
BINS = 30  # of histograms

Sides = Mapping[str, MeasuredImages]  # by name


@dataclass(frozen=True)
class ShownFolder:
    """The folder `shown/` beside a report, which takes copies of the images that the report shows."""

    folder: Path  # of the report

    def copy(self, images: Images, number: int, name: str) -> str:
        """Copy an image, and return the path of the copy, relative to the report."""
        path = made(self.folder / "shown") / f"{name}-{number:06d}.png"
        save_png(images.read(number)[1], path)
        return str(path.relative_to(self.folder))

    def copies(self, sides: Sides, place: int) -> tuple[str, ...]:
        """Copy the images of all sides at a place, and return the paths of the copies."""
        return tuple(self.copy(one.images, int(one.index[place]), name.lower()) for name, one in sides.items())


def samples(groups: Sequence[Sides], shown: ShownFolder) -> Iterator[Gallery]:
    """The first images of each side; sides whose images are of the same prompts are in one group."""
    for sides in groups:
        first = next(iter(sides.values()))
        rows = [
            GalleryRow(first.images.caption(int(first.index[place])), shown.copies(sides, place))
            for place in range(min(SAMPLES, len(first.index)))
        ]
        yield Gallery(_title("Samples", sides, groups), tuple(sides), "", tuple(rows))


def prompts(groups: Sequence[Sides], shown: ShownFolder) -> Iterator[Gallery]:
    """The images that follow their prompts best and worst, by the mean CLIP score of the sides in a group."""
    for sides in groups:
        if any(one.features.texts is None for one in sides.values()):
            continue
        scores = torch.stack([clip_score(one.features) for one in sides.values()])
        order = scores.mean(dim=0).argsort(stable=True).tolist()
        captions = next(iter(sides.values())).features.captions
        for title, places in (
            ("Best by CLIP score", order[::-1][:EXTREMES]),
            ("Worst by CLIP score", order[:EXTREMES]),
        ):
            rows = [
                GalleryRow(captions[place], shown.copies(sides, place), tuple(scores[:, place].tolist()))
                for place in places
            ]
            yield Gallery(_title(title, sides, groups), tuple(sides), "CLIP score", tuple(rows))


def _title(text: str, sides: Sides, groups: Sequence[Sides]) -> str:
    return text if len(groups) == 1 else f"{text}, {next(iter(sides))}"


def copies(sides: Sides, training: MeasuredImages | None, shown: ShownFolder) -> Iterator[Gallery]:
    """The images of each side that are nearest to training images, beside those training images."""
    for name, one in sides.items():
        distances = one.features.training_distances
        if training is None or one.nearest is None or distances is None:
            continue
        rows = []
        for place in distances.argsort(stable=True)[:EXTREMES].tolist():
            number = int(one.nearest[place])
            images = (
                shown.copy(one.images, int(one.index[place]), name.lower()),
                shown.copy(training.images, number, "training"),
            )
            rows.append(GalleryRow(training.images.key(number), images, (float(distances[place]),)))
        yield Gallery(f"Images of {name} nearest to training images", (name, "training"), "distance", tuple(rows))


def reconstructions(
    rebuilt: Mapping[str, tuple[MeasuredImages, MeasuredImages]], shown: ShownFolder
) -> Iterator[Gallery]:
    """The worst reconstructions of each model, beside the originals."""
    for name, (one, originals) in rebuilt.items():
        metric = next((metric for metric in METRICS if metric in one.features.pairs), None)
        if metric is None:
            continue
        values = one.features.pairs[metric]
        order = values.argsort(stable=True, descending=METRICS[metric].better == "lower")[:EXTREMES].tolist()
        rows = [
            GalleryRow(
                originals.images.caption(place),
                (
                    shown.copy(one.images, place, f"{name.lower()}-reconstructed"),
                    shown.copy(originals.images, place, f"{name.lower()}-original"),
                ),
                (float(values[place]),),
            )
            for place in order
        ]
        yield Gallery(f"Worst reconstructions of {name}", (name, "original"), metric.upper(), tuple(rows))


def histograms(measured: Sides, rebuilt: Sides, reference: MeasuredImages | None) -> Iterator[Histogram]:
    """The distributions of the numbers of single images: CLIP scores, distances, qualities of reconstructions."""
    if measured and all(one.features.texts is not None for one in measured.values()):
        yield _histogram("CLIP score", {name: clip_score(one.features) for name, one in measured.items()})
    with_reference = {**measured, "reference": reference} if reference else measured
    distances = {
        name: one.features.training_distances
        for name, one in with_reference.items()
        if one.features.training_distances is not None
    }
    if distances:
        yield _histogram("Distance to the nearest training image", distances)
    for metric, known in METRICS.items():
        values = {name: one.features.pairs[metric] for name, one in rebuilt.items() if metric in one.features.pairs}
        if values:
            yield _histogram(known.label, values)


def _histogram(title: str, values: Mapping[str, Tensor]) -> Histogram:
    arrays = {name: found.double().cpu().numpy() for name, found in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), BINS)
    counts = [tuple(np.histogram(array, edges)[0].tolist()) for array in arrays.values()]
    return Histogram(title, tuple(edges.tolist()), tuple(arrays), tuple(counts))
