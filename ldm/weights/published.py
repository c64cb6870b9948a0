"""The folder of published weights for evaluation, filled by `tools/fetch_weights.py`."""

from __future__ import annotations

import os
from pathlib import Path

from ldm.caches import cache_folder
from ldm.errors import LdmError

INCEPTION = "inception-2015-12-05.safetensors"  # without the classifier
SSCD = "sscd.onnx"


def weights_folder() -> Path:
    """The folder `LDM_WEIGHTS`, by default `ldm/weights` in the user's cache folder. It may not exist."""
    if named := os.environ.get("LDM_WEIGHTS"):
        return Path(named)
    return cache_folder("weights")


def published(name: str, command: str) -> Path:
    """The file `name` in the weights folder; the error names the tool's `command` that fetches the file.

    Raises:
        LdmError: the file is missing.
    """
    path = weights_folder() / name
    if not path.is_file():
        raise LdmError(
            f"{path} is missing; fetch it with: python tools/fetch_weights.py {command} (another folder: LDM_WEIGHTS)"
        )
    return path
