"""The layout of a run's folder: names of its files and folders, and the mark of a stage that is done.

`ldm/training/run.py` says what they hold.
"""

from __future__ import annotations

import re
from pathlib import Path

from ldm.errors import LdmError
from ldm.files import read_json

CONFIG = "config.yaml"  # in the run's folder; all others in that of a stage
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PREVIEWS = "previews"
EVALUATION = "evaluation"
DONE = "done.json"
ADAPTER = "adapter.safetensors"  # the result of the stage `adapter`
SHEET = "sheet.png"  # of `ldm train-adapter`
STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The name of what belongs to a step: a checkpoint, a preview, an evaluation."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a name by `step_name`; None for other names."""
    found = STEP.fullmatch(name)
    return int(found[1]) if found else None


def steps_done(stage: Path) -> int | None:
    """The number of steps of a stage that is done, by its folder; None if it is not done.

    Raises:
        LdmError: the mark is damaged.
    """
    path = stage / DONE
    if not path.exists():
        return None
    try:
        return int(read_json(path)["steps"])
    except (KeyError, TypeError, ValueError):
        raise LdmError(f"{path} does not say how many steps are done") from None
