"""The folder of published weights for evaluation, which `tools/fetch_weights.py` fills."""

from __future__ import annotations

import os
from pathlib import Path

from ldm.caches import cache_folder
from ldm.errors import LdmError


def weights_folder() -> Path:
    """`LDM_WEIGHTS`, or else `ldm/weights` in the user's folder for caches. It need not exist."""
    if named := os.environ.get("LDM_WEIGHTS"):
        return Path(named)
    return cache_folder("weights")


def published(name: str, command: str) -> Path:
    """The file of that name in the weights folder; `command` of the tool fetches it.

    Raises:
        LdmError: it is not there.
    """
    path = weights_folder() / name
    if not path.is_file():
        raise LdmError(
            f"{path} is missing; fetch it with: python tools/fetch_weights.py {command} (another folder: LDM_WEIGHTS)"
        )
    return path
