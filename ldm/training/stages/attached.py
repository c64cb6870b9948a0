"""Networks trained beside a frozen U-Net, whose patches read their outputs: what such stages share.

B batch, C latent channels, h×w height and width of the latents, H×W those of the images
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ldm.data.loader import Batch
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning, UNet
from ldm.patches.call_inputs import CallInputs, read_in_calls
from ldm.runtime.attention import set_attention
from ldm.sheets import grid
from ldm.training.frozen import uniform
from ldm.training.optimizers import Group
from ldm.training.stages import denoiser
from ldm.training.stages.denoiser import PREVIEW, DenoiserStage
from ldm.training.stages.sections import AttachedSection
from ldm.training.stages.stage import ForwardPasses, Learner, StageInputs, seeded
from ldm.weights.components import Components

SHOWN = 4  # captions of a preview, where no prompts are configured


class SteeredUNet(nn.Module):
    """A patched U-Net and the network that gives the patch its inputs: all that runs in a step, with all weights."""

    def __init__(self, unet: UNet, trained: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.trained = trained

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Noisy latents (B, C, h, w) to the U-Net's prediction (B, C, h, w)."""
        return self.unet(x, timestep, cond)


class TrainedAttachment(nn.Module, ABC):
    """A trained network that gives a patch of a frozen U-Net its inputs; the forward pass is that of the U-Net.

    The U-Net is no sub-module, so that its frozen weights are neither saved nor exchanged between processes.
    """

    def __init__(self, trained: nn.Module, patched: UNet) -> None:
        """`patched` is a U-Net with the patch; its modules may be changed, the trained network may be among them."""
        super().__init__()
        self.trained = trained.requires_grad_(True).train()
        self.inputs = CallInputs()
        self.around = (SteeredUNet(read_in_calls(patched, self.inputs), trained),)  # a tuple, which hides it

    @abstractmethod
    def given(self, more: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The patch's inputs from the inputs beside the text, (B, …) each."""

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Noisy latents (B, C, h, w) to the U-Net's prediction (B, C, h, w)."""
        self.inputs.values = self.given(cond.more)
        return self.around[0](x, timestep, cond)

    def learner(self, section: AttachedSection) -> Learner:
        """The trained network with its learning rate."""
        groups: list[Group] = [(list(self.parameters()), section.optimizer.learning_rate)]
        return Learner(self, groups, around=self.around[0])


def passes(
    section: AttachedSection,
    parts: Components,
    found: Mapping[str, Learner],
    size: int,
    cached: bool,
    more: Mapping[str, Tensor],
) -> ForwardPasses:
    """Those of the denoiser, with the trained network; `more` are its inputs for one image."""
    module = found["unet"].module
    assert isinstance(module, TrainedAttachment)
    denoiser.count_attention(section, module.around[0])
    whole = Components(parts.family, {**parts.networks, "unet": module})
    return denoiser.passes(section, whole, found, size, cached, more)


def copied(found: Mapping[str, Learner]) -> int:
    """The numbers of the trained network, of which previews use a copy."""
    return sum(parameter.numel() for parameter in found["unet"].module.parameters())


class AttachedStage(DenoiserStage):
    """Training of a network beside a frozen U-Net."""

    section: AttachedSection

    def __init__(
        self, given: StageInputs[Any], learners: Callable[[Any, Components], dict[str, Learner]], drop_image: float
    ) -> None:
        """Args:
            given: by the run.
            learners: of the kind's row.
            drop_image: part of the images that are dropped, which the network reads.

        Raises:
            LdmError: see `DenoiserStage`; or the network to begin with cannot be used.
        """
        super().__init__(
            given.name, given.section, given.model, given.accelerator, given.seed, given.make_images, given.texts,
            seeded(learners, given.seed, given.name),
        )  # fmt: skip
        with given.accelerator.autocast():
            set_attention(self.attachment.around[0], given.section.attention)
        self.dropout = replace(self.dropout, image=drop_image)
        place = f"of the network ({given.name}.source, model.unet)"
        shape = vars(self.attachment.trained.config)
        self.fixed = {
            f"{field} {place}": str(value) for field, value in shape.items() if field not in given.section.fixed
        }

    @property
    def attachment(self) -> TrainedAttachment:
        """The trained network, with what it is beside."""
        module = self.accelerator.unwrap_model(self.players["unet"].module)
        assert isinstance(module, TrainedAttachment)
        return module

    def shown(self) -> LatentDiffusion:
        """The frozen model in one dtype, to make images."""
        networks = {name: uniform(self.model.networks[name]) for name in ("unet", "text_encoders")}
        return self.model.with_networks(networks)

    def compared(
        self, batch: Batch, steered: Callable[[int], tuple[Image.Image, Mapping[str, Any]]]
    ) -> list[Image.Image]:
        """For each prompt of a preview: the image that steers, the image made with it, and the one without.

        Args:
            batch: its captions are the prompts if none are configured.
            steered: gives the steering image of a row of the batch, and the settings that use it.
        """
        if self.make_images is None or self.model.family.refiner:
            return []
        height, width = batch.size[0, 4:6].int().tolist()
        model, rows = self.shown(), []
        for number, said in enumerate(self.section.prompts or batch.captions[:SHOWN]):
            image, settings = steered(number % len(batch.keys))
            row = [image]
            for more in (settings, {}):
                row += self.make_images(model, [said], (width, height), [self.seed + number], {**PREVIEW, **more})
            rows.append(grid(row, len(row)))
        return rows


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [0, 1] as an image."""
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy())
