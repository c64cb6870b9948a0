"""Image prompts of a pipeline: the IP-Adapters that it has loaded, and the images that a call gives them.

B images of a batch, I images of a prompt, Q tokens of each, T text channels, N tokens of a level of the U-Net
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LdmError
from ldm.files import file_digest
from ldm.images import load_image, mask_to_tensor
from ldm.latent_diffusion import LatentDiffusion
from ldm.patches.image_prompt import ImageTokens
from ldm.patches.patching import patched
from ldm.runtime.graphs import admit
from ldm.weights.components import fingerprint
from ldm.weights.image_encoder import ImageEncoder, load_image_encoder
from ldm.weights.image_prompt import OpenedImagePrompt, open_image_prompt
from pipelines.request import Request
from pipelines.run import Attached, SamplingRun, check_acting
from pipelines.settings import LOADING, ImagePrompt, find
from pipelines.tuning import room_of


class ImagePrompts:
    """The IP-Adapters of a pipeline with their image encoder."""

    def __init__(self, model: LatentDiffusion, ip_adapter: Any, image_encoder: Any, source: Any, pickle: bool) -> None:
        """Load them for a model; for one on the meta device, only open the files.

        `image_encoder` is a folder, a Hub name or one that is loaded; by default it is the folder of that name beside
        the first file, or within the model's `source`.

        Raises:
            LdmError: a file cannot be read or does not fit the model, or there is no image encoder that fits.
        """
        given = () if ip_adapter is None else find("ip_adapter", "python", rows=LOADING).check(ip_adapter)
        paths = given if isinstance(given, tuple) else (given,)
        self.files = [open_image_prompt(path, model.family, allow_pickle=pickle) for path in paths]
        self.encoder: ImageEncoder | None = None
        self.encoder_source: Any = None
        if image_encoder is not None and not self.files:
            raise LdmError("an image encoder without an IP-Adapter: name one (ip_adapter=, --ip-adapter)")
        if not self.files:
            return
        self.encoder_source = _encoder_for(self.files[0], source) if image_encoder is None else image_encoder
        if model.device.type == "meta":
            return
        if isinstance(image_encoder, ImageEncoder):
            self.encoder = image_encoder
        else:
            device = "cpu" if room_of(model) else model.device
            self.encoder = load_image_encoder(self.encoder_source, model.dtype, device, allow_pickle=pickle)
        for opened in self.files:
            self.encoder.check(opened.adapter.config)
            value = ImageTokens("", opened.load(model.dtype, model.device))
            admit(model.unet, patched(model.unet, {"image_prompts": (value,)}))

    @cached_property
    def encoder_hash(self) -> str:
        """A digest of the image encoder's weights, ten hexadecimal digits; "" without an encoder."""
        return fingerprint({"image_encoder": self.encoder.tower}) if self.encoder else ""

    def _check(self, request: Request) -> None:
        """Raise unless a request's image prompts can be used."""
        prompts: tuple[ImagePrompt, ...] = request.image_prompt
        if not prompts:
            return
        if not self.files:
            raise LdmError("image_prompt without an IP-Adapter: name one (ip_adapter=, --ip-adapter)")
        if len(self.files) not in (1, len(prompts)):
            raise LdmError(
                f"{len(prompts)} image prompts for {len(self.files)} IP-Adapters: give one for each, or load one alone"
            )
        if request.task == "edit":
            raise LdmError("a model that edits by instruction takes no image prompts; leave image_prompt out")
        for prompt in prompts:
            check_acting(prompt, "image_prompt", request)
            for image in prompt.images:
                load_image(image)
            if prompt.mask is not None:
                load_image(prompt.mask, "L")

    def checked(self, request: Request) -> Request:
        """The request with the SHA-256 of its image prompts' files, which its records state.

        Raises:
            LdmError: there is no IP-Adapter, or not one for each prompt, or an image cannot be read.
        """
        self._check(request)
        found = []
        for prompt, opened in self._pairs(request):
            files = [str(image) for image in (*prompt.images, prompt.mask) if isinstance(image, (str, os.PathLike))]
            digests = {file: file_digest(Path(file), plain=True) for file in files}
            found.append(replace(prompt, digests={**digests, str(opened.file): opened.digest}))
        return request.changed(image_prompt=tuple(found)) if found else request

    def attachments(self, request: Request) -> list[ImageAttachment]:
        """The image prompts of a request as its runs read them; those of weight 0 are left out."""
        return [
            ImageAttachment(f"image_prompt.{number}", prompt, opened, self.encoder)
            for number, (prompt, opened) in enumerate(self._pairs(request))
            if prompt.weight and self.encoder is not None
        ]

    def recorded(self, request: Request) -> dict[str, Any]:
        """The record of a request's image prompts, empty if there are none: files by path and SHA-256."""
        found = [
            {
                "images": [_file(image, prompt.digests) for image in prompt.images],
                "weight": prompt.weight,
                **({} if prompt.mask is None else {"mask": _file(prompt.mask, prompt.digests)}),
                "begin": prompt.begin,
                "end": prompt.end,
                "adapter": _file(opened.file, prompt.digests),
            }
            for prompt, opened in self._pairs(request)
        ]
        if not found:
            return {}
        return {"image_prompt": found, "image_encoder": self._place(), "image_encoder_hash": self.encoder_hash}

    def _place(self) -> str | None:
        """The folder or Hub name of the image encoder; None if it was given as an object."""
        if isinstance(self.encoder_source, ImageEncoder):
            return None
        place = Path(self.encoder_source)
        return str(place.absolute() if place.exists() else place)

    def _pairs(self, request: Request) -> Iterator[tuple[ImagePrompt, OpenedImagePrompt]]:
        """Each prompt with its adapter: the only one, or that at the same place."""
        for number, prompt in enumerate(request.image_prompt):
            yield prompt, self.files[number if len(self.files) > 1 else 0]


