"""The images of a side or of the reference: some images of a source, in an order, with their captions.

Images that a model makes are written as PNG files first, so that all features are of images in 8 bits, and a stopped
evaluation can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from ldm.data.image_set import ImageSet, made
from ldm.data.keyed import uniform
from ldm.data.sources import open_images
from ldm.errors import LdmError
from ldm.evaluation.workspace import Workspace
from ldm.files import replacing
from ldm.images import save_png

Make = Callable[[range], list[Image.Image]]  # numbers -> the images with these numbers


@dataclass(frozen=True)
class Images:
    """Some images of a source, in an order that does not depend on how the source is stored."""

    source: ImageSet
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        name = self.source.source.name
        return name if len(self) == len(self.source) else f"{len(self)} of {name}"

    def key(self, number: int) -> str:
        """The name of an image."""
        return self.source.key(self.rows[number])

    def caption(self, number: int) -> str:
        """The first caption of an image, or an empty text."""
        return next(iter(self.source.example(self.rows[number]).captions), "")

    def read(self, number: int) -> tuple[str, Image.Image]:
        """The name of an image, and the image in RGB. Raises LdmError if it is damaged."""
        try:
            return self.key(number), self.source.read(self.rows[number])
        except LdmError as error:
            raise LdmError(f"{self.key(number)}: {error}") from None

    def shuffled(self, seed: int) -> Images:
        """The images in an order that depends on the seed and their names alone."""
        return Images(
            self.source, tuple(sorted(self.rows, key=lambda row: uniform(seed, "evaluation", self.source.key(row))))
        )

    @cached_property
    def stamp(self) -> str:
        """A digest of the files' names, sizes and times of modification."""
        stamps, digest = self.source.all_stamps(), hashlib.sha256()
        for row in self.rows:
            digest.update(ascii((self.source.key(row), stamps[row])).encode())
        return digest.hexdigest()


def images_of(source: str | Path, work: Workspace, count: int | None = None) -> Images:
    """Images of a folder, shards or a dataset (`ldm.data.sources`); captions are not needed.

    Args:
        source: folder, shards or dataset.
        work: its folder holds the index.
        count: number of images, the first by name; by default all.

    Raises:
        LdmError: there is no image, or fewer than `count`.
    """
    if not work.ranks.first:
        work.ranks.wait()
    images = open_images(str(source), work.folder / "index", captions="optional")
    if work.ranks.first:
        work.ranks.wait()
    if count is not None and count > len(images):
        raise LdmError(f"{source} holds {len(images)} images, but {count} are asked for; ask for fewer")
    return Images(images, tuple(range(len(images) if count is None else count)))


def write_images(what: str, name: str, prompts: Sequence[str], make: Make, batch: int, work: Workspace) -> Images:
    """Write an image for each prompt, unless it exists: `000000.png` and so on, and `metadata.jsonl`.

    Batches do not depend on the processes and are always made whole, so that the images are always the same.

    Args:
        what: the name of the work, for its progress.
        name: name of the folder; it differs for different images.
        prompts: one for each image.
        make: makes the images with some numbers.
        batch: number of images made together.
        work: the folder, and the processes that share the batches.

    Raises:
        LdmError: a file cannot be written, or `make` raises it.
    """
    folder, ranks = made(work.folder / "images" / name), work.ranks
    batches = [range(start, min(start + batch, len(prompts))) for start in range(0, len(prompts), batch)]
    mine = batches[ranks.rank :: ranks.world]
    total = sum(map(len, mine))
    for done, numbers in enumerate(mine):
        work.tell(what, done * batch, total)
        targets = [folder / f"{number:06d}.png" for number in numbers]
        if not all(target.exists() for target in targets):
            for target, image in zip(targets, make(numbers), strict=True):
                save_png(image, target)
    work.tell(what, total, total)
    ranks.wait()
    if ranks.first:
        lines = [
            json.dumps({"file_name": f"{number:06d}.png", "text": prompt}, ensure_ascii=False)
            for number, prompt in enumerate(prompts)
        ]
        with replacing(folder / "metadata.jsonl", folder=False, overwrite=True, need=0) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    ranks.wait()
    return images_of(folder, work)
