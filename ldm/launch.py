"""The processes of a run, as a launcher (accelerate, torchrun) tells them in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping


def rank() -> int:
    """The number of this process among those of the run."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """The number of the run's processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """The number of the run's processes on this machine."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))
