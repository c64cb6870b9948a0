"""The diffusers folder: one sub-folder for each component, `model_index.json` above them.

Class names are looked up in fixed tables and file names must not lead out of the folder, so that no code named by a
folder is imported or run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ldm
from ldm.errors import LdmError, listing
from ldm.families import Family, recognised
from ldm.files import Progress, alongside, read_json, replacing, silent, write_json
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNetConfig
from ldm.process import NoiseSchedule
from ldm.weights import configs, layouts
from ldm.weights.components import Components, ComponentSource, Opened
from ldm.weights.downloads import check_texts
from ldm.weights.manifest import NAME as MANIFEST
from ldm.weights.manifest import check_manifest, write_manifest
from ldm.weights.names import INDEX
from ldm.weights.tensors import LINEAGE, NAMES, Output, Store, TensorInfo, open_store, read_header, write_safetensors
from ldm.weights.tokenizer import read_tokenizer, write_tokenizer

log = logging.getLogger(__name__)
UNET_FILE, TEXT_FILE = "diffusion_pytorch_model", "model"  # names of weight files, without extensions

_CLASSES: dict[str, frozenset[str]] = {
    "unet": frozenset(configs.UNET_CLASSES),
    "vae": frozenset(configs.AUTOENCODER_CLASSES),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
    "tokenizer": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
    "tokenizer_2": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
    "scheduler": configs.SCHEDULERS,
}
COMPONENTS = tuple(_CLASSES)
_UNUSED = frozenset(
    {"safety_checker", "feature_extractor", "image_encoder", "watermark"}
)  # components without effect on images
_PIPELINES = re.compile(
    r"(Stable|Latent)Diffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline(Legacy)?"
    r"|LatentConsistencyModel(Img2Img)?Pipeline"
)

# names of superfluous tensors in older files of a component
IGNORED = {
    "vae": re.compile(r"(.*\.)?(loss|model_ema)\..*"),
    "text_encoder": re.compile(
        r"(.*\.)?(position_ids|logit_scale|attn_mask|text_projection(\.weight)?)"
        r"|(.*\.)?(vision_model\..*|visual_projection\.weight|visual\..*)"  # the image tower of a whole CLIP model
    ),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def open_folder(
    folder: Path,
    variant: str | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    progress: Progress = silent,
    lender: Path | None = None,
) -> Opened:
    """Open a diffusers folder: find family, tokenizers and the files of each component, without loading weights.

    `variant` selects weights such as "fp16" (default: the weights without a variant, or the only variant). With
    `verify`, all files are checked against the folder's manifest; if it has none, configurations and tokenizers that
    came from the Hub are checked against its digests. Components that the folder lacks are taken from the folder
    `lender`.

    Raises:
        LdmError: the folder is not a model that we support, or is damaged; the message names the file.
    """
    index = _read_index(folder)
    components = [name for name, value in index.items() if _class_of(value) and name not in _UNUSED]
    towers = [name for name in ("text_encoder", "text_encoder_2") if name in components]
    needed = ["unet", "vae", "scheduler", *towers, *(name.replace("text_encoder", "tokenizer") for name in towers)]
    places = {name: folder / name if (folder / name).is_dir() or not lender else lender / name for name in needed}
    absent = [name for name in needed if name not in components or not places[name].is_dir()]
    if absent or not towers:
        raise LdmError(f"{folder}: {listing(absent or ['text_encoder'])} missing; a whole model is needed")
    files = {name: weight_files(places[name], name, variant, allow_pickle) for name in ("unet", "vae", *towers)}

    def check() -> None:
        for place in {path.parent for path in places.values()}:
            own = [file for name, group in files.items() if places[name].parent == place for file in group]
            if not check_manifest(place, own, progress):
                check_texts(path for path in (place, *places.values()) if place in (path, path.parent))

    with alongside(check) if verify else nullcontext():
        return _described(folder, index, places, {name: store_of(group, allow_pickle) for name, group in files.items()})


def _described(folder: Path, index: dict[str, Any], places: dict[str, Path], stores: dict[str, Store]) -> Opened:
    """The family, read from a folder's configurations and the headers of its weights."""
    towers = [name for name in stores if name.startswith("text_encoder")]
    tokenizers = [read_tokenizer(places[name.replace("text_encoder", "tokenizer")]) for name in towers]
    text = tuple(
        read_text_config(places[name], name, tokenizer) for name, tokenizer in zip(towers, tokenizers, strict=True)
    )
    unet = read_unet_config(places["unet"], text[-1].projection)
    vae = read_autoencoder_config(places["vae"])
    schedule = read_schedule_config(places["scheduler"])
    for name, kind in (("vae", "VQModel" if vae.codebook else "AutoencoderKL"), ("scheduler", schedule.scheduler)):
        if _class_of(index[name]) != kind:
            raise LdmError(
                f"{folder / INDEX}: {name} is {_class_of(index[name])!r}, its own configuration says {kind!r}"
            )
    family = Family("custom", unet, vae, text, schedule)
    if ("XL" in index["_class_name"]) != family.xl:
        raise LdmError(f"{folder / INDEX}: {index['_class_name']!r} does not go with a U-Net of this kind")
    zeros = index.get("force_zeros_for_empty_prompt", family.xl and not family.refiner)
    if not isinstance(zeros, bool):
        raise LdmError(f"{folder / INDEX}: force_zeros_for_empty_prompt is {zeros!r}; true or false is needed")
    family = recognised(replace(family, zero_empty_prompt=zeros))
    parts = {name: component_part(name, store, family) for name, store in stores.items()}
    ignored = [name for name, value in index.items() if name in _UNUSED and _class_of(value)]
    return Opened(str(folder), "diffusers folder", family, tokenizers, parts, ignored)


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        inside = sorted(path.name for path in folder.iterdir())
        holds = f"it holds {listing(inside)}" if inside else "it is empty"
        raise LdmError(f"{folder} is not a model folder: {INDEX} is missing, {holds}")
    index = read_json(folder / INDEX)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not _PIPELINES.fullmatch(pipeline):
        raise LdmError(f"{folder / INDEX}: {pipeline!r} is not a pipeline of Stable Diffusion 1, 2 or XL")
    for name, value in index.items():
        if isinstance(value, list) and len(value) != 2:
            raise LdmError(f"{folder / INDEX}: {name!r} is {value!r}; a library and a class are needed")
        if not _class_of(value) or name in _UNUSED:
            continue
        if name not in _CLASSES or _class_of(value) not in _CLASSES[name]:
            known = f"; {name} must be {' or '.join(sorted(_CLASSES[name]))}" if name in _CLASSES else ""
            raise LdmError(
                f"{folder / INDEX}: component {name!r} of class {_class_of(value)!r} is not supported{known}"
            )
    return index


