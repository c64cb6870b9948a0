"""Measure style and concept of images by a contrastive pair, for seen and held-out (concept, style) combinations.

    python tools/measure_styles.py emoji --clip clip:emoji --data emoji [--refiner MODEL] [--steps 20] [--guidance 3]

For each held-out drawing, and for as many training drawings, an image is made from its caption. "Style": the image is
nearer to its caption than to the same caption with another style's name. "Concept": it is nearer to its caption than to
the captions of 99 other concepts in that style (R-precision). The same numbers for the drawings themselves show the
pair's own accuracy. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.metrics.intervals import share_interval
from ldm.evaluation.networks.extractors import Extractor, TextExtractor, open_text_extractor
from pipelines import Pipeline

OTHERS = 99  # number of other concepts with which each image is compared
BATCH = 16


@dataclass(frozen=True)
class Drawing:
    """A drawing of the data set."""

    label: str
    style: str
    image: Image.Image


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clip", default="clip:emoji")
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py wrote")
    parser.add_argument("--refiner")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--scheduler")
    parser.add_argument("--most", type=int, help="largest number of drawings of each kind")
    options = parser.parse_args()
    try:
        judge = open_text_extractor(options.clip)
        pipeline = Pipeline(options.model, refiner=options.refiner)
        names = ("steps", "guidance", "scheduler")
        settings = {name: value for name in names if (value := getattr(options, name)) is not None}
        measure(pipeline, judge, options.data, settings, options.most)
    except LdmError as error:
        raise SystemExit(f"measure_styles: {error}") from None


def measure(
    pipeline: Pipeline, judge: TextExtractor, data: Path, settings: dict[str, Any], most: int | None = None
) -> None:
    """Make the images, compare them by the pair and print the table."""
    held_out, seen = drawings(data, "held-out"), drawings(data, "train")
    random.Random(0).shuffle(seen)
    random.Random(0).shuffle(held_out)
    labels, styles = sorted({d.label for d in seen}), sorted({d.style for d in seen})
    table = Table("combinations", "images", "style, %", "concept of 100, %", title=f"{len(styles)} styles")
    for name, some in (("held out", held_out[:most]), ("seen", seen[: len(held_out)][:most])):
        made = images_of(pipeline, [caption(d.label, d.style) for d in some], settings, name)
        for kind, images in (("drawn", [d.image for d in some]), ("made", made)):
            features = features_of(judge, images)
            right = [style_is_right(judge, f, d, styles) for f, d in zip(features, some, strict=True)]
            found = [concept_is_right(judge, f, d, labels) for f, d in zip(features, some, strict=True)]
            table.add_row(f"{name}, {kind}", str(len(some)), percent(right), percent(found))
    Console().print(table)


def images_of(pipeline: Pipeline, prompts: Sequence[str], settings: Mapping[str, Any], name: str) -> list[Image.Image]:
    """An image for each prompt, seed i for prompt i, with a bar of progress of that name."""
    made: list[Image.Image] = []
    for start in track(range(0, len(prompts), BATCH), name, console=Console(stderr=True)):
        some = list(prompts[start : start + BATCH])
        made += pipeline(some, seed=list(range(start, start + len(some))), batch=BATCH, **settings).images
    return made


def drawings(data: Path, part: str) -> list[Drawing]:
    """The drawings in the shards `part`-*.tar.

    Raises:
        LdmError: there are no such shards.
    """
    found = []
    for path in sorted(data.glob(f"{part}-*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            for name, file in files.items():
                drawn = files.get(name.removesuffix(".json") + ".png")
                if file and drawn and name.endswith(".json"):
                    about = json.load(file)
                    image = Image.open(io.BytesIO(drawn.read())).convert("RGB")
                    found.append(Drawing(about["label"], about["style"], image))
    if not found:
        raise LdmError(f"{data} holds no {part}-*.tar; tools/prepare_emoji.py makes them")
    return found


def caption(label: str, style: str) -> str:
    """The first caption that the data set has for a drawing."""
    return f"{label}, {style} style"


def style_is_right(judge: TextExtractor, features: Tensor, drawing: Drawing, styles: Sequence[str]) -> bool:
    """Whether an image (D,) is nearest to its own style's caption."""
    texts = judge.texts([caption(drawing.label, style) for style in styles])
    return styles[int((texts @ features).argmax())] == drawing.style


def concept_is_right(judge: TextExtractor, features: Tensor, drawing: Drawing, labels: Sequence[str]) -> bool:
    """Whether an image (D,) is nearer to its own caption than to the captions of a fixed choice of other concepts."""
    others = [label for label in labels if label != drawing.label]
    chosen = [drawing.label, *random.Random(drawing.label).sample(others, OTHERS)]
    texts = judge.texts([caption(label, drawing.style) for label in chosen])
    return int((texts @ features).argmax()) == 0


@torch.no_grad()
def features_of(network: Extractor, images: Sequence[Image.Image]) -> Tensor:
    """The features (N, D) of images."""
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return torch.cat([network(torch.stack([network.prepare(image) for image in part]))["features"] for part in parts])


def percent(hits: Sequence[bool]) -> str:
    """The share of hits in percent, with its interval."""
    share = share_interval(torch.tensor(hits))
    return f"{100 * share.value:.0f} [{100 * (share.low or 0):.0f}, {100 * (share.high or 0):.0f}]"


if __name__ == "__main__":
    main()
