"""`ldm adapter`: describes, merges, extracts, resizes and converts adapters."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldm.cli.common import counter, is_family, log_warnings, progress
from ldm.errors import LdmError
from ldm.families import FAMILIES, family_named
from ldm.files import check_destination
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unfilled import unfilled
from ldm.weights.adapters import Adapter, layers, open_adapter, origin
from ldm.weights.adapters.factoring import Kept, check_reduction, extracted, resized
from ldm.weights.adapters.reading import look_into
from ldm.weights.adapters.writing import FORMATS, write_adapter
from ldm.weights.builtin import builtin_adapter
from ldm.weights.components import Components, build
from ldm.weights.sources import open_source
from pipelines.adapters import adapted
from pipelines.mixes import MixedAdapter, parse_mix, wanted
from pipelines.tuning import dtype_named

_FAMILIES = {"SD 1.x": "sd15", "SD 2.x": "sd2", "SDXL": "sdxl", "SDXL's refiner": "sdxl-refiner"}


def print_adapter(file: str, as_json: bool, allow_pickle: bool) -> None:
    """Print the description of an adapter's file, by names, shapes and metadata."""
    report = describe(builtin_adapter(file) or Path(file), allow_pickle)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in report.items():
        lines = [f"{key}: {part}" for key, part in value.items()] if isinstance(value, dict) else [str(value)]
        for number, line in enumerate(lines):
            table.add_row("" if number else name.replace("_", " "), Text(line))
    Console().print(table)


def describe(path: Path, allow_pickle: bool) -> dict[str, Any]:
    """The description of a file: kind, base model, layers, ranks, alphas, trigger words, and its training record."""
    found = look_into(path, allow_pickle)
    infos, metadata, alphas = found.infos, found.metadata, found.alphas
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in infos.items():
        stem, part = layers.split(name)
        if part:
            parts.setdefault(stem, {})[part] = info.shape
    kinds, ranks = Counter[str](), Counter[int]()
    for own in parts.values():
        kinds[layers.kind_of(own)] += 1
        form = layers.form_of(own)
        if form and not layers.missing(own) and (rank := form.rank(own)):
            ranks[rank] += 1
    foreign = Counter(kind for name in infos if (kind := origin.foreign_kind(name)))
    if not parts and not foreign:
        what = origin.other_file(infos) or "it holds no tensors with an adapter's names"
        raise LdmError(f"{path} is not an adapter: {what}")
    base, named = origin.base_family(infos, metadata), origin.own_model(infos, metadata)
    stated = {key: value for key, value in metadata.items() if key.startswith(("ss_", "modelspec."))}
    return {
        "file": str(path),
        "kind": _counted(kinds or foreign) + (" (not read by this program)" if not parts else ""),
        "base": (f"{named}, like {base}" if named and base else named or base) or "not known",
        "layers": len(parts),
        "rank": _counted(ranks) or "none",
        "alpha": _counted(alphas) or "the rank",
        "parameters": sum(info.numel for info in infos.values()),
        "dtype": " and ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()})),
        "embeddings": ", ".join(origin.embeddings(infos)) or "none",
        "trigger_words": ", ".join(trigger_words(metadata)) or "none in the metadata",
        "training": {key: value if len(value) <= 200 else f"{value[:200]}…" for key, value in stated.items()} or "none",
    }


def _counted(values: Counter[Any]) -> str:
    """Values, the most frequent first, with how often each is there if there are several."""
    if len(values) == 1:
        return str(next(iter(values)))
    return ", ".join(f"{value} (×{count})" for value, count in values.most_common(8)) + (
        " …" if len(values) > 8 else ""
    )


def trigger_words(metadata: Mapping[str, str], most: int = 20) -> list[str]:
    """The words that an adapter was trained with: the stated ones, or else the most frequent tags of its images."""
    if stated := metadata.get("modelspec.trigger_phrase", "").strip():
        return [stated]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts = Counter[str]()
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] += int(count)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(most) if tag]


def merge(
    model: str, dest: str, loras: list[str], dtype: str | None, force: bool, partial: bool, allow_pickle: bool
) -> None:
    """Write a model with adapters merged into its weights."""
    log_warnings()
    path = Path(dest)
    single = path.suffix.lower() == ".safetensors"
    check_destination(path, folder=not single, overwrite=force)
    with progress() as report:
        opened = open_source(model, allow_pickle=allow_pickle, progress=report)
        mix = tuple(_mixed(lora, opened.components, partial, allow_pickle) for lora in loras)
        base = LatentDiffusion.of(opened.load(dtype_named(dtype), progress=report))
        lineage = {
            "merged": [{"file": s.file.name, "sha256": s.sha256, "unet": s.unet, "text": s.text} for s in mix],
            "into": {"model": model, "fingerprint": base.fingerprint()},
        }
        adapted(base, mix).save_pretrained(path, overwrite=force, progress=report, lineage=json.dumps(lineage))
    print(dest)