def _class_of(value: Any) -> str | None:
    return value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else None


def base_name(component: str) -> str:
    """The name of a component's weight file without extensions; transformers and diffusers use different names."""
    return TEXT_FILE if component.startswith(("text_encoder", "safety_checker")) else UNET_FILE


def weight_names(names: Collection[str], base: str, variant: str | None, allow_pickle: bool) -> list[str]:
    """The names of the weight files to read: one file, or an index and its shards; empty if there are none.

    Without `variant`, the weights without a variant are chosen, or else the only variant (except "non_ema").

    Raises:
        LdmError: the folder holds both a single file and shards.
    """
    ending = re.compile(rf"{base}(?:\.(\w+))?\.safetensors|{base}\.safetensors\.index(?:\.(\w+))?\.json")
    found = {match[1] or match[2] or "" for name in names if (match := ending.fullmatch(name))}
    others = found - {"", "non_ema"}
    chosen = variant or ("" if "" in found or len(others) != 1 else others.pop())
    dot = f".{chosen}" if chosen else ""
    single, index = f"{base}{dot}.safetensors", f"{base}.safetensors.index{dot}.json"
    if single in names and index in names:
        raise LdmError(f"both {single} and {index} are there; take one of them away")
    if single in names:
        return [single]
    if index in names:
        shard = re.compile(rf"{base}(?:{re.escape(dot)}-\d+-of-\d+|-\d+-of-\d+{re.escape(dot)})\.safetensors")
        return [index, *sorted(name for name in names if shard.fullmatch(name))]
    pickle = "pytorch_model.bin" if base == TEXT_FILE else f"{base}.bin"
    return [pickle] if allow_pickle and not variant and pickle in names else []


