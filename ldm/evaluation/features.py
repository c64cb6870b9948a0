"""What the networks find in a set of images and its captions, from files where it was found before.

N images, D features of an image
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath

import torch
from torch import Tensor

from ldm.data.skipped import HANDFUL, MOST
from ldm.errors import LdmError, listing
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.distances import nearest, unit
from ldm.evaluation.metrics.reconstruction import psnr, ssim
from ldm.evaluation.metrics.table import Metric, Seen
from ldm.evaluation.networks.extractors import Extractor, TextExtractor, open_extractor, open_text_extractor
from ldm.evaluation.networks.lpips import LPIPS, load_lpips, lpips_path
from ldm.evaluation.report import Used
from ldm.evaluation.stored import BATCH, PIXELS, Found, Rows, Workspace, in_chunks, look
from ldm.files import file_digest
from ldm.images import to_tensor

MOST_DB = 100.0  # PSNR of images that are equal, for which it is infinite


@dataclass(frozen=True)
class Looked:
    """A set of images and what was found in it."""

    images: Images
    seen: Seen
    index: Tensor  # (N,): those that could be read
    digest: str = ""  # of their pixels; nothing if nobody had to look
    pixels: Tensor | None = None  # (N,): numbers that are the same for the same pixels

    def take(self, places: Tensor) -> Looked:
        """The same, of the images at these places alone, in this order."""
        if torch.equal(places, torch.arange(len(self.index))):
            return self  # and nothing that is mapped is copied to memory
        pixels = None if self.pixels is None else self.pixels[places]
        return replace(self, seen=self.seen.take(places), index=self.index[places], pixels=pixels)

    def prompts(self) -> Iterator[tuple[str, str, int]]:
        """What each image is of, as far as its name and its caption tell, and how many before it are of the same."""
        before: Counter[tuple[str, str]] = Counter()
        for number in self.index.tolist():
            prompt = PurePath(self.images.key(number)).stem, self.images.caption(number)
            yield *prompt, before[prompt]
            before[prompt] += 1


class Networks:
    """What looks at images, for the metrics that are asked for."""

    def __init__(self, metrics: Mapping[str, Metric], specs: Mapping[str, str | None], device: str) -> None:
        """Args:
            metrics: by name.
            specs: by `Metric.network`, what `open_extractor` opens, or LPIPS's file.
            device: where they run.

        Raises:
            LdmError: weights are missing or damaged, or a network does not give what a metric needs.
        """
        self.metrics, self.device = metrics, device
        self.opened: dict[str, Extractor] = {}
        self.reader: TextExtractor | None = None  # of captions
        self.lpips: LPIPS | None = None
        self.used: dict[str, Used] = {}
        for role in sorted({one.network for one in metrics.values()} - {""}):
            if role == "lpips":
                path = lpips_path(str(specs[role]))
                self.lpips = load_lpips(path, device)
                self.used[role] = Used(f"LPIPS ({self.lpips.backbone})", file_digest(path), "as they are, [-1, 1]")
                continue
            network: Extractor
            if role == "clip":
                network = self.reader = open_text_extractor(str(specs[role]), device)
            else:
                network = open_extractor(str(specs[role]), device)
            self.opened[role] = network
            self.used[role] = Used(network.name, network.digest, network.preparation)
        for name, one in metrics.items():
            if one.network in self.opened and one.gives not in (network := self.opened[one.network]).gives:
                raise LdmError(
                    f"{name} needs {one.gives}, and {network.name} gives {listing(sorted(network.gives))}; "
                    "name another network, or leave the metric out"
                )

    def look(
        self, images: Images, what: str, roles: Iterable[str], work: Workspace, captions: bool = False
    ) -> tuple[Looked, list[str]]:
        """What the networks of some roles find in images, and notes about those that cannot be read.

        Raises:
            LdmError: more than 5 % of them cannot be read, or captions are asked for and missing.
        """
        found = {role: self._rows(role, images, what, work) for role in roles}
        first = next(iter(found.values()), None)
        index = torch.arange(len(images)) if first is None else first.index
        notes = _skipped(what, first.skipped, len(images)) if first is not None and first.skipped else []
        texts = [images.caption(number) for number in index.tolist()] if captions else []
        if not all(texts):
            raise LdmError(
                f"{what}: {images.key(int(index[texts.index('')]))} has no caption, which metrics of prompts need; "
                "write captions beside the images (a.txt or metadata.jsonl), or leave these metrics out"
            )
        seen = Seen(
            features=found["features"].values if "features" in found else {},
            clip=found["clip"].values["features"] if "clip" in found else None,
            texts=self.texts(texts) if texts and "clip" in found else None,
            captions=texts,
            copies=unit(found["copies"].values["features"]) if "copies" in found else None,
        )
        pixels = None if first is None else first.pixels
        return Looked(images, seen, index, first.digest if first else "", pixels), notes

    def _rows(self, role: str, images: Images, what: str, work: Workspace) -> Rows:
        network = self.opened[role]
        wanted = sorted({one.gives for one in self.metrics.values() if one.network == role})

        def see(inputs: Tensor) -> dict[str, Tensor]:
            given = network(inputs)
            return {name: given[name] for name in wanted}

        name = f"{role}-{digest_of(images.stamp, network.digest, network.preparation, wanted, PIXELS)}"
        find = partial(look, read=images.read, prepare=network.prepare, see=see)
        return in_chunks(f"{network.name}: {what}", name, len(images), find, work)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions (N, D); each different one is encoded once."""
        assert self.reader is not None
        place = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        different = list(place)
        encoded = [self.reader.texts(different[start : start + BATCH]) for start in range(0, len(different), BATCH)]
        return torch.cat(encoded)[[place[caption] for caption in captions]]

    def compare(self, made: Images, originals: Images, what: str, work: Workspace) -> dict[str, Tensor]:
        """PSNR, SSIM and LPIPS, as far as they are asked for, of each image (N,) beside its original."""
        wanted = [name for name in ("psnr", "ssim", "lpips") if name in self.metrics]
        if not wanted:
            return {}

        def find(numbers: range) -> Found:
            values: dict[str, list[Tensor]] = {name: [] for name in wanted}
            for number in numbers:
                (_, result), (_, original) = made.read(number), originals.read(number)
                x, y = (to_tensor([image], *image.size).to(self.device) for image in (result, original))
                for name in wanted:
                    values[name].append(self._pair(name, x, y).float().cpu())
            return Found({name: torch.cat(parts) for name, parts in values.items()}, list(numbers), "", {})

        used = self.used["lpips"].digest if "lpips" in wanted else ""
        name = f"pairs-{digest_of(made.stamp, originals.stamp, wanted, used)}"
        return in_chunks(f"comparing {what}", name, len(made), find, work).values

    @torch.inference_mode()
    def _pair(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if name == "psnr":
            return psnr(x, y).clamp(max=MOST_DB)
        if name == "ssim":
            return ssim(x, y)
        assert self.lpips is not None
        return self.lpips(x, y)


def in_pairs(a: Looked, b: Looked) -> tuple[Looked, Looked] | None:
    """The images that both sets have, in the same order; None if they are not of the same prompts.

    A few may be missing from either, as images that cannot be read are.
    """
    of_b = {prompt: place for place, prompt in enumerate(b.prompts())}
    pairs = [(place, of_b[prompt]) for place, prompt in enumerate(a.prompts()) if prompt in of_b]
    larger = max(len(a.images), len(b.images))
    if len(pairs) < 2 or larger - len(pairs) > max(MOST * larger, min(HANDFUL - 1, larger // 2)):
        return None
    places = torch.tensor(pairs)
    return a.take(places[:, 0]), b.take(places[:, 1])


def neighbours(looked: Looked, training: Looked) -> tuple[Looked, Tensor]:
    """The images with their distances to the nearest training images, and which these are (N,)."""
    assert looked.seen.copies is not None
    assert training.seen.copies is not None
    apart, closest = nearest(looked.seen.copies, training.seen.copies)
    return replace(looked, seen=replace(looked.seen, apart=apart)), training.index[closest]


def _skipped(what: str, skipped: Mapping[str, str], count: int) -> list[str]:
    reasons = list(skipped.values())
    text = f"{what}: {len(reasons)} of {count} images cannot be read: {listing(reasons, 3)}"
    if len(reasons) >= HANDFUL and len(reasons) > MOST * count:
        raise LdmError(f"{text}; mend or remove them")
    return [text]


def digest_of(*facts: object) -> str:
    """A short name for facts, as long as they stay the same."""
    return hashlib.sha256(ascii(facts).encode()).hexdigest()[:20]
