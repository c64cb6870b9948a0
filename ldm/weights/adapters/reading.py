"""Reading an adapter: the formats of its files, and the check of all of its tensors against a model.

A file is a safetensors file (or a pickle, on demand) of any format in `names.py`; a folder is peft's, with
`adapter_config.json`, or diffusers', with `pytorch_lora_weights.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import LdmError, first_line, listing
from ldm.files import check_digest, read_json
from ldm.patches.low_rank import Change
from ldm.weights.adapters import layers, names, origin
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.layers import Scaling
from ldm.weights.adapters.names import Place
from ldm.weights.components import Components
from ldm.weights.tensors import Store, TensorInfo, open_store

log = logging.getLogger(__name__)
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' JSON of the ranks and alphas, in a header
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
NETWORKS = ("text_encoder", "text_encoder_2", "unet")  # names of peft's folders in that of a whole adapter
DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


def open_adapter(
    file: str | os.PathLike[str], model: Components, *, partial: bool = False, allow_pickle: bool = False
) -> Adapter:
    """Open an adapter for a model: a file, or a folder by peft or diffusers. Its tensors stay in the file's dtype.

    Args:
        partial: leave out tensors whose names match nothing in the model; a warning names them.
        allow_pickle: read tensors from pickles, with PyTorch's restricted unpickler.

    Raises:
        LdmError: the file is no adapter, is of a kind that is not read, is damaged, or does not fit the model.
    """
    path = Path(file)
    try:
        sources = _sources(path, allow_pickle)
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(_digest, [f for source in sources for f in source.store.files])
            matched = [_matched(source, model, partial) for source in sources]
            changes = _changes(sources, matched, model)
            return _adapter(path, sources, matched, changes, digest.result())
    except PermissionError as error:
        raise LdmError(f"{error.filename or path} cannot be read: permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, LdmError):
            raise
        raise LdmError(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from None


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter's files that is known without a model."""

    infos: Mapping[str, TensorInfo]  # tensors by name
    metadata: Mapping[str, str]
    alphas: Counter[float]  # that the files state, with how many layers have each


def look_into(path: Path, allow_pickle: bool = False) -> AdapterFile:
    """Names, shapes, alphas and metadata of an adapter's files.

    Raises:
        LdmError: the path holds no adapter, or cannot be read.
    """
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    alphas = Counter[float]()
    for source in _sources(path, allow_pickle):
        infos |= source.store.infos
        metadata |= source.store.metadata
        stored = [name for name in source.store.infos if layers.split(name)[1] == "alpha"]
        alphas.update(round(float(tensor.float().mean()), 6) for _, tensor in source.store.read(stored, None, "cpu"))
        stated = [config.alpha for config in _scalings(source).values() if config.alpha is not None]
        alphas.update(stated)
    return AdapterFile(infos, metadata, alphas)


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass
class AdapterSource:
    """One file of an adapter, and the configuration beside it."""

    store: Store
    component: str = ""  # the folder's name, which may say what the tensors belong to if their names do not
    config: Mapping[str, Any] = field(default_factory=dict)  # peft's

    @property
    def file(self) -> Path:
        return self.store.files[0]


def peft_folders(path: Path) -> list[Path]:
    """The folders by peft that an adapter's folder holds: itself, or one for each network."""
    return [folder for folder in (path, *(path / name for name in NETWORKS)) if (folder / CONFIG).is_file()]


def diffusers_file(path: Path) -> Path | None:
    """The file by diffusers that an adapter's folder holds."""
    return next((path / name for name in DIFFUSERS if (path / name).is_file()), None)


def _sources(path: Path, allow_pickle: bool) -> list[AdapterSource]:
    """The files of an adapter."""
    if path.is_file():
        return [AdapterSource(open_store(path, allow_pickle))]
    if not path.is_dir():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise LdmError(f"{path} {what}; give an adapter's file, or a folder written by peft or diffusers")
    if folders := peft_folders(path):
        return [_peft_source(folder, folder.name, allow_pickle) for folder in folders]
    if weights := diffusers_file(path):
        return [AdapterSource(open_store(weights, allow_pickle))]
    if (path / "model_index.json").is_file():
        raise LdmError(f"{path} is a model's folder, not an adapter; give it as the model (--model)")
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise LdmError(
            f"{path} holds neither {CONFIG} nor {DIFFUSERS[0]} nor one .safetensors file alone; name the file"
        )
    return [AdapterSource(open_store(found[0], allow_pickle))]


def _peft_source(folder: Path, component: str, allow_pickle: bool) -> AdapterSource:
    config = read_json(folder / CONFIG)
    kind = str(config.get("peft_type"))
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise LdmError(f"{folder} is an adapter of peft's kind {kind}, which is not read; LORA, LOHA and LOKR are")
    weights = next((folder / name for name in _PEFT if (folder / name).is_file()), None)
    if weights is None:
        raise LdmError(f"{folder} holds {CONFIG}, but not {_PEFT[0]}")
    return AdapterSource(open_store(weights, allow_pickle), component, config)


