"""Images with their features, computed by the networks that the metrics need and kept in files.

N images, D features of an image
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath

import torch
from torch import Tensor

from ldm.data.skipped import HANDFUL, MOST
from ldm.errors import LdmError, listing
from ldm.evaluation.chunks import BATCH, PIXELS, ChunkValues, ImageValues, extract, in_chunks
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.distances import nearest, unit
from ldm.evaluation.metrics.table import Features, Metric
from ldm.evaluation.networks.extractors import Extractor, TextExtractor, open_extractor, open_text_extractor
from ldm.evaluation.networks.lpips import LPIPS, load_lpips, lpips_path
from ldm.evaluation.report import UsedNetwork
from ldm.evaluation.workspace import Workspace
from ldm.files import file_digest
from ldm.images import to_tensor


@dataclass(frozen=True)
class MeasuredImages:
    """A set of images with its features."""

    images: Images
    features: Features
    index: Tensor  # (N,): numbers of the images that can be read
    digest: str = ""  # of the images' pixels; empty if no network read them
    pixels: Tensor | None = None  # (N,): hashes of the images' pixels
    nearest: Tensor | None = None  # (N,): numbers of the nearest training images

    def take(self, places: Tensor) -> MeasuredImages:
        """The images at these places (K,), in this order."""
        if torch.equal(places, torch.arange(len(self.index))):
            return self  # mapped values are not copied to memory
        pixels, closest = (None if values is None else values[places] for values in (self.pixels, self.nearest))
        return replace(
            self, features=self.features.take(places), index=self.index[places], pixels=pixels, nearest=closest
        )

    def prompts(self) -> Iterator[tuple[str, str, int]]:
        """The name and the caption of each image, and how many images before it have the same two."""
        before: Counter[tuple[str, str]] = Counter()
        for number in self.index.tolist():
            prompt = PurePath(self.images.key(number)).stem, self.images.caption(number)
            yield *prompt, before[prompt]
            before[prompt] += 1


class Networks:
    """The networks that metrics need, by `Metric.network`."""

    def __init__(self, metrics: Mapping[str, Metric], specs: Mapping[str, str | None], device: str) -> None:
        """Args:
            metrics: metrics by name.
            specs: by `Metric.network`, the name of a network for `open_extractor`, or of LPIPS's backbone or file.
            device: of the networks.

        Raises:
            LdmError: weights are missing or damaged, or a network does not give what a metric needs.
        """
        self.metrics, self.device = metrics, device
        self.opened: dict[str, Extractor] = {}
        self.text_extractor: TextExtractor | None = None
        self.lpips: LPIPS | None = None
        self.used: dict[str, UsedNetwork] = {}
        for role in sorted({one.network for one in metrics.values()} - {""}):
            if role == "lpips":
                path = lpips_path(str(specs[role]))
                self.lpips = load_lpips(path, device)
                name = f"LPIPS ({self.lpips.backbone})"
                self.used[role] = UsedNetwork(name, file_digest(path), "as they are, [-1, 1]")
                continue
            network: Extractor
            if role == "clip":
                network = self.text_extractor = open_text_extractor(str(specs[role]), device)
            else:
                network = open_extractor(str(specs[role]), device)
            self.opened[role] = network
            self.used[role] = UsedNetwork(network.name, network.digest, network.preparation)
        for name, one in metrics.items():
            if one.network in self.opened and one.output not in (network := self.opened[one.network]).gives:
                raise LdmError(
                    f"{name} needs {one.output}, and {network.name} gives {listing(sorted(network.gives))}; "
                    "name another network, or leave the metric out"
                )

    def measure(
        self, images: Images, what: str, metrics: Iterable[str], work: Workspace, captions: bool = False
    ) -> tuple[MeasuredImages, list[str]]:
        """Images with the features that some metrics need, and notes about images that cannot be read.

        Args:
            images: to compute the features of.
            what: description of the images, for progress and errors.
            metrics: names of the metrics.
            work: its folder holds the features.
            captions: whether features of the captions are needed.

        Raises:
            LdmError: more than 5 % of the images cannot be read, or captions are needed and missing.
        """
        roles = {self.metrics[name].network for name in metrics}
        found = {role: self._values(role, images, what, work) for role in self.opened if role in roles}
        first = next(iter(found.values()), None)
        index = torch.arange(len(images)) if first is None else first.index
        notes = _skipped(what, first.skipped, len(images)) if first is not None and first.skipped else []
        texts = [images.caption(number) for number in index.tolist()] if captions else []
        if not all(texts):
            raise LdmError(
                f"{what}: {images.key(int(index[texts.index('')]))} has no caption, which metrics of prompts need; "
                "write captions beside the images (a.txt or metadata.jsonl), or leave these metrics out"
            )
        outputs = {role: values.values for role, values in found.items()}
        features = Features(outputs, texts, self._texts(texts) if texts and "clip" in found else None)
        digest, pixels = ("", None) if first is None else (first.digest, first.pixels)
        return MeasuredImages(images, features, index, digest, pixels), notes

    def _values(self, role: str, images: Images, what: str, work: Workspace) -> ImageValues:
        network = self.opened[role]
        wanted = sorted({one.output for one in self.metrics.values() if one.network == role})

        def outputs(inputs: Tensor) -> dict[str, Tensor]:
            given = network(inputs)
            return {name: given[name] for name in wanted}

        name = f"{role}-{digest_of(images.stamp, network.digest, network.preparation, wanted, PIXELS)}"
        compute = partial(extract, read=images.read, prepare=network.prepare, network=outputs)
        return in_chunks(f"{network.name}: {what}", name, len(images), compute, work)

    def _texts(self, captions: Sequence[str]) -> Tensor:
        """Features of captions (N, D); equal captions are encoded once."""
        assert self.text_extractor is not None
        place = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        different = list(place)
        batches = [different[start : start + BATCH] for start in range(0, len(different), BATCH)]
        encoded = torch.cat([self.text_extractor.texts(batch) for batch in batches])
        return encoded[[place[caption] for caption in captions]]

    def pairs(self, images: Images, originals: Images, what: str, work: Workspace) -> dict[str, Tensor]:
        """The values (N,) of PSNR, SSIM, LPIPS and the like for each image and its original, by metric."""
        wanted = [name for name, one in self.metrics.items() if one.output == "pairs"]
        if not wanted:
            return {}

        @torch.inference_mode()
        def compute(numbers: range) -> ChunkValues:
            values: dict[str, list[Tensor]] = {name: [] for name in wanted}
            for number in numbers:
                (_, image), (_, original) = images.read(number), originals.read(number)
                x, y = (to_tensor([one], *one.size).to(self.device) for one in (image, original))
                for name in wanted:
                    values[name].append(self._pair(name)(x, y).float().cpu())
            return ChunkValues({name: torch.cat(parts) for name, parts in values.items()}, list(numbers), "", {})

        used = self.used["lpips"].digest if self.lpips else ""
        name = f"pairs-{digest_of(images.stamp, originals.stamp, wanted, used)}"
        return in_chunks(f"comparing {what}", name, len(images), compute, work).values

    def _pair(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        function = self.metrics[name].pair or self.lpips
        assert function is not None
        return function


def in_pairs(a: MeasuredImages, b: MeasuredImages) -> tuple[MeasuredImages, MeasuredImages] | None:
    """The images of the same prompts in both sets, in the same order; None if the sets are not of the same prompts.

    Either set may lack a few images, such as images that cannot be read.
    """
    of_b = {prompt: place for place, prompt in enumerate(b.prompts())}
    pairs = [(place, of_b[prompt]) for place, prompt in enumerate(a.prompts()) if prompt in of_b]
    larger = max(len(a.images), len(b.images))
    if len(pairs) < 2 or larger - len(pairs) > max(MOST * larger, min(HANDFUL - 1, larger // 2)):
        return None
    places = torch.tensor(pairs)
    return a.take(places[:, 0]), b.take(places[:, 1])


def with_nearest(measured: MeasuredImages, training: MeasuredImages) -> MeasuredImages:
    """The images with their nearest training images, and the distances to these."""
    own, others = (unit(one.features.outputs["copies"]["features"]) for one in (measured, training))
    distances, closest = nearest(own, others)
    return replace(
        measured, features=replace(measured.features, training_distances=distances), nearest=training.index[closest]
    )


def _skipped(what: str, skipped: Mapping[str, str], count: int) -> list[str]:
    """A note about images that cannot be read. Raises LdmError if there are too many."""
    reasons = list(skipped.values())
    text = f"{what}: {len(reasons)} of {count} images cannot be read: {listing(reasons, 3)}"
    if len(reasons) >= HANDFUL and len(reasons) > MOST * count:
        raise LdmError(f"{text}; mend or remove them")
    return [text]


def digest_of(*facts: object) -> str:
    """A short digest of facts."""
    return hashlib.sha256(ascii(facts).encode()).hexdigest()[:20]
