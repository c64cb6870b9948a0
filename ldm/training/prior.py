"""Class images: images of a prompt that the model makes before it is trained, and then learns beside the others.

Training on them preserves the model's knowledge of the class (prior preservation; DreamBooth: Ruiz et al. 2022, arXiv
2208.12242, section 3.2).

runs/x/data/class-…/images/    class images, made once for each prompt, size and starting model
runs/x/data/class-…/           their index and cache

B batch
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from ldm.data.image_set import made
from ldm.data.loader import Batch
from ldm.errors import LdmError, out_of_memory
from ldm.images import save_png
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.checks import alike
from ldm.training.frozen import numbers, uniform
from ldm.training.images import TrainingImages, open_training_images
from ldm.training.phases import phases
from ldm.training.sections import DataSection, PriorSection, StageSection
from ldm.training.stages.stage import MakeImages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prior:
    """Class images that are trained beside others."""

    data: TrainingImages
    weight: float  # of their loss

    def marked(self, batch: Batch) -> Batch:
        """A batch of class images, with keys that no other image has, and their weight in the loss."""
        return weighed(replace(batch, keys=[f"class images/{key}" for key in batch.keys]), 2 * self.weight)


def weighed(batch: Batch, factor: float) -> Batch:
    """A batch with the weights of its samples multiplied by a factor."""
    return replace(batch, weights=factor * batch.weights)


@dataclass(frozen=True)
class ClassImages:
    """The class images of a stage: what is asked for, and where they are."""

    prior: PriorSection
    size: int  # width and height of made images, in pixels: the largest in training
    seed: int  # of the run
    folder: Path  # of the index, the cache and made images

    @property
    def images(self) -> Path:
        """The folder of the images."""
        return Path(self.prior.source or self.folder / "images")

    def make(self, model: LatentDiffusion, make_images: MakeImages, accelerator: Accelerator) -> None:
        """Make this process's share of the images that are not there; all processes call it.

        An image may depend on those that are made with it. So the batches are always the same ones, and one of which an
        image is missing is made again.

        Raises:
            LdmError: an image cannot be made or written; those before are whole, and are not made again.
        """
        made(self.images)
        count, batch = self.prior.images, self.prior.batch
        batches = [range(start, start + batch) for start in range(0, count, batch)]
        own = batches[accelerator.process_index :: accelerator.num_processes]
        left = [some for some in own if not all(self.file(number).exists() for number in some if number < count)]
        if left:
            log.info("making class images of %r, %d in all, in %s", self.prior.prompt, count, self.images)
        dtype = numbers(accelerator.mixed_precision)
        parts = {name: uniform(model.networks[name], dtype) for name in ("unet", "text_encoders")}
        whole = model.with_networks(parts)
        for done, some in enumerate(left, 1):
            for number, image in zip(some, self._batch(whole, some, make_images), strict=True):
                if number < count:
                    save_png(image, self.file(number))
            log.info("class images: %d of %d batches of this process", done, len(left))
        accelerator.wait_for_everyone()

    def _batch(self, model: LatentDiffusion, some: range, make_images: MakeImages) -> list[Image.Image]:
        """The images with these numbers."""
        prompts, seeds = [self.prior.prompt] * len(some), [self.seed + number for number in some]
        try:
            return make_images(model, prompts, (self.size, self.size), seeds, {"steps": self.prior.steps})
        except (LdmError, RuntimeError) as error:
            if len(some) == 1 or not out_of_memory(error):
                raise
            raise LdmError(
                f"class images: out of memory with {len(some)} of {self.size}×{self.size} at a time; set prior.batch "
                f"to {len(some) // 2}"
            ) from None

    def file(self, number: int) -> Path:
        """The file of a made image."""
        return self.images / f"{number:05d}.png"

    def open(self, data: DataSection, accelerator: Accelerator) -> Prior:
        """The images, opened with the framing of the others; all processes call it.

        Raises:
            LdmError: they cannot be used.
        """
        same = data.model_dump(include=set(data.loading))
        own = DataSection(source=str(self.images), trigger=self.prior.prompt, holdout=0, **same)
        opened = open_training_images(own, made(self.folder), accelerator)
        most = None if self.prior.source else self.prior.images  # an earlier run may have made more
        return Prior(replace(opened, most=most), self.prior.weight)


def class_images(prior: PriorSection, section: StageSection, seed: int, model: str, folder: Path) -> ClassImages:
    """The class images of a stage, in a folder of their own for each prompt, size and starting model.

    Args:
        prior: what is asked for.
        section: of the stage.
        seed: of the run.
        model: the fingerprint of the model that makes them.
        folder: of the run's data.
    """
    size = max(phase.size for phase in phases(section))
    facts = [prior.prompt, prior.source] if prior.source else [prior.prompt, prior.steps, size, seed, model]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return ClassImages(prior, size, seed, folder / f"class-{digest}")


def check_prior(name: str, prior: PriorSection, data: TrainingImages, make_images: MakeImages | None) -> None:
    """Raise LdmError, before anything is opened, for class images that cannot be made, or that are the others."""
    place = f"{name}.prior"
    if make_images is None and prior.source is None:
        raise LdmError(f"{place}.prompt: no function that makes images is given (make_images); name a source")
    captions = data.images.all_captions() if data.images else []
    same = sum(any(alike(text, prior.prompt) for text in texts) for texts in captions)
    if same:
        raise LdmError(
            f"{place}.prompt is the caption of {same} of {len(captions)} images, {prior.prompt!r}: class images need "
            "another; name the class without the trigger words"
        )
