"""The stage `ip-adapter`: the U-Net's cross-attention learns to read tokens of an image beside those of the text.

Ye et al. 2023 (arXiv 2308.06721). Keys and values begin as copies of those of the text. The image is the training image
itself, as it is framed, or its condition image, if the data have condition images.

B images, P patches of an image, F channels of the image encoder's features
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.models.image_prompt import HEAD, ImagePromptAdapter, ImagePromptConfig, attentions
from ldm.models.surgery import twin
from ldm.models.unet import UNet
from ldm.patches.image_prompt import ImageTokens
from ldm.patches.patching import patched
from ldm.training.conditioning import ConditioningDropout, Prompt
from ldm.training.frozen import numbers
from ldm.training.parallel.agreement import check_agreement
from ldm.training.stages import attached
from ldm.training.stages.attached import AttachedStage, TrainedAttachment, to_image
from ldm.training.stages.sections import ImagePromptSection
from ldm.training.stages.stage import Cached, ForwardPasses, Learner, StageInputs, freeze
from ldm.weights.components import Components, fingerprint
from ldm.weights.image_encoder import blank_encoder, load_image_encoder
from ldm.weights.image_prompt import open_image_prompt, write_image_prompt
from ldm.weights.tensors import FLOATS

NAME = "ip-adapter"
RESULT = "ip-adapter.safetensors"
FEATURES = "image features"  # name of the image's features in a conditioning
WIDEST = 1280  # channels of the resampler, at the most
DEPTH = 4  # its blocks
BESIDE = "condition"  # the image beside an image that takes its place as prompt


class TrainedImagePrompt(TrainedAttachment):
    """An IP-Adapter in training, beside a U-Net that reads its tokens."""

    trained: ImagePromptAdapter

    def __init__(self, network: ImagePromptAdapter, unet: UNet) -> None:
        prompt = ImageTokens(NAME, network)
        super().__init__(network, patched(twin(unet).train(), {"image_prompts": (prompt,)}))
        self.names = prompt.tokens, prompt.weights(0)

    def given(self, more: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tokens of the image, and a weight of 1."""
        tokens = self.trained.projection(more[FEATURES])
        return dict(zip(self.names, (tokens, tokens.new_ones(len(tokens), 1, 1)), strict=True))


# --- the network ------------------------------------------------------------------------------------------------------


def learners(section: ImagePromptSection, parts: Components) -> dict[str, Learner]:
    """An IP-Adapter from the section's source, or a new one whose projection is drawn by PyTorch's generator."""
    freeze(parts)
    network = new(section, parts) if section.source is None else begun(section.source, parts)
    return {"unet": TrainedImagePrompt(network, parts.unet).learner(section)}


def new(section: ImagePromptSection, parts: Components) -> ImagePromptAdapter:
    """An IP-Adapter whose keys and values are those of the text, in fp32."""
    with torch.device("meta"):
        encoder = blank_encoder(str(section.encoder)).config
    layers = [layer for layer, _ in attentions(parts.unet)]
    config = config_for(section, parts.family.unet.text_dim, encoder.hidden_size, encoder.projection_dim)
    network = ImagePromptAdapter(config, [layer.to_q.in_features for layer in layers])
    network.to(next(parts.unet.parameters()).device)
    with torch.no_grad():
        for own, layer in zip(network.layers, layers, strict=True):
            own.to_k_ip.weight.copy_(layer.to_k.weight)  # type: ignore[union-attr, operator]
            own.to_v_ip.weight.copy_(layer.to_v.weight)  # type: ignore[union-attr, operator]
    return network


