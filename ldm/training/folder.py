"""A run's folder: its configuration, the lock that keeps other runs out, and the marks of stages that are done."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

import ldm
from ldm.errors import LdmError
from ldm.files import replacing, write_json
from ldm.training.config import Config, dump
from ldm.training.images import TrainingImages
from ldm.training.layout import CONFIG, DONE, steps_done
from ldm.training.parallel.agreement import differences
from ldm.training.stages.stage import Stage
from ldm.training.stages.table import kind_named

log = logging.getLogger(__name__)


def open_folder(config: Config) -> BinaryIO:
    """Write the configuration into the run's folder, and lock the folder while the returned file is open.

    Raises:
        LdmError: the folder cannot be used, or another run uses it.
    """
    folder = Path(config.output)
    path = folder / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
        before = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
    except OSError as error:
        raise LdmError(f"output {folder} cannot be used: {error.strerror}") from None
    except yaml.YAMLError:
        before = None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: processes that load images would inherit the lock
    except (BlockingIOError, PermissionError):
        raise LdmError(
            f"output {folder} is in use by another run; wait for its end, or choose another output"
        ) from None
    except OSError:
        pass  # a file system without locks
    now = config.model_dump(mode="json")
    for name, old, new in differences(before, now) if isinstance(before, dict) else ():
        log.warning("%s was %r when this run began, and is %r now", name, old, new)
    with replacing(path, folder=False, overwrite=True, need=0) as temporary:
        temporary.write_text(dump(config), encoding="utf-8")
    return lock


def is_done(folder: Path, steps: int) -> bool:
    """Whether the stage of this folder is done, with at least as many steps as are asked for now."""
    try:
        done = steps_done(folder)
    except LdmError:
        log.warning("%s is damaged; the end of the stage is done again", folder / DONE)
        return False
    return done is not None and done >= steps


def write_result(
    config: Config,
    data: TrainingImages,
    stage: Stage,
    folder: Path,
    record: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> None:
    """Write the result of a stage, with its lineage in it, and the mark that the stage is done; on the main process.

    Args:
        config: of the run.
        data: the run's images.
        stage: the finished stage, with the weights of the result in place.
        folder: of the stage.
        record: the figures at the end.
        chosen: the evaluated weights that were chosen as the result, if any.
    """
    extra = {"chosen": dict(chosen)} if chosen else {}
    lineage = {
        "code": f"ldm {ldm.__version__}",
        "stage": stage.name,
        "steps": stage.section.steps,
        "data": {"source": config.data.source, "digest": data.digest},
        "parents": parents(config, stage.name),
        "metrics": dict(record),
        **extra,
        "config": config.model_dump(mode="json", exclude={"output"}),
    }
    kind_named(stage.name).write(stage, folder, json.dumps(lineage))
    with replacing(folder / DONE, folder=False, overwrite=True, need=0) as temporary:
        write_json(temporary, {"steps": stage.section.steps, "metrics": dict(record), **extra})


def model_before(config: Config, name: str) -> Path | None:
    """The result of the last stage before this one from whose model others go on, if there is one."""
    before = [one for one in config.stages[: config.stages.index(name)] if kind_named(one).goes_on]
    return Path(config.output) / before[-1] / kind_named(before[-1]).result if before else None


def parents(config: Config, name: str) -> Sequence[str]:
    """The origins of a stage's model: the result of a stage before it, or a model from elsewhere."""
    before, kind = model_before(config, name) or config.model.source, kind_named(name)
    earlier = [str(before)] if before else []
    if kind.own_model is None:
        return earlier or [str(config.model.family)]
    own = kind.own_model(getattr(config, name))
    return [own.source] if own.source else [*earlier, str(own.family or own.usual)]
