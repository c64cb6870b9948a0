"""The default result of a stage: a model folder that diffusers opens, and the same model as a single file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)


class HoldsModel(Protocol):
    """A stage that `write_model` can write."""

    model: LatentDiffusion


def write_model(stage: HoldsModel, folder: Path, lineage: str) -> None:
    """Write the model folder, and the single file where the model has such a layout."""
    stage.model.save_pretrained(folder / "model", overwrite=True, lineage=lineage)
    try:
        stage.model.save_pretrained(folder / "model.safetensors", overwrite=True, lineage=lineage)
    except LdmError as error:
        log.warning("no single file: %s", error)