def _digest(files: list[Path]) -> str:
    """SHA-256 of files, one after the other; the digest in a file's own header is checked."""
    digest = hashlib.sha256()
    for file in files:
        check_digest(file)
        with file.open("rb") as opened:
            while piece := opened.read(2**22):
                digest.update(piece)
    return digest.hexdigest()


# --- the settings of a configuration ----------------------------------------------------------------------------------

# options of peft that change what an adapter computes, and are not read
_UNREAD = (
    "layer_replication", "modules_to_save", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "velora_config", "trainable_token_indices", "target_parameters", "lora_bias",
)  # fmt: skip
_REBASED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initial values that also change the base's weights


def _scaling(where: str, config: Mapping[str, Any]) -> Scaling:
    """The scaling that a configuration of peft states.

    Raises:
        LdmError: an option that changes the result is not read, or a number is none.
    """
    unread = [name for name in _UNREAD if config.get(name)]
    if config.get("bias", "none") != "none":
        unread.append("bias")
    if unread:
        raise LdmError(f"{where}: {', '.join(unread)} set to {config[unread[0]]!r} is not read here; leave it unset")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_REBASED):
        raise LdmError(
            f"{where}: init_lora_weights {start!r} changed the base model too; save the adapter converted to a plain "
            "LoRA (path_initial_model_for_weight_conversion=)"
        )
    numbers = {name: config.get(name) for name in ("r", "lora_alpha", "alpha") if config.get(name) is not None}
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise LdmError(f"{where}: {name} is {patterns!r}; a JSON object is needed")
        for key in patterns:
            try:
                re.compile(key)
            except re.error:
                raise LdmError(f"{where}: {name} of {key!r} is no regular expression") from None
        numbers |= {f"{name} of {key}": value for key, value in patterns.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LdmError(f"{where}: {name} is {value!r}; a number is needed")
    return Scaling(
        config.get("lora_alpha", config.get("alpha")),
        config.get("alpha_pattern") or {},
        config.get("r"),
        config.get("rank_pattern") or {},
        bool(config.get("use_rslora")),
    )


def _scalings(source: AdapterSource) -> dict[str, Scaling]:
    """The scaling of each component that a configuration beside the tensors, or the metadata, states."""
    if source.config:
        return {"": _scaling(str(source.file.parent / CONFIG), source.config)}
    text = source.store.metadata.get(METADATA)
    if not text:
        return {}
    where = f"{source.file}: {METADATA}"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LdmError(f"{where} is not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise LdmError(f"{where} holds a JSON {type(content).__name__}, not an object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, option = key.partition(".")
        configs.setdefault(component, {})[option] = value
    return {component: _scaling(f"{where}, {component}", config) for component, config in configs.items()}


# --- tensors and layers -----------------------------------------------------------------------------------------------


@dataclass
class Matched:
    """An adapter file's tensors by the layers of a model."""

    parts: dict[Place, dict[str, str]] = field(default_factory=dict)  # part -> the tensor's name
    namings: Counter[str] = field(default_factory=Counter)  # layers named in each format
    unknown: list[str] = field(default_factory=list)  # names that match nothing


def _matched(source: AdapterSource, model: Components, partial: bool) -> Matched:
    """Match a file's tensors with a model's layers by names and shapes.

    Raises:
        LdmError: the file is no adapter, is of a kind that is not read, or does not fit the model.
    """
    file, infos = source.file, source.store.infos
    stems: dict[str, dict[str, str]] = {}
    result = Matched()
    for name in infos:
        stem, part = layers.split(names.modern(name))
        if not part:
            if not name.startswith("bundle_emb."):
                result.unknown.append(name)
        elif part in stems.setdefault(stem, {}):
            raise LdmError(f"{file} holds both {stems[stem][part]} and {name}, which mean the same; keep one of them")
        else:
            stems[stem][part] = name
    _check_kind(file, infos, stems, result.unknown)
    misshapen = _placed(source, model, stems, result)
    if (result.unknown or misshapen) and (other := origin.mismatch(infos, source.store.metadata, model.family)):
        raise LdmError(f"{file} {other}; choose an adapter of the model's family, or another model")
    if misshapen:
        raise LdmError(f"{file}: the tensors of {len(misshapen)} layers do not fit the model: {listing(misshapen, 2)}")
    _check_unknown(file, result, partial)
    return result


def _placed(
    source: AdapterSource, model: Components, stems: Mapping[str, dict[str, str]], result: Matched
) -> list[str]:
    """Find the layer of the model for each layer of the file; returns those whose shapes do not fit."""
    shapes, biased, known = _shapes(model), _shapes(model, "bias"), names.read(model)
    misshapen = []
    for stem, parts in stems.items():
        named = known.get(stem, [])
        places = [found for found in named if found[1].component == source.component] or named
        if not places:
            result.unknown += parts.values()
            continue
        _check_parts(source.file, stem, parts)
        given = {part: source.store.infos[name].shape for part, name in parts.items()}
        naming, place = next((found for found in places if layers.fits(given, shapes[found[1]])), places[0])
        if not layers.fits(given, shapes[place]):
            misshapen.append(f"{stem} {[list(shape) for shape in given.values()]} (weight {list(shapes[place])})")
        elif "bias" in parts and place not in biased:
            raise LdmError(f"{source.file}: {parts['bias']} changes a bias, and {place.layer} has no bias")
        elif place in result.parts:
            raise LdmError(f"{source.file} names {place.component}'s {place.layer} twice: {stem} is the second")
        result.parts[place] = parts
        result.namings[naming] += 1
    return misshapen


def _shapes(model: Components, parameter: str = "weight") -> dict[Place, tuple[int, ...]]:
    """The shape of each layer's weight, or of another parameter that it has."""
    return {
        Place(component, name.removesuffix(f".{parameter}")): tuple(value.shape)
        for component, network in model.modules().items()
        for name, value in network.named_parameters()
        if name.endswith(f".{parameter}")
    }


def _check_kind(file: Path, infos: Mapping[str, Any], stems: Mapping[str, Any], unknown: list[str]) -> None:
    """Refuse files that are no adapters, and adapters of kinds that are not read."""
    foreign = {kind: name for name in unknown if (kind := origin.foreign_kind(name))}
    if foreign:
        kind, name = next(iter(foreign.items()))
        raise LdmError(
            f"{file} is an adapter of the kind {kind} ({name}), which is not read; LoRA, LoHa, LoKr, DoRA and "
            "differences of weights are"
        )
    if not stems:
        what = origin.other_file(infos) or (f"its tensors are called {listing(unknown)}" if unknown else "it is empty")
        raise LdmError(f"{file} is not an adapter: {what}")


def _check_parts(file: Path, stem: str, parts: Mapping[str, str]) -> None:
    """Refuse a layer that lacks tensors, or has some of several kinds."""
    if layers.form_of(parts) is None and set(parts) - layers.BESIDE:
        raise LdmError(f"{file}: {listing(sorted(parts.values()), 6)} are parts of several kinds of change; keep one")
    if lacking := layers.missing(parts):
        endings = {part: ending for ending, part in reversed(layers.PARTS.items())}
        want, there = (listing(sorted(endings[part] for part in some)) for some in (lacking, parts))
        raise LdmError(f"{file}: {stem} has {there} without {want}; the file is damaged or incomplete")


def _check_unknown(file: Path, found: Matched, partial: bool) -> None:
    """Refuse names that match nothing in the model, or name them in a warning."""
    if not found.parts:
        raise LdmError(f"{file}: none of its tensors match a layer of the model: {listing(found.unknown)}")
    if found.unknown and not partial:
        raise LdmError(
            f"{file}: {len(found.unknown)} tensors match nothing in the model: {listing(found.unknown)}; "
            "use the others alone (partial=True, partial_adapters=True, --partial-adapters)"
        )
    if found.unknown:
        log.warning(
            "%s: %d tensors match nothing in the model and are left out: %s",
            file, len(found.unknown), listing(found.unknown),
        )  # fmt: skip


def _changes(sources: list[AdapterSource], matched: list[Matched], model: Components) -> dict[str, dict[str, Change]]:
    """The changes of each component's weights."""
    shapes = _shapes(model)
    changes: dict[str, dict[str, Change]] = {}
    for source, found in zip(sources, matched, strict=True):
        scalings = _scalings(source)
        tensors: dict[str, Tensor] = dict(
            source.store.read([name for parts in found.parts.values() for name in parts.values()], None, "cpu")
        )
        _check_finite(source.file, tensors)
        for place, parts in found.parts.items():
            scaling = scalings.get("") or scalings.get(place.component) or Scaling()
            made = layers.changes_of(
                {part: tensors[name] for part, name in parts.items()}, place.layer, shapes[place], scaling
            )
            changes.setdefault(place.component, {}).update(made)
    return changes


def _check_finite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are not finite. A sum is finite if its terms are; the terms of others are looked at."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            if tensor.numel() != 1:  # alphas may be whole numbers
                raise LdmError(f"{file}: {name} holds numbers of type {tensor.dtype}; the file is damaged")
        elif not tensor.sum(dtype=torch.float32).isfinite() and not tensor.float().isfinite().all():
            bad = int((~tensor.float().isfinite()).sum())
            raise LdmError(f"{file}: {name} holds {bad} numbers that are not finite; the file is damaged")


def _adapter(
    path: Path, sources: list[AdapterSource], matched: list[Matched], changes: dict[str, dict[str, Change]], digest: str
) -> Adapter:
    """The adapter made of all that was found."""
    kinds = dict.fromkeys(layers.kind_of(parts) for found in matched for parts in found.parts.values())
    namings = sum((found.namings for found in matched), Counter[str]())
    bundled = tuple(name for source in sources for name in origin.embeddings(source.store.infos))
    if bundled:
        log.warning("%s holds textual-inversion embeddings too, which are not used: %s", path, listing(list(bundled)))
    metadata = {key: value for source in sources for key, value in source.store.metadata.items()}
    name = path.stem if path.is_file() else path.name
    return Adapter(
        name, path, ", ".join(kinds), namings.most_common(1)[0][0], changes, metadata, digest, bundled
    )  # fmt: skip