def _mixed(lora: str, model: Components, partial: bool, allow_pickle: bool) -> MixedAdapter:
    """The adapter that FILE[:WEIGHT] stands for, with its weights."""
    try:
        ((one,),) = wanted(parse_mix(lora), 1)
    except ValueError:
        raise LdmError(f"{lora!r}: FILE, FILE:WEIGHT or FILE:unet=WEIGHT:text=WEIGHT is needed") from None
    adapter = open_adapter(one.name, model, partial=partial, allow_pickle=allow_pickle)
    return MixedAdapter(adapter.name, adapter.file, adapter.digest, "", one.unet, one.text, adapter)


def extract(
    base: str, tuned: str, dest: str, rank: int | None, energy: float | None, format: str, dtype: str | None,
    force: bool, allow_pickle: bool,
) -> None:  # fmt: skip
    """Write the difference of two models as a LoRA."""
    wanted, path = check_reduction(rank, energy), _destination(dest, format, force)
    with progress() as report:
        models = [
            open_source(one, allow_pickle=allow_pickle, progress=report).load(progress=report) for one in (base, tuned)
        ]
    with counter("layers", sum(1 for m in models[0].modules().values() for _ in m.named_parameters())) as advance:
        changes, kept, left_out = extracted(models[0], models[1], wanted, advance)
    adapter = Adapter(path.stem, path, "LoRA", "kohya", changes)
    write_adapter(adapter, models[0], path, format, dtype=dtype_named(dtype) or torch.float16, overwrite=force)
    if left_out:
        print(f"ldm: {left_out} biases, norms and embeddings differ too and are left out", file=sys.stderr)
    _say(kept)
    print(dest)


def resize(
    file: str, dest: str, rank: int | None, energy: float | None, format: str, model: str | None, force: bool,
    partial: bool, allow_pickle: bool,
) -> None:  # fmt: skip
    """Write an adapter at a smaller rank."""
    wanted, path = check_reduction(rank, energy), _destination(dest, format, force)
    adapter, components = _opened(file, model, partial, allow_pickle)
    smaller, kept = resized(adapter, components, wanted)
    write_adapter(smaller, components, path, format, overwrite=force)
    _say(kept)
    print(dest)


def convert(
    file: str, dest: str, format: str, model: str | None, dtype: str | None, force: bool, partial: bool,
    allow_pickle: bool,
) -> None:  # fmt: skip
    """Write an adapter with another format's names."""
    path = _destination(dest, format, force)
    adapter, components = _opened(file, model, partial, allow_pickle)
    write_adapter(adapter, components, path, format, dtype=dtype_named(dtype), overwrite=force)
    print(dest)


def _destination(dest: str, format: str, force: bool) -> Path:
    path = Path(dest)
    if format not in FORMATS:
        raise LdmError(f"--format {format!r} is not known; choose one of: {', '.join(FORMATS)}")
    if (format == "peft") == (path.suffix.lower() == ".safetensors"):
        raise LdmError(f"{dest}: {'a folder' if format == 'peft' else 'a name that ends in .safetensors'} is needed")
    check_destination(path, folder=format == "peft", overwrite=force)
    return path


def _opened(file: str, model: str | None, partial: bool, allow_pickle: bool) -> tuple[Adapter, Components]:
    """An adapter, and the shapes of a model that it fits: the named one, or one of the family that it was made for."""
    log_warnings()
    path = builtin_adapter(file) or Path(file)
    if model is None:
        found = look_into(path, allow_pickle)
        base, own = (tell(found.infos, found.metadata) for tell in (origin.base_family, origin.own_model))
        if own not in FAMILIES and base not in _FAMILIES:
            raise LdmError(f"{file} does not tell which model it is for; name a model or a family (--model sdxl)")
        model = own if own in FAMILIES else _FAMILIES[base]
    if is_family(model):
        with unfilled():
            components = build(family_named(model))
    else:
        components = open_source(model, allow_pickle=allow_pickle, verify=False).components
    return open_adapter(path, components, partial=partial, allow_pickle=allow_pickle), components


def _say(kept: Kept) -> None:
    print(f"ldm: rank {kept.largest} keeps {kept.share:.2%} of the energy (sum of squares)", file=sys.stderr)
