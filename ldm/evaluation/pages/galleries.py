"""What a report shows besides figures: samples, the best and the worst, near copies, reconstructions, histograms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.image_set import made
from ldm.evaluation.features import Looked
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.table import scores
from ldm.evaluation.report import Gallery, Histogram, Shown
from ldm.images import save_png

SAMPLES = 24  # rows of the gallery of samples
EXTREMES = 8  # rows of the galleries of the best and the worst
BINS = 30  # of histograms


Named = Sequence[tuple[str, Looked]]  # sides with their names


@dataclass(frozen=True)
class Show:
    """Puts images beside the report, in `shown/`."""

    folder: Path

    def __call__(self, images: Images, number: int, name: str) -> str:
        """The path of a copy of an image, relative to the report."""
        path = made(self.folder / "shown") / f"{name}-{number:06d}.png"
        save_png(images.read(number)[1], path)
        return str(path.relative_to(self.folder))

    def row(self, sides: Named, place: int) -> tuple[str, ...]:
        """The images of all sides at a place."""
        return tuple(self(one.images, int(one.index[place]), name.lower()) for name, one in sides)


def samples(groups: Sequence[Named], show: Show) -> Iterator[Gallery]:
    """The first images of each side; sides whose images are of the same prompts are in one group."""
    for sides in filter(None, groups):
        first = sides[0][1]
        rows = [
            Shown(first.images.caption(int(first.index[place])), show.row(sides, place))
            for place in range(min(SAMPLES, len(first.index)))
        ]
        yield Gallery(_title("Samples", sides, groups), tuple(name for name, _ in sides), "", tuple(rows))


def prompts(groups: Sequence[Named], show: Show) -> Iterator[Gallery]:
    """Which images follow their prompts best and worst, by the mean CLIP score of the sides in a group."""
    for sides in filter(None, groups):
        if any(one.seen.texts is None for _, one in sides):
            continue
        each = torch.stack([scores("clip-score", one.seen) for _, one in sides])
        order = each.mean(dim=0).argsort(stable=True).tolist()
        for title, places in (
            ("Best by CLIP score", order[::-1][:EXTREMES]),
            ("Worst by CLIP score", order[:EXTREMES]),
        ):
            rows = [
                Shown(sides[0][1].seen.captions[place], show.row(sides, place), tuple(each[:, place].tolist()))
                for place in places
            ]
            names = tuple(name for name, _ in sides)
            yield Gallery(_title(title, sides, groups), names, "CLIP score", tuple(rows))


def _title(text: str, sides: Named, groups: Sequence[Named]) -> str:
    return text if len(groups) == 1 else f"{text}, {sides[0][0]}"


def copies(
    sides: Sequence[tuple[str, tuple[Looked, Tensor | None]]], training: Looked | None, show: Show
) -> Iterator[Gallery]:
    """The images of each side that are nearest to training images, beside these."""
    for name, (looked, closest) in sides:
        if closest is None or training is None or looked.seen.apart is None:
            continue
        rows = []
        for place in looked.seen.apart.argsort(stable=True)[:EXTREMES].tolist():
            number = int(closest[place])
            images = (
                show(looked.images, int(looked.index[place]), name.lower()),
                show(training.images, number, "training"),
            )
            rows.append(Shown(training.images.key(number), images, (float(looked.seen.apart[place]),)))
        yield Gallery(f"Images of {name} nearest to training images", (name, "training"), "distance", tuple(rows))


def reconstructions(sides: Sequence[tuple[str, tuple[Looked, Looked]]], show: Show) -> Iterator[Gallery]:
    """The images that an autoencoder keeps worst."""
    for name, (looked, originals) in sides:
        measured = next((key for key in ("psnr", "ssim", "lpips") if key in looked.seen.values), None)
        if measured is None:
            continue
        values = looked.seen.values[measured]
        order = values.argsort(stable=True, descending=measured == "lpips")[:EXTREMES].tolist()
        rows = [
            Shown(
                originals.images.caption(place),
                (
                    show(looked.images, place, f"{name.lower()}-reconstructed"),
                    show(originals.images, place, f"{name.lower()}-original"),
                ),
                (float(values[place]),),
            )
            for place in order
        ]
        yield Gallery(f"Worst reconstructions of {name}", (name, "original"), measured.upper(), tuple(rows))


def histograms(
    looked: Sequence[Looked], rebuilt: Sequence[Looked], reference: Looked | None, names: Sequence[str]
) -> Iterator[Histogram]:
    """How values of single images are distributed."""
    named = list(zip(names, looked, strict=False))
    if looked and all(one.seen.texts is not None for one in looked):
        yield _histogram("CLIP score", {name: scores("clip-score", one.seen) for name, one in named})
    apart = {name: one.seen.apart for name, one in [*named, ("reference", reference)] if one is not None}
    if any(values is not None for values in apart.values()):
        found = {name: values for name, values in apart.items() if values is not None}
        yield _histogram("Distance to the nearest training image", found)
    for key, title in (("psnr", "PSNR (dB)"), ("ssim", "SSIM"), ("lpips", "LPIPS")):
        values = {
            name: one.seen.values[key] for name, one in zip(names, rebuilt, strict=False) if key in one.seen.values
        }
        if values:
            yield _histogram(title, values)


def _histogram(title: str, values: dict[str, Tensor]) -> Histogram:
    arrays = {name: found.double().cpu().numpy() for name, found in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), BINS)
    counts = [tuple(np.histogram(array, edges)[0].tolist()) for array in arrays.values()]
    return Histogram(title, tuple(edges.tolist()), tuple(arrays), tuple(counts))
