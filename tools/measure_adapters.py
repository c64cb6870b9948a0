r"""Measure what adapters of the built-in model do: style, concept, edges and likeness of images of a folder's captions.

    python tools/measure_adapters.py contrast/held-out -n 200 --drawings emoji \
        --with "base" --with "LoRA: adapters=runs/contrast/adapter/adapter.safetensors" \
        --with "all weights: model=runs/all/base/model" --with "edges: control_models=CONTROL drawing=canny"

The folder (or its held-out shards) and the shards of other styles are by tools/prepare_emoji.py. An image is made from
each caption `LABEL, STYLE style`, or from `prompt="…LABEL…"`. `drawing=KIND` gives the caption's drawing to a control
model as a condition image, `drawing=image_prompt` to an IP-Adapter. Other KEY=VALUE are settings of the pipeline.

- Style: of the means of each style's features by Inception, that of the folder's style is nearest. The drawings of the
  folder are split: one half for the mean and for KID, the other for the prompts and the row "drawn".
- Concept: of 100 labels, the right one is nearest by the contrastive pair. A label's features are the mean of those
  of its captions in the pair's own styles, so that none speaks of a style. Of a style that the pair never saw it knows
  little (see the row "drawn"): so also whether, of all drawings of the prompts, that of the right concept is nearest by
  Inception, which compares within one style.
- Edges: F1 of the edges (Canny) of drawing and image, within one pixel. Likeness: the cosine of their features by the
  pair. Change: the mean absolute difference, of 255, of an image and that of the first `--with` with the same seed.

Intervals are of 95 %: Wilson's for shares, Student's for means, and KID's as in `ldm eval`.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from measure_styles import OTHERS, Drawing, caption, drawings, features_of
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ldm.conditions.filters import canny
from ldm.errors import LdmError
from ldm.evaluation.metrics.distances import polynomial, unit
from ldm.evaluation.metrics.intervals import Estimate, mean_interval, mmd_interval, share_interval
from ldm.evaluation.networks.extractors import Extractor, TextExtractor, open_extractor, open_text_extractor
from pipelines import Pipeline

LOADED = ("adapters", "embeddings", "control_models", "ip_adapter", "image_encoder")  # settings of the pipeline
CAPTION = re.compile(r"(.+), (.+) style")


@dataclass(frozen=True)
class Variant:
    """A way of making the images."""

    name: str
    model: str
    prompt: str
    drawing: str  # what a caption's drawing is given as; "" for nothing
    loaded: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """Networks, and what they make of the drawings. S styles, D and E features."""

    inception: Extractor
    pair: TextExtractor
    styles: list[str]
    means: Tensor  # (S, D), of unit length
    reference: Tensor  # (M, D): of the folder's drawings
    labels: list[str]
    texts: Tensor  # (labels, E)


@dataclass(frozen=True)
class Seen:
    """The features of N images."""

    plain: Tensor  # (N, D), by Inception
    inception: Tensor  # (N, D), of unit length
    pair: Tensor  # (N, E), of unit length


def variant(text: str, model: str) -> Variant:
    """The variant of `NAME: KEY=VALUE …`."""
    name, _, rest = text.partition(":")
    given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in shlex.split(rest))}
    own = {key: given.pop(key) for key in LOADED if key in given}
    prompt, drawing = given.pop("prompt", "LABEL, STYLE style"), given.pop("drawing", "")
    return Variant(name, given.pop("model", model), prompt, drawing, own, given)


def folder_drawings(folder: Path) -> list[Drawing]:
    """The drawings in a folder with captions `LABEL, STYLE style` beside them, or in its held-out shards.

    Raises:
        LdmError: a caption is another one, or there is none.
    """
    if any(folder.glob("held-out-*.tar")):
        return drawings(folder, "held-out")
    found = []
    for path in sorted(folder.glob("*.txt")):
        match = CAPTION.fullmatch(path.read_text(encoding="utf-8").strip())
        if not match:
            raise LdmError(f"{path} does not say LABEL, STYLE style; tools/prepare_emoji.py --few makes such folders")
        found.append(Drawing(match[1], match[2], Image.open(path.with_suffix(".png")).convert("RGB")))
    if not found:
        raise LdmError(f"{folder} holds no captions; tools/prepare_emoji.py --few makes such folders")
    return found


def look(judge: Judge, images: Sequence[Image.Image]) -> Seen:
    """The features of images."""
    plain = features_of(judge.inception, images)
    return Seen(plain, unit(plain), unit(features_of(judge.pair, images)))


def judge(inception: str, clip: str, every: Sequence[Drawing], half: int, others: Sequence[Drawing]) -> Judge:
    """The networks, with the features of drawings of the other styles and of one half of the folder's."""
    network, pair, mine = open_extractor(inception), open_text_extractor(clip), every[half:]
    chosen = {style: [d for d in others if d.style == style] for style in sorted({d.style for d in others})}
    own = {style: features_of(network, [d.image for d in some]) for style, some in chosen.items()}
    for style in sorted({d.style for d in mine}):
        own[style] = features_of(network, [d.image for d in mine if d.style == style])
    reference = torch.cat([own[style] for style in sorted({d.style for d in mine})])
    known = [style for style in chosen if style not in {d.style for d in mine}] or list(chosen)
    labels = sorted({d.label for d in (*every, *others)})
    texts = torch.stack([unit(pair.texts([caption(label, style) for label in labels])) for style in known]).mean(0)
    means = torch.stack([unit(some).mean(0) for some in own.values()])
    return Judge(network, pair, list(own), unit(means), reference, labels, texts)