def weight_files(folder: Path, component: str, variant: str | None = None, allow_pickle: bool = False) -> list[Path]:
    """The files that hold a component's weights: one file, or all shards.

    Raises:
        LdmError: no file is found, or only pickles without `allow_pickle`, or a shard's name leads out of the folder.
    """
    names = sorted(path.name for path in folder.iterdir())
    base = base_name(component)
    try:
        chosen = weight_names(names, base, variant, allow_pickle)
    except LdmError as error:
        raise LdmError(f"{folder}: {error}") from None
    only = re.fullmatch(rf"{base}(?:\.safetensors\.index)?\.(\w+)\.(?:safetensors|json)", chosen[0]) if chosen else None
    if only and not variant:
        log.warning("%s: %s is read, the only variant of the weights that is there", folder, only[1])
    if chosen and chosen[0].endswith(".json"):
        return _shards(folder / chosen[0])
    if chosen:
        return [folder / chosen[0]]
    if variant:
        raise LdmError(f"{folder} has no weights of the variant {variant!r}; it has {listing(names)}")
    if pickles := weight_names(names, base, None, allow_pickle=True):
        open_store(folder / pickles[0], allow_pickle=False)  # raises the error that explains pickles
    raise LdmError(f"{folder} has no weights ({base}.safetensors); it has {listing(names)}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LdmError(f"{index} has no weight_map")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise LdmError(f"{index}: the shard {name!r} is not a plain name of a safetensors file")
        if not (index.parent / name).is_file():
            raise LdmError(f"{index}: the shard {name} is missing")
    files = [index.parent / name for name in sorted(set(names))]
    stated = {(name, tensor) for tensor, name in weight_map.items()}
    there = {(file.name, tensor) for file in files for tensor in read_header(file)[0]}
    if stated != there:
        wrong = sorted(tensor for _, tensor in stated ^ there)
        raise LdmError(f"{index} does not agree with its shards on {listing(wrong)}")
    return files


def store_of(files: list[Path], allow_pickle: bool) -> Store:
    """The tensors in the files from `weight_files`."""
    return open_store(files[0], allow_pickle) if len(files) == 1 else Store(files)


def component_part(name: str, store: Store, family: Family) -> ComponentSource:
    """The tensors of a file that holds one component, in any known layout of such files."""
    if name == "unet":
        original = [(prefix, layouts.original_unet(family.unet, prefix)) for prefix in ("", layouts.UNET_PREFIX)]
        return ComponentSource(store, [("", layouts.diffusers), *original])
    if name == "vae":
        config = family.autoencoder
        original = [(p, layouts.original_autoencoder(config, p)) for p in ("", layouts.AUTOENCODER_PREFIX)]
        ours = [("", layouts.diffusers), ("", layouts.diffusers_attention_of_old)]
        return ComponentSource(store, [*ours, *original], IGNORED["vae"])
    index = [config.component for config in family.text].index(name)
    names = [("", layouts.transformers), ("", layouts.transformers_flat), ("", layouts.open_clip(""))]
    prefix = layouts.tower_prefix(family, index)
    names.append((prefix, layouts.original_tower(family.text[index], prefix)))
    return ComponentSource(store, names, tower_ignored(family.text[index]))


def tower_ignored(config: TextEncoderConfig) -> re.Pattern[str]:
    """Names of a text tower's tensors that are ignored: buffers, and OpenCLIP's last block if the tower omits it."""
    last = rf"|(.*\.)?resblocks\.{config.layers}\..*" if config.open_clip and not config.projection else ""
    return re.compile(IGNORED["text_encoder"].pattern + last)


def read_unet_config(folder: Path, pooled_dim: int) -> UNetConfig:
    """The U-Net described in a folder; `pooled_dim` is the width of the text encoders' pooled text."""
    return configs.read_unet(f"{folder}/config.json", read_json(folder / "config.json"), pooled_dim)


def read_autoencoder_config(folder: Path) -> AutoencoderConfig:
    """The autoencoder described in a folder."""
    return configs.read_autoencoder(f"{folder}/config.json", read_json(folder / "config.json"))


def read_schedule_config(folder: Path) -> NoiseSchedule:
    """The noise schedule described in a folder."""
    file = folder / "scheduler_config.json"
    return configs.read_schedule(str(file), read_json(file))


def read_text_config(folder: Path, component: str, tokenizer: Tokenizer) -> TextEncoderConfig:
    """The tower described in a folder, for the component `text_encoder` or `text_encoder_2`."""
    where = f"{folder}/config.json"
    projects = component == "text_encoder_2"
    config = configs.read_text(where, read_json(folder / "config.json"), projects, tokenizer.pad, tokenizer.end_id)
    if tokenizer.context not in (None, config.context):
        raise LdmError(
            f"{where}: the text encoder reads {config.context} tokens, its tokenizer makes {tokenizer.context}"
        )
    return config


# --- writing ----------------------------------------------------------------------------------------------------------


def write_folder(
    model: Components,
    folder: Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    max_shard_size: int = 10 * 10**9,
    overwrite: bool = False,
    progress: Progress = silent,
    lineage: str = "",
) -> None:
    """Write a model atomically as a folder that diffusers opens, with a manifest of digests.

    `dtype` converts floating-point weights, `variant` goes into file names (diffusers: "fp16"), files larger than
    `max_shard_size` bytes are split. `lineage`, if it is not empty, goes into the header of each file.

    Raises:
        LdmError: the folder exists and `overwrite` is not set, or it is not a model; writing fails; the disk is full.
    """
    if overwrite and folder.is_dir():
        _check_replaceable(folder)
    check_float(dtype)
    configs.check_writable(model.family)
    if variant and not re.fullmatch(r"\w+", variant):
        raise LdmError(f"variant {variant!r}: letters, digits and underscores only")
    outputs = {name: _outputs(name, module, dtype) for name, module in model.modules().items()}
    total = sum(output.info.nbytes for group in outputs.values() for output in group)
    header = {LINEAGE: lineage} if lineage else {}
    with replacing(folder, folder=True, overwrite=overwrite, need=total) as temporary:
        digests: dict[str, str] = {}
        done = 0
        for name, group in outputs.items():
            (temporary / name).mkdir()
            base = base_name(name)
            shards = _split(group, max_shard_size)
            for number, shard in enumerate(shards, 1):
                file = _shard_name(base, variant, number, len(shards))
                start = done

                def report(what: str, part: int, _: int, start: int = start) -> None:
                    progress(what, start + part, total)

                digests[f"{name}/{file}"] = write_safetensors(temporary / name / file, shard, header, report)
                done += sum(output.info.nbytes for output in shard)
            if len(shards) > 1:
                dot = f".{variant}" if variant else ""
                write_json(temporary / name / f"{base}.safetensors.index{dot}.json", _index(base, variant, shards))
        _write_configs(model, temporary)
        write_manifest(temporary, digests)


def _check_replaceable(folder: Path) -> None:
    """Raise unless a folder is empty or holds only a model, because replacing deletes all its files."""
    inside = {path.name for path in folder.iterdir()}
    if inside and INDEX not in inside:
        raise LdmError(f"{folder} is not a model folder, so it is not replaced; choose another name")
    strange = sorted(inside - {INDEX, MANIFEST, "README.md", ".gitattributes", *_CLASSES, *_UNUSED})
    if strange:
        raise LdmError(f"{folder} holds more than a model ({listing(strange)}), so it is not replaced; move these away")


def check_float(dtype: torch.dtype | None) -> None:
    """Check that weights can be written as `dtype`.

    Raises:
        LdmError: `dtype` is not a floating-point type that safetensors files support.
    """
    if dtype is not None and (not dtype.is_floating_point or dtype not in NAMES):
        raise LdmError(f"weights cannot be written as {dtype}; choose torch.float32, float16 or bfloat16")


def _outputs(name: str, module: nn.Module, dtype: torch.dtype | None) -> list[Output]:
    layout = layouts.transformers if name.startswith("text_encoder") else layouts.diffusers
    return link_outputs(layout(dict(module.named_parameters())), module, dtype)


def link_outputs(links: list[layouts.Link], module: nn.Module, dtype: torch.dtype | None) -> list[Output]:
    """The tensors to write for a module's parameters, in the layout of the links.

    Raises:
        LdmError: the parameters are quantised or offloaded.
    """
    parameters = dict(module.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise LdmError("weights that are offloaded layer by layer cannot be written; load the model without offload")
    if any(type(parameter) not in (nn.Parameter, Tensor) for parameter in parameters.values()):
        raise LdmError("quantised weights cannot be written; load the model without quantize")
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return [
        Output(
            link.theirs,
            TensorInfo(dtype or parameters[link.ours[0]].dtype, link.shape(shapes)),
            partial(_gather, link, parameters),
        )
        for link in links
    ]


def write_weights(
    path: Path,
    links: list[layouts.Link],
    module: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    lineage: str = "",
) -> None:
    """Write a module's parameters atomically as one file, in the layout of the links.

    `dtype` converts the weights; `lineage`, if it is not empty, goes into the header.

    Raises:
        LdmError: the file exists and `overwrite` is not set, or writing fails; or as `link_outputs`.
    """
    check_float(dtype)
    outputs = link_outputs(links, module, dtype)
    with replacing(path, False, overwrite, sum(output.info.nbytes for output in outputs)) as temporary:
        write_safetensors(temporary, outputs, {LINEAGE: lineage} if lineage else {})


def _gather(link: layouts.Link, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    return link.to_theirs([parameters[name].detach() for name in link.ours])


def _split(outputs: list[Output], size: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.info.nbytes > size:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.info.nbytes
    return shards


def _shard_name(base: str, variant: str | None, number: int, count: int) -> str:
    dot = f".{variant}" if variant else ""
    return f"{base}{dot}.safetensors" if count == 1 else f"{base}{dot}-{number:05d}-of-{count:05d}.safetensors"


def _index(base: str, variant: str | None, shards: list[list[Output]]) -> dict[str, Any]:
    total = sum(output.info.nbytes for shard in shards for output in shard)
    names = {
        output.name: _shard_name(base, variant, number, len(shards))
        for number, shard in enumerate(shards, 1)
        for output in shard
    }
    return {"metadata": {"total_size": total}, "weight_map": names}


def _write_configs(model: Components, folder: Path) -> None:
    family = model.family
    write_json(folder / INDEX, _model_index(family))
    write_json(folder / "unet" / "config.json", configs.write_unet(family.unet))
    write_json(folder / "vae" / "config.json", configs.write_autoencoder(family.autoencoder))
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", configs.write_schedule(family.schedule))
    for config, tokenizer in zip(family.text, model.text_encoders.tokenizers, strict=True):
        write_json(folder / config.component / "config.json", configs.write_text(config, tokenizer.end_id))
        write_tokenizer(tokenizer, folder / config.component.replace("text_encoder", "tokenizer"))


def _model_index(family: Family) -> dict[str, Any]:
    kind = "Img2Img" if family.refiner else {"text": "", "inpaint": "Inpaint", "edit": "InstructPix2Pix"}[family.task]
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if family.xl else ''}{kind}Pipeline",
        "_diffusers_version": version("diffusers"),
        "_ldm_version": ldm.__version__,
        "scheduler": ["diffusers", family.schedule.scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "VQModel" if family.autoencoder.codebook else "AutoencoderKL"],
    }
    for config in family.text:
        classes = ("CLIPTextModelWithProjection" if config.projection else "CLIPTextModel", "CLIPTokenizer")
        names = (config.component, config.component.replace("text_encoder", "tokenizer"))
        index |= {name: ["transformers", kind] for name, kind in zip(names, classes, strict=True)}
    if family.xl:
        for name in ("text_encoder", "tokenizer"):
            index.setdefault(name, [None, None])
        index["force_zeros_for_empty_prompt"] = family.zero_empty_prompt
        if family.refiner:
            index["requires_aesthetics_score"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index
