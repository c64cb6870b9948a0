"""The images that a run trains on, with random access or as a stream, and whether they have changed."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from ldm.data.folder_rules import FolderRule, FolderRules
from ldm.data.framing import Framing
from ldm.data.given import Given
from ldm.data.image_set import ImageSet
from ldm.data.plan import split
from ldm.data.sources import open_images
from ldm.data.tags import Tags
from ldm.errors import LdmError
from ldm.files import read_json, replacing, write_json
from ldm.training.parallel.agreement import check_agreement
from ldm.training.sections import DataSection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingImages:
    """The images that a run trains on, with random access or as a stream."""

    section: DataSection
    folder: Path  # of indexes and caches
    images: ImageSet | None = None
    most: int | None = None  # training images in use: the first ones; None: all

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the training images and of the held-out ones; errors as in `split`."""
        assert self.images is not None
        training, held_out = split(self.images, self.section.holdout)
        return training[: self.most], held_out

    @cached_property
    def digest(self) -> str | None:
        """A digest that does not depend on the images' place; None for a stream.

        It is of names, captions and sizes, of repeats and weights that are not 1, and of images read beside these.
        """
        if self.images is None:
            return None
        digest = hashlib.sha256()
        for row in zip(self.images.all_keys(), self.images.all_captions(), *self.images.sizes(), strict=True):
            digest.update(ascii(row).encode())
        for name, numbers in (("repeats", self.images.repeats()), ("weights", self.images.weights())):
            if (numbers != 1).any():
                digest.update(ascii((name, numbers.tolist())).encode())
        for kind, beside in sorted(self.images.beside.items()):
            if isinstance(beside, Given):
                keys, sizes = beside.images.all_keys(), np.stack(beside.images.sizes(), axis=1)[beside.rows]
                digest.update(ascii((kind, [keys[row] for row in beside.rows], sizes.tolist())).encode())
        return digest.hexdigest()[:16]

    def files(self) -> dict[str, str]:
        """A digest of the images' files, and one of those of each kind beside them: of their stamps, as in caches."""
        assert self.images is not None
        given = {kind: one for kind, one in self.images.beside.items() if isinstance(one, Given)}
        stamps = {"image": self.images.all_stamps()}
        for kind, beside in given.items():
            own = beside.images.all_stamps()
            stamps[kind] = [own[row] for row in beside.rows]
        return {kind: hashlib.sha256(ascii(own).encode()).hexdigest()[:16] for kind, own in stamps.items()}

    def notice_changes(self) -> None:
        """Log the number of images, and whether they, or files beside them, have changed since the run began."""
        assert self.images is not None
        name = self.images.source.name
        log.info("%s: %d images", name, len(self.images))
        path, old = self.folder / "images.json", self.folder / "pictures.json"
        if old.exists():  # of a run that an earlier version began
            old.replace(path)
        now: dict[str, Any] = {"digest": self.digest, "images": len(self.images), "files": self.files()}
        try:
            before = read_json(path) if path.exists() else now
        except LdmError:
            before = now
        if before.get("digest") != now["digest"]:
            log.warning(
                "%s has changed since this run began (%s images then, %d now): the run goes on with the new ones",
                name, before.get("images"), len(self.images),
            )  # fmt: skip
        else:
            old_files = before.get("files", {})
            for kind in [kind for kind, digest in now["files"].items() if old_files.get(kind, digest) != digest]:
                log.warning(
                    "%s: some %s files have been replaced since this run began, or written again: the run goes on "
                    "with what they hold now",
                    name, kind,
                )  # fmt: skip
        with replacing(path, folder=False, overwrite=True, need=0) as temporary:
            write_json(temporary, now)

    def tags(self) -> Tags:
        """How captions change from visit to visit."""
        data = self.section
        return Tags(data.shuffle_tags, data.keep_tags, data.drop_tags, data.trigger)

    def framing(self, size: int) -> Framing:
        """Buckets and crops at a size."""
        data = self.section
        return Framing(
            size, data.buckets, data.bucket_step, data.aspect, data.crop, data.crops if data.cache else 0, data.flip,
            data.upscale,
        )  # fmt: skip


def _rules(section: DataSection) -> FolderRules:
    """The rules of the folders within the source."""
    named = {
        name.strip("/"): FolderRule(one.repeats, one.weight, one.caption.strip())
        for name, one in section.folders.items()
    }
    return FolderRules(named, section.numbered_folders)


def open_training_images(section: DataSection, folder: Path, accelerator: Accelerator) -> TrainingImages:
    """The images that a section of the configuration names, with their index in `folder`; all processes call it.

    Raises:
        LdmError: the images cannot be read, or the processes see different ones.
    """
    assert section.source  # see `ldm.training.checks`
    if section.stream:
        return TrainingImages(section, folder)
    with accelerator.main_process_first():  # the first one makes the index, the others read it
        images = open_images(
            section.source, folder, captions=section.captions, split=section.split,
            caption_column=section.caption_column, image_column=section.image_column, trigger=section.trigger,
            beside=section.beside.named(), rules=_rules(section),
        )  # fmt: skip
        opened = TrainingImages(section, folder, images)
    if accelerator.is_main_process:
        opened.notice_changes()
    check_agreement({"the number of images": len(images), "the digest of images": opened.digest})
    return opened
