"""The stage `controlnet`: a copy of the U-Net's way down learns to steer the U-Net by condition images.

Zhang et al. 2023 (arXiv 2302.05543). Its residuals are zero at first, so that training begins with the U-Net's own
result. The copy begins with the weights as the frozen U-Net holds them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.families import Family
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.surgery import twin
from ldm.models.unet import UNet
from ldm.patches.controlnet import NamedControlNet
from ldm.patches.patching import patched
from ldm.training.stages.attached import TrainedAttachment
from ldm.training.stages.control import CONDITION, ControlStage, begun
from ldm.training.stages.sections import ControlNetSection
from ldm.training.stages.stage import Learner, StageInputs, freeze
from ldm.weights.components import Components
from ldm.weights.control_models import controlnet_config

NAME = "controlnet"
IMAGE_CHANNELS = (16, 32, 96, 256)  # of the image's embedding, in all that are published
COPIED = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")


class TrainedControlNet(TrainedAttachment):
    """A ControlNet in training, beside a U-Net that reads its residuals."""

    trained: ControlNet

    def __init__(self, network: ControlNet, unet: UNet) -> None:
        super().__init__(network, patched(twin(unet).train(), {"controlnets": [NamedControlNet(network, NAME)]}))

    def given(self, more: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The embedded condition image, and scales of 1 for all residuals."""
        image = self.trained.embed_image(more[CONDITION])
        scales = image.new_ones(len(image), len(self.trained.config.skips) + 1)
        return {f"{NAME}.image": image, f"{NAME}.scales": scales}


def learners(section: ControlNetSection, parts: Components) -> dict[str, Learner]:
    """A ControlNet from the section's source, or a copy of the U-Net with an embedding drawn by PyTorch's generator."""
    freeze(parts)
    network = begun(section, NAME, parts, ControlNet) or copied(parts.unet, config_for(parts.family))
    return {"unet": TrainedControlNet(network, parts.unet).learner(section)}


def config_for(family: Family) -> ControlNetConfig:
    """The configuration of a new ControlNet for models of a family."""
    count = family.autoencoder.factor.bit_length()
    channels = (*IMAGE_CHANNELS[:count], *IMAGE_CHANNELS[-1:] * (count - len(IMAGE_CHANNELS)))
    return controlnet_config(family.unet, channels)


def copied(unet: UNet, config: ControlNetConfig) -> ControlNet:
    """A ControlNet with the weights of a U-Net's way down, in fp32; its residuals are zero."""
    network = ControlNet(config).to(next(unet.parameters()).device)
    with torch.no_grad():
        for name in COPIED:
            weights = dict(getattr(unet, name).named_parameters())
            for key, parameter in getattr(network, name).named_parameters():
                parameter.copy_(weights[key])
    return network


def build(given: StageInputs[ControlNetSection]) -> ControlStage:
    """The stage of a run."""
    return ControlStage(given, learners, given.section.drop_condition)