@dataclass(frozen=True)
class ImageAttachment:
    """One image prompt in the runs of a call; its tokens are computed once."""

    name: str
    prompt: ImagePrompt
    opened: OpenedImagePrompt
    encoder: ImageEncoder

    @property
    def begin(self) -> float:
        return self.prompt.begin

    @property
    def end(self) -> float:
        return self.prompt.end

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """The tokens of the images and those for the negative prompt: (1, I · Q, T) each.

        The latter are those of an embedding of zeros or, where patches are read, of an image of zeros.
        """
        images = [load_image(image) for image in self.prompt.images]
        adapter, encoder = self.opened.adapter, self.encoder
        if adapter.config.reads_patches:
            features = encoder.patches(images)
            blank = encoder.blank_patches().expand_as(features)
        else:
            features = encoder.embeddings(images)
            blank = torch.zeros_like(features)
        weight = next(adapter.parameters())
        both = (adapter.projection(one.to(weight.device, weight.dtype)) for one in (features, blank))
        shown, negative = (one.flatten(0, 1)[None] for one in both)
        return shown, negative

    def prepare(self, run: SamplingRun) -> Attached:
        """Attention on the image's tokens in a run, and the tokens and weights that it reads."""
        batch, weight = run.shape[0], self.prompt.weight
        value = ImageTokens(self.name, self.opened.adapter, regional=self.prompt.mask is not None)
        shown, negative = (one.to(run.device, run.dtype).expand(batch, -1, -1) for one in self.tokens)
        inputs = {value.tokens: (shown, negative)}
        for level, region in enumerate(self._regions(run)):
            # of its own memory, into which recorded steps copy
            weights = (weight * region).to(run.device, run.dtype).expand(batch, -1, -1).contiguous()
            inputs[value.weights(level)] = (weights, weights)
        return Attached("image_prompts", value, inputs)

    def _regions(self, run: SamplingRun) -> Iterator[Tensor]:
        """The mask at each level of the U-Net (1, N, 1), or a one for all of them."""
        if self.prompt.mask is None:
            yield torch.ones(1, 1, 1)
            return
        request, (height, width) = run.request, run.shape[2:]
        mask = mask_to_tensor(load_image(self.prompt.mask, "L"), request.width, request.height)
        for _ in run.model.family.unet.channels:
            yield F.interpolate(mask, size=(height, width), mode="bicubic").flatten(2).transpose(1, 2)
            height, width = -(-height // 2), -(-width // 2)


def _encoder_for(opened: OpenedImagePrompt, model_source: Any) -> Path | str:
    """The folder or Hub name of the image encoder that belongs to an IP-Adapter's file.

    It is beside the file, but for the authors' adapters for SDXL that read features of ViT-H: in `sdxl_models` there
    is ViT-bigG, and ViT-H is in `models`.
    """
    config = opened.adapter.config
    vit_h = config.features == (1280 if config.reads_patches else 1024)
    own = PurePosixPath(opened.name).parent if opened.name else opened.file.parent
    place = own.with_name("models") if vit_h and own.name == "sdxl_models" else own
    if opened.name:
        return str(place / "image_encoder")
    beside = [Path(place, "image_encoder"), Path(own, "image_encoder")]
    if isinstance(model_source, (str, os.PathLike)):
        beside.append(Path(model_source) / "image_encoder")
    found = next((folder for folder in beside if folder.is_dir()), None)
    if found is None:
        raise LdmError(f"{opened.file} needs an image encoder: name its folder (image_encoder=, --image-encoder)")
    return found


def _file(image: Any, digests: Mapping[str, str]) -> dict[str, str | None]:
    """The record of an image: path and SHA-256, or nothing but None if it is no file."""
    if not isinstance(image, (str, os.PathLike)):
        return {"path": None, "sha256": None}
    return {"path": str(Path(image).absolute()), "sha256": digests[str(image)]}


def from_record(
    record: Any, images: Sequence[str] = (), adapters: Sequence[str] = (), masks: Sequence[str] = ()
) -> tuple[tuple[ImagePrompt, ...], tuple[str, ...]]:
    """The image prompts in a record, and the IP-Adapters that they need.

    `images`, `adapters` and `masks` replace those of the record, in their order.

    Raises:
        LdmError: the record is damaged, an image or an adapter is gone or has changed, or another number replaces them.
    """
    try:
        for what, given, count in (
            ("image prompts", images, sum(len(one["images"]) for one in record)),
            ("masks of image prompts", masks, sum("mask" in one for one in record)),
        ):
            if given and len(given) != count:
                raise LdmError(f"{len(given)} {what} for an image that was made with {count}; name all of them")
        image, mask = iter(images), iter(masks)
        prompts = tuple(
            ImagePrompt(
                tuple(next(image, None) or _unchanged("image prompt", "image-prompt", own) for own in one["images"]),
                one["weight"],
                next(mask, None) or _unchanged("mask of the image prompt", "image-prompt-mask", one["mask"])
                if "mask" in one
                else None,
                one["begin"],
                one["end"],
            )
            for one in record
        )
        found = tuple(adapters) or tuple(_unchanged("IP-Adapter", "ip-adapter", one["adapter"]) for one in record)
    except (KeyError, TypeError, AttributeError):
        raise LdmError("the image's record of its image prompts is damaged") from None
    return prompts, found if len(set(found)) > 1 else found[:1]


def _unchanged(what: str, option: str, record: Mapping[str, str]) -> str:
    """The path of a file in a record, if the file is still the same; the option names another one."""
    path = record["path"]
    if path is None:
        raise LdmError(f"the record does not say which file the {what} is; name it (--{option})")
    if not Path(path).is_file() or file_digest(Path(path), plain=True) != record["sha256"]:
        raise LdmError(
            f"the {what} {path}, that the image was made from, is gone or has changed; put it back, or name it "
            f"(--{option})"
        )
    return path
