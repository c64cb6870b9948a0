"""`ldm repro`: makes an image again from its own record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli.common import log_warnings, to_components, to_png
from ldm.errors import LdmError
from ldm.files import file_digest
from ldm.images import load_image, read_settings, save_png
from pipelines import Pipeline
from pipelines.a1111 import embeddings_of, from_parameters, listed
from pipelines.axes import SHEET
from pipelines.comparison import sheet_of
from pipelines.finishing import BLURRED
from pipelines.image_prompts import from_record
from pipelines.jobs import TEXTS
from pipelines.provenance import settings_of
from pipelines.settings import LOADING, at
from pipelines.tuning import typed

ROWS = ("prompt", "seed", *TEXTS)  # settings that each image of a batch has for itself


@dataclass(frozen=True)
class Replacements:
    """What takes the place of files and other things that a record names."""

    model: str | None = None
    refiner: str | None = None
    image: str | None = None
    mask: str | None = None
    device: str | None = None
    dtype: str | None = None
    components: Sequence[str] = ()
    lora_dir: str | None = None
    embeddings: Sequence[str] = ()
    image_prompts: Sequence[str] = ()
    image_prompt_masks: Sequence[str] = ()
    ip_adapters: Sequence[str] = ()
    image_encoder: str | None = None
    safety: str | None = None
    allow_pickle: bool = False
    control: Sequence[str] = ()
    control_models: Sequence[str] = ()


@dataclass(frozen=True)
class Recorded:
    """An image of a file, as its record says how it was made."""

    index: int  # within a sheet
    record: dict[str, Any]
    settings: dict[str, Any]  # of the call
    loading: dict[str, Any]

    @property
    def place(self) -> tuple[int, int]:
        """The size of its batch, and its place in it."""
        batch, place = self.record.get("batch", 1), self.record.get("place", 0)
        if not isinstance(batch, int) or not isinstance(place, int) or not 0 <= place < batch:
            raise LdmError("the image's record is damaged")
        return batch, place


def reproduce_image(file: str, out: str | None, others: Replacements) -> None:
    """Make an image or a sheet again, and print the largest and the mean difference of the pixels, 0 to 255."""
    log_warnings()
    path, target = Path(file), to_png(out) if out else None
    record, parameters = read_settings(path)
    if record is None and not parameters:
        raise LdmError(f"{path} does not say how it was made")
    sheet = sheet_of(record) if record and SHEET in record else None
    given = sheet.settings if sheet else {0: record}
    images = remade(path, [_recorded(path, index, one, parameters, others) for index, one in given.items()], parameters)
    made = replace(sheet, images=images).image() if sheet else images[0]
    original = load_image(path)
    if original.size != made.size:
        raise LdmError(f"{path} has {original.size} pixels, its record gives {made.size}: the image was changed since")
    if target:
        save_png(made, target, record, parameters)
    _print_difference(np.asarray(made).astype(int), np.asarray(original).astype(int))


def _recorded(path: Path, index: int, record: dict[str, Any] | None, parameters: str, others: Replacements) -> Recorded:
    """The settings of an image, with what takes the place of those in its record.

    Raises:
        LdmError: something is missing, or the record is damaged.
    """
    settings = from_parameters(parameters) if record is None else settings_of(record)
    record = record or {}
    loading = {
        "attention": "sdpa", **loading_of(record), "device": others.device, "allow_pickle": others.allow_pickle
    }  # fmt: skip
    named = (
        ("source", others.model), ("refiner", others.refiner), ("dtype", others.dtype), ("lora_dir", others.lora_dir),
        ("safety", others.safety),
    )  # fmt: skip
    loading |= {name: given for name, given in named if given}
    if others.components:
        loading["components"] = {**loading.get("components", {}), **to_components(others.components)}
    loading["embeddings"] = tuple(others.embeddings) or tuple(_found("embedding", one) for one in _embeddings(record))
    _check_models(path, record, loading)
    for name, given in (("image", others.image), ("mask", others.mask)):
        if given or name in record:
            settings[name] = given or _found(name, record[name])
    _check_images(path, record, settings)
    settings |= {"control": _renamed_controls(record, others.control)} if others.control else {}
    loading |= {"control_models": tuple(others.control_models)} if others.control_models else {}
    if "image_prompt" in record:
        settings["image_prompt"], loading["ip_adapter"] = from_record(
            record["image_prompt"], others.image_prompts, others.ip_adapters, others.image_prompt_masks
        )
        loading["image_encoder"] = others.image_encoder or record.get("image_encoder")
    return Recorded(index, record, settings, loading)


def _check_models(path: Path, record: dict[str, Any], loading: dict[str, Any]) -> None:
    """Raise unless the models that made an image are named; a safety checker that has not changed it is left out.

    Raises:
        LdmError: one is not named.
    """
    if "source" not in loading:
        raise LdmError(f"{path} does not say with which model it was made; name it (--model)")
    if record.get("safety") != BLURRED:
        loading.pop("safety", None)
    elif "safety" not in loading:
        raise LdmError(f"{path} was blurred by a safety checker that its record does not name; name it (--safety)")


def _check_images(path: Path, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise unless the image to start from and the mask that an image was made from are named."""
    if "image" not in settings and ("strength" in settings or record.get("task") in ("edit", "inpaint")):
        raise LdmError(f"{path} was made from an image that its record does not name; name it (--image)")
    if not {"mask", "margins"} & settings.keys() and record.get("task") == "inpaint":
        raise LdmError(f"{path} was made with a mask that its record does not name; name it (--mask)")


