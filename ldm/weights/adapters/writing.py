"""Writing an adapter: kohya's names (read by the web interfaces and ComfyUI), diffusers' names, and peft's folders.

kohya's format holds every kind of change. diffusers and peft hold LoRA and DoRA; there, alpha is the rank, and a scale
of another size is multiplied into the factors, so that every reader scales alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.files import DIGEST, replacing, write_json
from ldm.patches.low_rank import Change, Decomposed, Difference, Factors, Hadamard, Kronecker, LowRank
from ldm.weights.adapters import layers, origin
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.names import Place, written
from ldm.weights.adapters.reading import CONFIG, METADATA
from ldm.weights.components import Components
from ldm.weights.tensors import Output, TensorInfo, write_safetensors

FORMATS = {  # name -> what is written
    "kohya": "one file with kohya's names: for A1111's programs, ComfyUI, kohya's scripts, and diffusers",
    "diffusers": "one file with diffusers' names",
    "peft": "a folder for each network with peft's names and configuration",
}
_ENDINGS = {part: ending for ending, part in reversed(layers.PARTS.items())}  # kohya's: the first of each part
_PEFT_ENDINGS = {"up": "lora_B.weight", "down": "lora_A.weight", "norms": "lora_magnitude_vector"}
_VERSIONS = {  # family in words -> kohya's name of the base model, and that of the modelspec standard
    "SD 1.x": ("sd_v1", "stable-diffusion-v1"),
    "SD 2.x": ("sd_v2", "stable-diffusion-v2"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SDXL's refiner": ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner"),
}


def write_adapter(
    adapter: Adapter,
    model: Components,
    path: Path,
    naming: str,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter for a model in one of `FORMATS`, atomically; the adapter's metadata is kept.

    Raises:
        LdmError: the format cannot hold the adapter, the path exists and `overwrite` is not set, or writing fails.
    """
    if naming == "kohya":
        names = written(model, "kohya-sgm" if model.family.xl else "kohya")
        tensors, metadata = _kohya(adapter, names), _kohya_metadata(adapter, origin.family_word(model.family))
    else:
        names = {place: name.removeprefix("base_model.model.") for place, name in written(model, "peft").items()}
        if naming == "peft":
            _write_peft(adapter, names, path, dtype, overwrite)
            return
        tensors = {
            f"{component}.{name}": tensor
            for component in adapter.changes
            for name, tensor in _peft(adapter, component, names).items()
        }
        configs = {component: _config(adapter, component, names) for component in adapter.changes}
        flat = {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}
        metadata = {METADATA: json.dumps(flat, sort_keys=True)}
    outputs = _outputs(tensors, dtype)
    own = {key: value for key, value in adapter.metadata.items() if key not in ("format", DIGEST, METADATA)}
    with replacing(path, False, overwrite, sum(output.info.nbytes for output in outputs)) as temporary:
        write_safetensors(temporary, outputs, {**own, **metadata})


