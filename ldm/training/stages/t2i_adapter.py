"""The stage `t2i-adapter`: a small network learns to steer the U-Net by condition images.

Mou et al. 2023 (arXiv 2302.08453); timesteps with much noise come more often (section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.errors import LdmError
from ldm.models.surgery import twin
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.patches.patching import patched
from ldm.patches.t2i_adapter import NamedFeatures
from ldm.training.stages.attached import TrainedAttachment
from ldm.training.stages.control import CONDITION, ControlStage, begun
from ldm.training.stages.sections import T2IAdapterSection
from ldm.training.stages.stage import Learner, StageInputs, freeze
from ldm.weights.components import Components
from ldm.weights.control_models import t2i_config

NAME = "t2i-adapter"
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R 601), as Pillow has them


class TrainedT2IAdapter(TrainedAttachment):
    """A T2I-Adapter in training, beside a U-Net that reads its features."""

    trained: T2IAdapter

    def __init__(self, network: T2IAdapter, unet: UNet) -> None:
        features = NamedFeatures(NAME, len(network.config.channels))
        super().__init__(network, patched(twin(unet).train(), {"t2i_adapters": [features]}))

    def given(self, more: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The features of the condition image."""
        image = more[CONDITION]
        if self.trained.config.in_channels == 1:
            image = (image * image.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
        return {f"{NAME}.{number}": feature for number, feature in enumerate(self.trained(image))}


def learners(section: T2IAdapterSection, parts: Components) -> dict[str, Learner]:
    """A T2I-Adapter from the section's source, or one drawn by PyTorch's generator."""
    freeze(parts)
    network = begun(section, NAME, parts, T2IAdapter)
    if network is None:
        config = t2i_config(parts.family, 1 if section.gray else 3, section.layers)
        network = T2IAdapter(config).to(next(parts.unet.parameters()).device)
    return {"unet": TrainedT2IAdapter(network, parts.unet).learner(section)}


def build(given: StageInputs[T2IAdapterSection]) -> ControlStage:
    """The stage of a run.

    Raises:
        LdmError: see `AttachedStage`; or the images' sides do not divide into the adapter's places.
    """
    stage = ControlStage(given, learners, given.section.drop_condition)
    network = stage.attachment.trained
    assert isinstance(network, T2IAdapter)
    factor = network.config.factor
    for sides in given.sides:
        if any(side % factor for side in sides):
            raise LdmError(
                f"{NAME}: it reads images whose sides are multiples of {factor}, not {sides[0]}×{sides[1]}; "
                f"set data.bucket_step to a multiple of {factor}"
            )
    return stage
