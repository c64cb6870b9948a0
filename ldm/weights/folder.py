"""The diffusers folder: one sub-folder for each component, `model_index.json` above them.

Class names come from closed tables and file names must lie in their folder: nothing that a folder names is imported
or run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

import ldm
from ldm.errors import LdmError, listing
from ldm.families import Family, recognise
from ldm.models.text import TextEncoderConfig
from ldm.models.tokenizer import END, START, VOCAB_SIZE
from ldm.weights import configs, layouts
from ldm.weights.components import Components, Opened, Part
from ldm.weights.files import (
    Output,
    Progress,
    Store,
    TensorInfo,
    open_store,
    read_json,
    replacing,
    silent,
    write_json,
    write_safetensors,
)
from ldm.weights.manifest import check_manifest, write_manifest

INDEX = "model_index.json"
UNET_FILE, TEXT_FILE = "diffusion_pytorch_model", "model"  # the names of weights, without their endings

_CLASSES: dict[str, frozenset[str]] = {
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL", "VQModel"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
    "tokenizer": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
    "tokenizer_2": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
    "scheduler": configs.SCHEDULERS,
}
_UNUSED = frozenset({"safety_checker", "feature_extractor", "image_encoder", "watermark"})  # no picture depends on them
_PIPELINES = re.compile(r"(Stable|Latent)Diffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline(Legacy)?")

# names beside a component's own that files of some age hold
IGNORED = {
    "unet": re.compile("(?!)"),
    "vae": re.compile(r"(.*\.)?loss\..*"),
    "text_encoder": re.compile(r"(.*\.)?(position_ids|logit_scale|attn_mask|text_projection|visual\..*)"),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def open_folder(
    folder: Path,
    variant: str | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Opened:
    """Find out what a diffusers folder holds.

    `variant` picks weights such as "fp16" (default: those without a variant, or the only one there). With `verify`,
    everything that is read is checked against the manifest if the folder has one.

    Raises:
        LdmError: the folder is none of ours or is damaged; the message says where.
    """
    index = _read_index(folder)
    components = [name for name, value in index.items() if _class_of(value) and name not in _UNUSED]
    towers = [name for name in ("text_encoder", "text_encoder_2") if name in components]
    needed = ["unet", "vae", "scheduler", *towers, *(name.replace("text_encoder", "tokenizer") for name in towers)]
    absent = [name for name in needed if name not in components or not (folder / name).is_dir()]
    if absent or not towers:
        raise LdmError(f"{folder}: {listing(absent or ['text_encoder'])} missing; a whole model is needed")
    files = {name: weight_files(folder / name, variant, allow_pickle) for name in ("unet", "vae", *towers)}
    if verify:
        check_manifest(folder, [file for group in files.values() for file in group], progress)
    tokenizers = [read_tokenizer(folder / name.replace("text_encoder", "tokenizer")) for name in towers]
    text = tuple(read_text_config(folder / name, tokenizer) for name, tokenizer in zip(towers, tokenizers, strict=True))
    pooled_dim = text[-1].projection
    unet = configs.read_unet(f"{folder}/unet/config.json", read_json(folder / "unet" / "config.json"), pooled_dim)
    vae = configs.read_autoencoder(f"{folder}/vae/config.json", _config(folder / "vae"))
    schedule_file = folder / "scheduler" / "scheduler_config.json"
    schedule = configs.read_schedule(str(schedule_file), read_json(schedule_file))
    family = Family(
        name=recognise(unet, text, schedule.prediction_type),
        unet=unet,
        autoencoder=vae,
        text=text,
        schedule=schedule,
        zero_empty_prompt=index.get("force_zeros_for_empty_prompt", unet.size_ids == 6) is True,
    )
    parts = {name: component_part(name, _store(group, allow_pickle), family) for name, group in files.items()}
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
        if not isinstance(value, list) or not _class_of(value) or name in _UNUSED:
            continue
        if name not in _CLASSES or _class_of(value) not in _CLASSES[name]:
            known = f"; {name} must be {' or '.join(sorted(_CLASSES[name]))}" if name in _CLASSES else ""
            raise LdmError(
                f"{folder / INDEX}: component {name!r} of class {_class_of(value)!r} is not supported{known}"
            )
    return index


def _class_of(value: Any) -> str | None:
    return value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else None


def _config(folder: Path) -> dict[str, Any]:
    """A component's `config.json`, its class checked."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if folder.name in _CLASSES and name is not None and name not in list(_CLASSES[folder.name]):
        raise LdmError(f"{folder / 'config.json'}: class {name!r} is not {' or '.join(sorted(_CLASSES[folder.name]))}")
    return config