def _outputs(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[Output]:
    return [
        Output(name, TensorInfo(dtype or tensor.dtype, tuple(tensor.shape)), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    ]


# --- kohya ------------------------------------------------------------------------------------------------------------


def _kohya(adapter: Adapter, names: Mapping[Place, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for component, changes in adapter.changes.items():
        for parameter, change in changes.items():
            layer, _, kind = parameter.rpartition(".")
            parts = {"bias": _value(change)} if kind == "bias" else parts_of(change)
            tensors |= {f"{names[Place(component, layer)]}.{_ENDINGS[part]}": value for part, value in parts.items()}
    return tensors


def parts_of(change: Change) -> dict[str, Tensor]:
    """The tensors that store the change of a weight, by their parts in `layers.PARTS`."""
    if isinstance(change, Decomposed):
        return parts_of(change.change) | {"norms": change.norms}
    if isinstance(change, LowRank):
        parts = {"up": change.up, "down": change.down, "alpha": torch.tensor(change.scale * len(change.down))}
        return parts if change.core is None else parts | {"core": change.core}
    if isinstance(change, Hadamard):
        parts = _factor_parts("hada_w1", "hada_t1", change.first) | _factor_parts("hada_w2", "hada_t2", change.second)
        return parts | {"alpha": torch.tensor(change.scale * len(change.first.b))}
    if isinstance(change, Kronecker):
        return _kronecker_parts(change)
    return {"diff": _value(change)}


def _factor_parts(name: str, core: str, factors: Factors) -> dict[str, Tensor]:
    parts = {f"{name}_a": factors.a, f"{name}_b": factors.b}
    return parts if factors.core is None else parts | {core: factors.core}


def _kronecker_parts(change: Kronecker) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name, core, factor in (("lokr_w1", "lokr_t1", change.first), ("lokr_w2", "lokr_t2", change.second)):
        parts |= {name: factor} if isinstance(factor, Tensor) else _factor_parts(name, core, factor)
    ranks = [len(factor.b) for factor in (change.second, change.first) if isinstance(factor, Factors)]
    if ranks:
        return parts | {"alpha": torch.tensor(change.scale * ranks[0])}
    return parts | {"lokr_w1": change.scale * parts["lokr_w1"]}  # two whole factors have no alpha


def _value(change: Change) -> Tensor:
    assert isinstance(change, Difference)
    return change.value


def _kohya_metadata(adapter: Adapter, family: str) -> dict[str, str]:
    """The metadata of kohya's scripts and of the modelspec standard; values in the adapter's own come first."""
    own, loras = adapter.metadata, _loras(adapter).values()
    metadata: dict[str, Any] = {"modelspec.title": own.get("modelspec.title", adapter.name)}
    if loras:
        ranks = Counter(len(lora.down) for lora in loras)
        alphas = Counter(round(len(lora.down) * lora.scale, 6) for lora in loras)
        metadata |= {"ss_network_dim": _usual(ranks), "ss_network_alpha": _usual(alphas)}
    if family in _VERSIONS:
        version, architecture = _VERSIONS[family]
        metadata |= {
            "ss_base_model_version": version,
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{architecture}/lora",
        }
    plain = adapter.kind in ("LoRA", "DoRA")
    metadata["ss_network_module"] = own.get("ss_network_module", "networks.lora" if plain else "lycoris.kohya")
    return {key: str(value) for key, value in metadata.items()}


def _loras(adapter: Adapter) -> dict[Place, LowRank]:
    """Every LoRA and DoRA, by layer."""
    return {
        Place(component, name.removesuffix(".weight")): inner
        for component, own in adapter.changes.items()
        for name, change in own.items()
        if isinstance(inner := _inner(change), LowRank)
    }


def _inner(change: Change) -> Change:
    """The change within a DoRA; others as they are."""
    return change.change if isinstance(change, Decomposed) else change


def _usual(counts: Counter[Any]) -> Any:
    """The most frequent value."""
    return counts.most_common(1)[0][0]


# --- diffusers and peft -----------------------------------------------------------------------------------------------


def _peft(adapter: Adapter, component: str, names: Mapping[Place, str]) -> dict[str, Tensor]:
    """The tensors of one network's changes, by the names of its layers and peft's endings."""
    tensors: dict[str, Tensor] = {}
    if plain := _beside_dora(adapter, component):
        raise LdmError(
            f"{adapter.file}: {component} has layers of DoRA and others without its norms, such as {plain}, and "
            "diffusers and peft read all of a network as DoRA or none; write kohya's (--format kohya)"
        )
    for parameter, change in adapter.changes[component].items():
        norms = change.norms if isinstance(change, Decomposed) else None
        inner = _inner(change)
        rows = len(inner.up) if isinstance(inner, LowRank) else 0
        per_input = norms is not None and norms.shape[0] == 1 != rows
        if not isinstance(inner, LowRank) or inner.core is not None or per_input:
            kind = "DoRA with norms over outputs" if per_input else type(inner).__name__
            raise LdmError(
                f"{adapter.file}: {component}'s {parameter} is a change of the kind {kind}, which diffusers' format "
                "cannot hold; write kohya's (--format kohya), or make it a LoRA first (ldm adapter resize)"
            )
        up = inner.up if inner.scale == 1 else (inner.scale * inner.up.float()).to(inner.up.dtype)
        parts = {"up": up, "down": inner.down}
        if norms is not None:
            parts["norms"] = norms.flatten() if norms.ndim == 2 else norms.reshape(1, -1, 1, 1)
        layer = names[Place(component, parameter.removesuffix(".weight"))]
        tensors |= {f"{layer}.{_PEFT_ENDINGS[part]}": value for part, value in parts.items()}
    return tensors


def _beside_dora(adapter: Adapter, component: str) -> str:
    """A parameter that is no DoRA in a network where others are; "" if there is none."""
    changes = adapter.changes[component]
    plain = [name for name, change in changes.items() if not isinstance(change, Decomposed)]
    return plain[0] if plain and len(plain) < len(changes) else ""


def _config(adapter: Adapter, component: str, names: Mapping[Place, str]) -> dict[str, Any]:
    """peft's configuration of one network's LoRA."""
    loras = _loras(adapter)
    ranks = {names[place]: len(lora.down) for place, lora in loras.items() if place.component == component}
    usual = _usual(Counter(ranks.values()))
    other = {layer: rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "use_dora": any(isinstance(change, Decomposed) for change in adapter.changes[component].values()),
        "lora_bias": False,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write_peft(
    adapter: Adapter, names: Mapping[Place, str], path: Path, dtype: torch.dtype | None, overwrite: bool
) -> None:
    """A folder for each network, named after it."""
    parts = {}
    for component in adapter.changes:
        tensors = {f"base_model.model.{name}": tensor for name, tensor in _peft(adapter, component, names).items()}
        parts[component] = _outputs(tensors, dtype), _config(adapter, component, names)
    need = sum(output.info.nbytes for outputs, _ in parts.values() for output in outputs)
    with replacing(path, True, overwrite, need) as temporary:
        for component, (outputs, config) in parts.items():
            folder = temporary / component
            folder.mkdir()
            write_json(folder / CONFIG, config)
            write_safetensors(folder / "adapter_model.safetensors", outputs, {})