def made(one: Variant, some: Sequence[Drawing]) -> list[Image.Image]:
    """The images of a variant, with the seeds 0, 1, ….

    Raises:
        LdmError: as the pipeline.
    """
    pipeline = Pipeline(one.model, **one.loaded)
    images = []
    for seed, drawn in enumerate(track(some, one.name, console=Console(stderr=True))):
        given: dict[str, Any] = {}
        if one.drawing:
            given = (
                {"image_prompt": drawn.image}
                if one.drawing == "image_prompt"
                else {"control": {one.drawing: drawn.image}}
            )
        prompt = one.prompt.replace("LABEL", drawn.label).replace("STYLE", drawn.style)
        images += pipeline(prompt, seed=seed, **given, **one.settings).images
    return images


def edges_agree(drawn: Image.Image, image: Image.Image) -> float:
    """F1 of the edges of two images, each within one pixel of the other's; 0 if one has none."""
    a, b = (np.asarray(canny(one.convert("RGB")))[..., 0] > 0 for one in (drawn, image.resize(drawn.size)))
    near_a, near_b = (cv2.dilate(one.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for one in (a, b))
    if not a.any() or not b.any():
        return 0.0
    precision, recall = float(near_a[b].mean()), float(near_b[a].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def change(image: Image.Image, first: Image.Image) -> float:
    """The mean absolute difference of two images, of 255."""
    return float(np.abs(np.asarray(image, float) - np.asarray(first.resize(image.size), float)).mean())


def row(
    judge: Judge,
    some: Sequence[Drawing],
    drawn: Seen,
    images: Sequence[Image.Image] | None,
    first: Sequence[Image.Image] = (),
) -> list[str]:
    """The figures of images of drawings' captions, `first` those of the first row; None: of the drawings themselves."""
    seen = drawn if images is None else look(judge, images)
    nearest = (seen.inception @ judge.means.T).argmax(1)
    style = [judge.styles[int(place)] == d.style for place, d in zip(nearest, some, strict=True)]
    hits = [concept_is_right(judge, one, d.label) for one, d in zip(seen.pair, some, strict=True)]
    found = (seen.inception @ drawn.inception.T).argmax(1) == torch.arange(len(some))
    figures = [_shown(share_interval(torch.as_tensor(one)), 100, 0) for one in (style, hits, found)]
    figures.append(_shown(mmd_interval(polynomial, seen.plain, judge.reference), 1, 4))
    if images is None:
        return [*figures[:2], "", figures[3], "", "", ""]
    edges = [edges_agree(d.image, image) for d, image in zip(some, images, strict=True)]
    likeness = (seen.pair * drawn.pair).sum(1)
    changes = torch.tensor([change(image, other) for image, other in zip(images, first, strict=True)])
    means = ((torch.tensor(edges), 2), (likeness, 2), (changes, 1))
    return [*figures, *(_shown(mean_interval(values), 1, digits) for values, digits in means)]


def concept_is_right(judge: Judge, image: Tensor, label: str) -> bool:
    """Whether an image (E,) is nearer to its label than to a fixed choice of other labels."""
    others = [number for number, other in enumerate(judge.labels) if other != label]
    chosen = [judge.labels.index(label), *random.Random(label).sample(others, OTHERS)]
    return int((judge.texts[chosen] @ image).argmax()) == 0


def _shown(estimate: Estimate, factor: int, digits: int) -> str:
    value = estimate.value if estimate.corrected is None else estimate.corrected
    low, high = (factor * (end if end is not None else float("nan")) for end in (estimate.low, estimate.high))
    return f"{factor * value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Print the table, and keep the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="drawings that were not trained on")
    parser.add_argument("--drawings", type=Path, required=True, help="shards of drawings in the model's own styles")
    parser.add_argument("--styles", help="comma-separated styles of these shards to tell apart; default: all")
    parser.add_argument("--with", dest="variants", action="append", required=True, help="NAME: KEY=VALUE …")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("-n", type=int, default=200, help="images")
    parser.add_argument("--features", default="inception")
    parser.add_argument("--clip", default="clip:emoji")
    parser.add_argument("--out", type=Path, help="folder for the images")
    options = parser.parse_args()
    try:
        variants = [variant(text, options.model) for text in options.variants]
        every = folder_drawings(options.folder)
        random.Random(0).shuffle(every)
        half = len(every) // 2
        styles = options.styles and {name.strip() for name in options.styles.split(",")}
        others = [d for d in drawings(options.drawings, "held-out") if not styles or d.style in styles]
        judged = judge(options.features, options.clip, every, half, others)
        some = every[:half][: options.n]
        table = Table(
            "",
            "style, %",
            "concept of 100, %",
            f"drawing of {len(some)}, %",
            "KID",
            "edges, F1",
            "likeness",
            "change",
            title=f"{len(some)} images",
        )
        drawn = look(judged, [d.image for d in some])
        table.add_row("drawn", *row(judged, some, drawn, None))
        first: list[Image.Image] = []
        for one in variants:
            images = made(one, some)
            first = first or images
            table.add_row(one.name, *row(judged, some, drawn, images, first))
            if options.out:
                folder = options.out / one.name.replace(" ", "-")
                folder.mkdir(parents=True, exist_ok=True)
                for number, image in enumerate(images):
                    image.save(folder / f"{number:04d}.png")
        Console(width=180).print(table)
    except LdmError as error:
        raise SystemExit(f"measure_adapters: {error}") from None


if __name__ == "__main__":
    main()