def config_for(section: ImagePromptSection, text_dim: int, patch: int, embedding: int) -> ImagePromptConfig:
    """The shape of a new IP-Adapter, as the authors have them.

    Args:
        section: of the configuration.
        text_dim: channels of the text.
        patch: channels of the image encoder's patches.
        embedding: channels of its embeddings.
    """
    if section.kind == "base":
        return ImagePromptConfig("base", embedding, text_dim, section.tokens or 4)
    width = min(text_dim, WIDEST)
    heads = max(width // HEAD, 1)
    return ImagePromptConfig("plus", patch, text_dim, section.tokens or 16, width, heads, DEPTH, 4 * width)


def begun(source: str, parts: Components) -> ImagePromptAdapter:
    """The IP-Adapter of a file, with weights of its own.

    Raises:
        LdmError: it cannot be opened, or does not fit the model.
    """
    weight = next(parts.unet.parameters())
    try:
        opened = open_image_prompt(source, parts.family)
    except LdmError as error:
        raise LdmError(f"{NAME}.source: {error}") from None
    if weight.is_meta:
        return opened.adapter
    network = opened.load(torch.float32, weight.device)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # those that are mapped from a file cannot be updated
    return network


def helpers(section: ImagePromptSection) -> list[nn.Module]:
    """The image encoder, for the forecast."""
    return [blank_encoder(str(section.encoder)).requires_grad_(False)]


def passes(
    section: ImagePromptSection, parts: Components, found: Mapping[str, Learner], size: int, cached: bool
) -> ForwardPasses:
    """Those of the denoiser, with the IP-Adapter and its image encoder; pixels are encoded in each step."""
    network = found["unet"].module.trained
    assert isinstance(network, ImagePromptAdapter)
    with torch.device("meta"):
        encoder = blank_encoder(str(section.encoder))
        side = encoder.config.image_size
        image = torch.empty(1, 3, side, side)
        places = ((side // encoder.config.patch_size) ** 2 + 1,) if network.config.reads_patches else ()
        more = {FEATURES: torch.empty(1, *places, network.config.features)}
    counted = attached.passes(section, parts, found, size, False, more)
    frozen = counted.frozen[:1] if cached else counted.frozen  # captions come from the cache, latents do not
    return replace(counted, frozen=[*frozen, lambda: encoder(image).image_embeds])


def cached(section: ImagePromptSection) -> Cached:
    """Encoded captions; the image encoder needs pixels."""
    return Cached(texts=True)


# --- the stage --------------------------------------------------------------------------------------------------------


class ImagePromptStage(AttachedStage):
    """Training of an IP-Adapter."""

    section: ImagePromptSection

    def __init__(self, given: StageInputs[ImagePromptSection]) -> None:
        """Raises:
        LdmError: see `AttachedStage`; or there is no image encoder, or it does not fit.
        """
        super().__init__(given, learners, given.section.drop_image)
        self.dropout = replace(self.dropout, both=given.section.drop_both)
        dtype = numbers(given.accelerator.mixed_precision)
        self.encoder = load_image_encoder(str(given.section.encoder), dtype, given.accelerator.device)
        self.encoder.check(self.network.config)
        digest = fingerprint({"image_encoder": self.encoder.tower})
        check_agreement({"the weights of the image encoder": digest})
        self.fixed = {**self.fixed, f"{NAME}.encoder (digest of its weights)": digest}
        patches = self.network.config.reads_patches
        self.no_image = self.encoder.blank_patches() if patches else torch.zeros((), device=given.accelerator.device)

    @property
    def network(self) -> ImagePromptAdapter:
        """The IP-Adapter."""
        network = self.attachment.trained
        assert isinstance(network, ImagePromptAdapter)
        return network

    def said(self, batch: Batch, dropout: ConditioningDropout) -> Prompt:
        """Captions, and features of the images, (B, F) or (B, P, F); what is dropped is that of no image."""
        features = self.encoder.features(images_of(batch), self.network.config.reads_patches)
        dropped = dropout.images(self.seed, batch.keys, batch.epochs).to(features.device)
        rows = dropped.view(-1, *(1 for _ in features.shape[1:]))
        features = torch.where(rows, self.no_image, features)
        return replace(super().said(batch, dropout), more={FEATURES: features.float()})

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """For each prompt, the image prompt, the image made with it, and the one without."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / RESULT
            write_image_prompt(self.network, file)
            loading = {"ip_adapter": str(file), "image_encoder": self.encoder}

            def steered(row: int) -> tuple[Image.Image, dict[str, Any]]:
                shown = to_image(images_of(batch)[row] / 2 + 0.5)
                return shown, {**loading, "image_prompt": [shown]}

            return self.compared(batch, steered)


def images_of(batch: Batch) -> Tensor:
    """The image prompts of a batch: (B, 3, H, W) in [-1, 1]."""
    if BESIDE in batch.beside:
        return 2 * batch.beside[BESIDE] - 1
    assert batch.pixels is not None
    return batch.pixels


def build(given: StageInputs[ImagePromptSection]) -> ImagePromptStage:
    """The stage of a run."""
    return ImagePromptStage(given)


def write(stage: ImagePromptStage, folder: Path, lineage: str) -> None:
    """Write the IP-Adapter as a file with its authors' names."""
    write_image_prompt(stage.network, folder / RESULT, FLOATS[stage.section.dtype], overwrite=True, lineage=lineage)