def weight_files(folder: Path, variant: str | None = None, allow_pickle: bool = False) -> list[Path]:
    """The files that hold a component's weights: one, or all its shards.

    Raises:
        LdmError: there are none, or only pickles without `allow_pickle`, or a shard's name leads out of the folder.
    """
    wanted = [variant] if variant else ["", *_variants(folder)]
    for name in wanted:
        for base in (UNET_FILE, TEXT_FILE):
            dot = f".{name}" if name else ""
            single = folder / f"{base}{dot}.safetensors"
            index = folder / f"{base}.safetensors.index{dot}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                return _shards(index)
    if variant:
        raise LdmError(f"{folder} has no weights of the variant {variant!r}; it has {listing(_names(folder))}")
    pickles = [
        path for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin") if (path := folder / name).is_file()
    ]
    if pickles and allow_pickle:
        return pickles[:1]
    if pickles:
        open_store(pickles[0], allow_pickle=False)
    raise LdmError(f"{folder} has no weights ({UNET_FILE}.safetensors or {TEXT_FILE}.safetensors)")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _variants(folder: Path) -> list[str]:
    """Variants that a folder has weights of: one at the most is taken without being asked for."""
    pattern = rf"(?:{UNET_FILE}|{TEXT_FILE})(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)"
    found = {match[1] or match[2] for name in _names(folder) if (match := re.fullmatch(pattern, name))}
    found = {name for name in found if name != "non_ema"}
    return list(found) if len(found) == 1 else []


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
    return [index.parent / name for name in sorted(set(names))]


def _store(files: list[Path], allow_pickle: bool) -> Store:
    return open_store(files[0], allow_pickle) if len(files) == 1 else Store(files)


def component_part(name: str, store: Store, family: Family) -> Part:
    """The tensors of one component alone, in any of the layouts that such files have."""
    if name == "unet":
        original = [(prefix, layouts.original_unet(family.unet, prefix)) for prefix in ("", layouts.UNET_PREFIX)]
        return Part(store, [("", layouts.diffusers), *original])
    if name == "vae":
        config = family.autoencoder
        original = [(p, layouts.original_autoencoder(config, p)) for p in ("", layouts.AUTOENCODER_PREFIX)]
        ours = [("", layouts.diffusers), ("", layouts.diffusers_attention_of_old)]
        return Part(store, [*ours, *original], IGNORED["vae"])
    index = [config.component for config in family.text].index(name)
    names = [("", layouts.transformers), ("", layouts.transformers_flat), ("", layouts.open_clip(""))]
    prefix = layouts.tower_prefix(family, index)
    names.append((prefix, layouts.original_tower(family.text[index], prefix)))
    return Part(store, names, tower_ignored(family.text[index]))


def tower_ignored(config: TextEncoderConfig) -> re.Pattern[str]:
    """Names of a text tower's file that are not needed: leftovers, and OpenCLIP's last block if the model omits it."""
    last = rf"|(.*\.)?resblocks\.{config.layers}\..*" if config.open_clip and not config.projection else ""
    return re.compile(IGNORED["text_encoder"].pattern + last)


