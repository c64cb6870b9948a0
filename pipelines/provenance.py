"""An image's record: the part that says with which model it was made, and the settings that are read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ldm
from ldm.errors import LdmError, listing
from ldm.weights.builtin import DEFAULT, builtin
from pipelines.axes import SHEET
from pipelines.pipeline import Pipeline
from pipelines.settings import LOADING, at
from pipelines.tuning import room_of

ABOUT = {
    "version",
    "model",
    "model_hash",
    "task",
    "family",
    "batch",
    "place",
    "embeddings",
    "image_prompt",
    "image_encoder",
    "image_encoder_hash",
    "safety",
}  # keys of a record that are no settings


def provenance(loading: Mapping[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    """The model's part of a record; `loading` are the settings that a pipeline was loaded with."""
    model, room = pipeline.model, room_of(pipeline.model)
    source = loading.get("source") or DEFAULT
    own = {
        "source": _absolute(source),
        "refiner": _absolute(loading["refiner"]) if "refiner" in loading else None,
        "safety": _absolute(loading["safety"]) if "safety" in loading else None,
        "components": {name: _absolute(path) for name, path in loading.get("components", {}).items()} or None,
        "control_models": [_absolute(one) for one in loading.get("control_models", ())] or None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "offload": "layers" if room and room.layers else None,  # without fused layers, so rounded otherwise
    }
    rows = at("record", LOADING).values()
    values = {row.key: own[row.name] if row.name in own else loading.get(row.name, row.usual) for row in rows}
    return {
        "version": f"ldm {ldm.__version__}",
        "model": Path(source).stem,
        "model_hash": model.fingerprint(),
        **{key: value for key, value in values.items() if value is not None},
    }


def _absolute(source: str) -> str:
    """The absolute path of a source, or the name of a model as it is."""
    return source if builtin(source) or not Path(source).exists() else str(Path(source).absolute())


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """The settings of the call in our own record, without images.

    Raises:
        LdmError: the record is that of a sheet, has unknown settings, or is damaged.
    """
    if SHEET in record:
        raise LdmError("the image is a sheet with labels (--xy), of many settings; take one of its images")
    keys = {row.key.partition(".")[0] for row in at("record").values()}
    unknown = sorted(record.keys() - keys - {row.key for row in at("record", LOADING).values()} - ABOUT)
    if unknown:
        raise LdmError(f"the image's record has {listing(unknown)}, which this version of ldm does not know")
    if not isinstance(record.get("prompt"), str) or not isinstance(record.get("guidance"), dict):
        raise LdmError("the image's record is damaged")
    return {name: value for name, value in record.items() if name in keys - {"image", "mask"} and value is not None}
