"""What the stages of control models share: condition images, a network to begin with, previews, files.

B batch, H×W height and width of the images
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unfilled import unfilled
from ldm.training.conditioning import ConditioningDropout, Prompt
from ldm.training.stages import attached
from ldm.training.stages.attached import AttachedStage, to_image
from ldm.training.stages.sections import AttachedSection
from ldm.training.stages.stage import ForwardPasses, Learner
from ldm.weights.components import Components
from ldm.weights.control_models import open_control_model
from ldm.weights.control_writing import write_control_file, write_control_folder
from ldm.weights.tensors import FLOATS

CONDITION = "condition"  # name of the condition images in a batch and in a conditioning
N = TypeVar("N", bound=ControlNet | T2IAdapter)


def begun(section: AttachedSection, name: str, parts: Components, kind: type[N]) -> N | None:
    """The control model that the section names as source, with weights of its own; None if it names none.

    Raises:
        LdmError: it cannot be opened, does not fit the model, or is of the other kind.
    """
    if section.source is None:
        return None
    weight = next(parts.unet.parameters())
    try:
        opened = open_control_model(section.source, parts.family, verify=not weight.is_meta)
    except LdmError as error:
        raise LdmError(f"{name}.source: {error}") from None
    network = opened.network
    if not isinstance(network, kind):
        other = "T2I-Adapter, for the stage t2i-adapter" if isinstance(network, T2IAdapter) else "ControlNet"
        raise LdmError(f"{name}.source: {section.source} is a {other}")
    if not weight.is_meta:
        opened.load(torch.float32, weight.device)
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # those that are mapped from a file cannot be updated
    return network


def passes(
    section: AttachedSection, parts: Components, found: Mapping[str, Learner], size: int, cached: bool
) -> ForwardPasses:
    """Those of the denoiser, with the control model."""
    more = {CONDITION: torch.empty(1, 3, size, size, device="meta")}
    return attached.passes(section, parts, found, size, cached, more)


class ControlStage(AttachedStage):
    """Training of a network that reads condition images."""

    def said(self, batch: Batch, dropout: ConditioningDropout) -> Prompt:
        """Captions, and condition images (B, 3, H, W) in [0, 1], black where they are dropped."""
        dropped = dropout.images(self.seed, batch.keys, batch.epochs)
        condition = batch.beside[CONDITION]
        kept = (~dropped).to(condition)[:, None, None, None]
        return replace(super().said(batch, dropout), more={CONDITION: condition * kept})

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """For each prompt, its condition image, the image with the control, and the image without."""
        control = plain_copy(self.attachment.trained, self.model.dtype)

        def steered(row: int) -> tuple[Image.Image, dict[str, Any]]:
            condition = to_image(batch.beside[CONDITION][row])
            return condition, {"control": condition, "control_models": [control]}

        return self.compared(batch, steered)


def plain_copy(network: Any, dtype: torch.dtype) -> Any:
    """A copy of a control model in a dtype, without what training added to its layers."""
    with unfilled():
        copy = type(network)(network.config)
    weights = {name: weight.detach().to(dtype, copy=True) for name, weight in network.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def write(stage: ControlStage, folder: Path, lineage: str) -> None:
    """Write the network as a folder that diffusers opens, and as a file with the original names."""
    network, dtype = stage.attachment.trained, FLOATS[stage.section.dtype]
    assert isinstance(network, ControlNet | T2IAdapter)
    write_control_folder(network, folder / stage.name, dtype, overwrite=True, lineage=lineage)
    write_control_file(network, folder / f"{stage.name}.safetensors", dtype, overwrite=True, lineage=lineage)