def remade(path: Path, images: Sequence[Recorded], parameters: str) -> dict[int, Image.Image]:
    """The images of a file, made again, by number; those of one batch together.

    Raises:
        LdmError: weights are not those that the file was made with, or a setting is wrong.
    """
    models: dict[str, list[Recorded]] = {}
    for one in images:
        models.setdefault(repr(one.loading), []).append(one)
    found: dict[int, Image.Image] = {}
    for same in models.values():
        found |= _of_model(path, same, parameters)  # whose weights are gone before the next model's are loaded
    return found


def _of_model(path: Path, images: Sequence[Recorded], parameters: str) -> dict[int, Image.Image]:
    """The images of one model, made again, by number."""
    loading = images[0].loading
    pipeline = Pipeline(**typed(loading))
    for one in images:
        _check_files(path, loading["source"], one.record, parameters, pipeline)
    return {number: image for batch in _batches(images) for number, image in _made(pipeline, batch).items()}


def _batches(images: Sequence[Recorded]) -> list[dict[int, Recorded]]:
    """The images that were made together, by place: of one size of batch, with all alike but their texts and seeds."""
    found: dict[tuple[str, int], list[dict[int, Recorded]]] = {}
    for one in images:
        size, place = one.place
        alike = {name: None if name in ROWS else value for name, value in one.settings.items()}
        batches = found.setdefault((repr(alike), size), [{}])
        if place in batches[-1]:
            batches.append({})
        batches[-1][place] = one
    return [batch for batches in found.values() for batch in batches]


def _made(pipeline: Pipeline, batch: dict[int, Recorded]) -> dict[int, Image.Image]:
    """The images of one batch; rounding depends on its size, so that others stand in for those that are missing."""
    first = next(iter(batch.values()))
    size, _ = first.place
    rows = [batch.get(place, first).settings for place in range(size)]
    texts = {name: [row[name] for row in rows] for name in ROWS if name in first.settings}
    result = pipeline(**{**first.settings, **texts}, batch=size)
    return {one.index: result.images[place] for place, one in batch.items()}


def _print_difference(made: np.ndarray, original: np.ndarray) -> None:
    """Print how two images' pixels differ."""
    difference = np.abs(made - original)
    same = "identical" if not difference.any() else "different"
    print(f"{same}: largest difference {difference.max()}, mean {difference.mean():.4f} of 255")


def _renamed_controls(record: dict[str, Any], paths: Sequence[str]) -> tuple[dict[str, str], ...]:
    """The condition images of a record, in other places."""
    recorded = record.get("control", [])
    if len(recorded) != len(paths):
        raise LdmError(
            f"--control {' '.join(paths)}: the image was made with {len(recorded)} condition images; name each"
        )
    return tuple({**one, "path": path} for one, path in zip(recorded, paths, strict=True))


def _check_files(path: Path, source: str, record: dict[str, Any], parameters: str, pipeline: Pipeline) -> None:
    """Raise unless the pipeline has the weights and the embeddings that the image was made with."""
    found, stated = pipeline.model.fingerprint(), record.get("model_hash")
    if stated and found != stated:
        raise LdmError(
            f"{path} was made with other weights ({stated}) than {source} has ({found}); name the right model"
        )
    encoder, stated = pipeline.image_prompts, record.get("image_encoder_hash")
    if stated and encoder.encoder_hash != stated:
        raise LdmError(
            f"{path} was made with another image encoder ({stated}) than {encoder.encoder_source} "
            f"({encoder.encoder_hash}); name the right one (--image-encoder)"
        )
    embeddings = {one["name"]: one["sha256"] for one in _embeddings(record)} or embeddings_of(parameters)
    for name, digest in embeddings.items():
        called = [one for one in pipeline.embeddings if listed(name) in map(listed, one.names)]
        if not any(one.digest.startswith(digest) for one in called):
            raise LdmError(
                f"{path} was made with an embedding called {name} ({digest[:12]}…); name its file (--embedding)"
            )


def loading_of(record: dict[str, Any]) -> dict[str, Any]:
    """The settings of loading the model in our own record.

    Raises:
        LdmError: a value is damaged.
    """
    rows = at("record", LOADING).values()
    try:
        return {row.name: row.check(record[row.key]) for row in rows if record.get(row.key) is not None}
    except LdmError as error:
        raise LdmError(f"the image's record is damaged: {error}") from None


def _embeddings(record: dict[str, Any]) -> list[dict[str, str]]:
    """The embeddings in a record: name, path and digest of each."""
    found = record.get("embeddings", [])
    keys = {"name", "path", "sha256"}
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and keys <= one.keys() and all(isinstance(value, str) for value in one.values())
        for one in found
    ):
        raise LdmError("the image's record of its embeddings is damaged")
    return found


def _found(name: str, record: Any) -> str:
    """The path of a starting image or mask, if the file is still the same."""
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise LdmError(f"the image's record of its {name} is damaged")
    if not record["path"]:
        raise LdmError(f"the record does not say which file the {name} is; name it (--{name})")
    path = Path(record["path"])
    if not path.is_file() or file_digest(path, plain=True) != record.get("sha256"):
        raise LdmError(f"the {name} that it was made from, {path}, is gone or has changed; name it (--{name})")
    return str(path)