def read_text_config(folder: Path, tokenizer: CLIPTokenizer) -> TextEncoderConfig:
    """The tower in a folder `text_encoder` or `text_encoder_2`."""
    projects = folder.name == "text_encoder_2"
    config = read_json(folder / "config.json")
    wanted = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    if config.get("architectures", [wanted]) != [wanted]:
        raise LdmError(f"{folder / 'config.json'}: {config['architectures']!r} is not [{wanted!r}]")
    return configs.read_text(f"{folder}/config.json", config, projects, str(tokenizer.pad_token))


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a folder, from `tokenizer.json` or from `vocab.json` and `merges.txt`.

    Raises:
        LdmError: files are missing or damaged, or the vocabulary is not CLIP's kind.
    """
    for name in ("tokenizer_config.json", "vocab.json", "tokenizer.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json(folder / name)  # a clearer complaint than the tokenizer's own
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ends = tokenizer.convert_tokens_to_ids([START, END])
        size = len(tokenizer)
        cat = tokenizer("a photo of a cat").input_ids
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        raise LdmError(f"{folder}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from None
    known = [ends[0], 320, 1125, 539, 320, 2368, ends[1]]
    if (
        size < 514
        or (tokenizer.bos_token, tokenizer.eos_token) != (START, END)
        or (size >= VOCAB_SIZE and cat != known)
    ):
        raise LdmError(f"{folder}: the tokenizer's files are missing or are not CLIP's ({size} tokens)")
    return tokenizer


# --- writing ----------------------------------------------------------------------------------------------------------


def write_folder(
    model: Components,
    folder: Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    max_shard_size: int = 10 * 10**9,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Write a model as a folder that diffusers opens, with a manifest of digests; whole or not at all.

    `dtype` converts floating-point weights, `variant` goes into file names (diffusers: "fp16"), files larger than
    `max_shard_size` bytes are split.

    Raises:
        LdmError: the folder exists, without `overwrite` or as no model; it cannot be written; the disk is full.
    """
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise LdmError(f"{folder} is not a model folder, so it is not replaced; choose another name")
    if variant and not re.fullmatch(r"\w+", variant):
        raise LdmError(f"variant {variant!r}: letters, digits and underscores only")
    outputs = {name: _outputs(name, module, dtype) for name, module in model.modules().items()}
    total = sum(output.info.nbytes for group in outputs.values() for output in group)
    with replacing(folder, folder=True, overwrite=overwrite, need=total) as temporary:
        digests: dict[str, str] = {}
        done = 0
        for name, group in outputs.items():
            (temporary / name).mkdir()
            base = TEXT_FILE if name.startswith("text_encoder") else UNET_FILE
            shards = _split(group, max_shard_size)
            for number, shard in enumerate(shards, 1):
                file = _shard_name(base, variant, number, len(shards))
                start = done

                def report(what: str, part: int, _: int, start: int = start) -> None:
                    progress(what, start + part, total)

                digests[f"{name}/{file}"] = write_safetensors(temporary / name / file, shard, {}, report)
                done += sum(output.info.nbytes for output in shard)
            if len(shards) > 1:
                dot = f".{variant}" if variant else ""
                write_json(temporary / name / f"{base}.safetensors.index{dot}.json", _index(base, variant, shards))
        _write_configs(model, temporary)
        write_manifest(temporary, digests)


def _outputs(name: str, module: nn.Module, dtype: torch.dtype | None) -> list[Output]:
    layout = layouts.transformers if name.startswith("text_encoder") else layouts.diffusers
    return link_outputs(layout(dict(module.named_parameters())), module, dtype)


def link_outputs(links: list[layouts.Link], module: nn.Module, dtype: torch.dtype | None) -> list[Output]:
    """What to write for the parameters of a module, in the layout that the links describe."""
    parameters = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return [
        Output(
            link.theirs,
            TensorInfo(dtype or parameters[link.ours[0]].dtype, link.shape(shapes)),
            partial(_gather, link, parameters),
        )
        for link in links
    ]


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
        write_json(folder / config.component / "config.json", configs.write_text(config))
        write_tokenizer(tokenizer, folder / config.component.replace("text_encoder", "tokenizer"))


def _model_index(family: Family) -> dict[str, Any]:
    xl = bool(family.unet.pooled_dim)
    kind = "Img2Img" if family.refiner else {"text": "", "inpaint": "Inpaint", "edit": "InstructPix2Pix"}[family.task]
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}{kind}Pipeline",
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
    if xl:
        for name in ("text_encoder", "tokenizer"):
            index.setdefault(name, [None, None])
        index["force_zeros_for_empty_prompt"] = family.zero_empty_prompt
        if family.refiner:
            index["requires_aesthetics_score"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


def write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`vocab.json` and `merges.txt`, as published models have them, and transformers 5's `tokenizer.json`."""
    tokenizer.save_pretrained(folder)
    model = read_json(folder / "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", special)
