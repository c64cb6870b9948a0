"""Writing control models: diffusers' folders, and single files with the names of their authors."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.errors import LdmError, listing
from ldm.files import replacing, write_json
from ldm.models.t2i_adapter import T2IAdapterConfig
from ldm.weights import configs, layouts
from ldm.weights.control_models import PREFIX, ControlModel
from ldm.weights.folder import check_float, link_outputs, write_weights
from ldm.weights.manifest import NAME as MANIFEST
from ldm.weights.manifest import write_manifest
from ldm.weights.tensors import LINEAGE, write_safetensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def write_control_folder(
    network: ControlModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    lineage: str = "",
) -> None:
    """Write a control model atomically as a folder that diffusers opens, with a manifest of digests.

    `dtype` converts the weights; `lineage`, if it is not empty, goes into the header.

    Raises:
        LdmError: the folder exists and `overwrite` is not set, or holds something else; diffusers has no such network;
            writing fails.
    """
    check_float(dtype)
    strange = sorted({path.name for path in folder.glob("*")} - {CONFIG, WEIGHTS, MANIFEST, "README.md"})
    if strange:
        raise LdmError(f"{folder} holds more than a control model ({listing(strange)}), so it is not replaced")
    c = network.config
    json = configs.write_t2i_adapter(c) if isinstance(c, T2IAdapterConfig) else configs.write_controlnet(c)
    outputs = link_outputs(layouts.diffusers(dict(network.named_parameters())), network, dtype)
    with replacing(folder, True, overwrite, sum(output.info.nbytes for output in outputs)) as temporary:
        digest = write_safetensors(temporary / WEIGHTS, outputs, {LINEAGE: lineage} if lineage else {})
        write_json(temporary / CONFIG, json)
        write_manifest(temporary, {WEIGHTS: digest})


def write_control_file(
    network: ControlModel, path: Path, dtype: torch.dtype | None = None, *, overwrite: bool = False, lineage: str = ""
) -> None:
    """Write a control model as one file with its authors' names; a ControlNet's begin with `control_model.`.

    Raises:
        LdmError: as `write_weights`.
    """
    c = network.config
    if isinstance(c, T2IAdapterConfig):
        layout = layouts.original_t2i_adapter(c)
    else:
        layout = layouts.original_controlnet(c, PREFIX)
    links = layout(dict(network.named_parameters()))
    write_weights(path, links, network, dtype, overwrite=overwrite, lineage=lineage)
