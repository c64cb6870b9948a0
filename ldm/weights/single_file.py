"""The original single-file checkpoint: all components in one file, named as in CompVis' and Stability's repositories.

The family is recognised from names and shapes. The files that we write also state the configuration in the header: as
`ldm.config`, so that models of other sizes can be read back, and as `modelspec.*` for other programs.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.errors import LdmError, first_line, listing
from ldm.families import FAMILIES, Family, family_named, recognised
from ldm.files import Progress, alongside, check_digest, replacing, silent
from ldm.models.tokenizer import clip_tokenizer
from ldm.weights import configs, layouts
from ldm.weights.components import NOTHING, Components, ComponentSource, Opened, is_adapter
from ldm.weights.folder import IGNORED, check_float, link_outputs, tower_ignored
from ldm.weights.tensors import LINEAGE, Output, Store, open_store, write_safetensors

CONFIG = "ldm.config"
_PREDICTION = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "x0": "sample",
}
_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd15-inpaint": "stable-diffusion-v1-inpainting",
    "sd15-edit": "stable-diffusion-v1-edit",
    "sd2": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sd2-inpaint": "stable-diffusion-v2-inpainting",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-inpaint": "stable-diffusion-xl-v1-inpainting",
    "sdxl-edit": "stable-diffusion-xl-v1-edit",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
_YAML_NUMBERS = {
    "linear_start": "beta_start",
    "linear_end": "beta_end",
    "timesteps": "train_steps",
    "scale_factor": "scaling_factor",
}
# tensors of checkpoints beside the three networks, without effect on images
_LEFTOVERS = re.compile(
    r"model_ema\..*|embedding_manager\..*|denoiser\.sigmas|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod"
    r"(_prev)?|betas|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor|global_step"
    r"|v_pred|ztsnr|(cond_stage_model|conditioner\.embedders\.\d+)\.(logit_scale|text_projection(\.weight)?)"
)
_STRANGERS = {  # how names begin that tell what else a checkpoint holds
    "control_model.": "a ControlNet",
    "scaled_fp8": "marks of scaled float8 weights, which only ComfyUI computes with",
    "emb_params": "a textual-inversion embedding",
}

log = logging.getLogger(__name__)


# --- reading ----------------------------------------------------------------------------------------------------------


def open_single_file(
    path: Path,
    family: str | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    progress: Progress = silent,
    elsewhere: Collection[str] = (),
) -> Opened:
    """Open an original checkpoint: find the family and the tensors of each component, without loading weights.

    `family` is needed if an SD 2 file does not state the prediction type, noise (sd2) or velocity (sd2-v), in its
    metadata or in a configuration beside it (`model.yaml` for `model.safetensors`). The components `elsewhere` are left
    out: they may be missing.

    Raises:
        LdmError: the file is not a checkpoint of a whole model, is damaged, or its family is unclear.
    """
    store = open_store(path, allow_pickle)
    with alongside(lambda: check_digest(path, progress=progress)) if verify else nullcontext():
        return _described(path, store, family, elsewhere)


def _described(path: Path, store: Store, family: str | None, elsewhere: Collection[str]) -> Opened:
    """The family, recognised from the names and shapes of a checkpoint's tensors and from its metadata."""
    names = store.infos
    if not any(name.startswith(layouts.UNET_PREFIX) for name in names):
        raise LdmError(f"{path} is not a checkpoint of a whole model: {_what(names)}")
    if CONFIG in store.metadata:
        found = _read_config(f"{path} ({CONFIG})", store.metadata[CONFIG])
        if family and family_named(family).name != found.name:
            raise LdmError(f"{path} says that it is {found.name}, not {family}; leave the family out")
    else:
        found = _recognise(path, store, family)
    parts = {
        name: ComponentSource(store, [way], IGNORED.get(name, NOTHING)) for name, way in layouts.original(found).items()
    }
    for config in found.text:
        part = parts[config.component]
        part.ignored = tower_ignored(config)
        if not config.open_clip:
            prefix, _ = part.layouts[0]
            part.layouts.append((prefix, layouts.prefixed(layouts.transformers_flat, prefix)))
    prefixes = tuple(prefix for part in parts.values() for prefix, _ in part.layouts)
    rest = [name for name in names if not name.startswith(prefixes)]
    strange = [name for name in rest if not _LEFTOVERS.fullmatch(name)]
    if strange:
        raise LdmError(f"{path} holds tensors that a {found.name} model does not have: {_strangers(strange)}")
    parts = {name: part for name, part in parts.items() if name not in elsewhere}
    _check_whole(path, found, parts)
    tokenizers = [clip_tokenizer(config.pad_token, config.context, config.vocab_size) for config in found.text]
    beside = sorted({_group(name) for name in rest}) + store.passed_over
    return Opened(str(path), "single file", found, tokenizers, parts, beside)


def _group(name: str) -> str:
    """What a leftover tensor is listed as: the first part of its name, or all of it within a component."""
    return name if name.startswith(("cond_stage_model.", "conditioner.")) else name.split(".")[0]


def _strangers(names: list[str]) -> str:
    """What is known of tensors that no model has, and the remedy."""
    known = [what for start, what in _STRANGERS.items() if any(name.startswith(start) for name in names)]
    hint = f" ({listing(known)})" if known else ""
    return f"{listing(names)}{hint}; use a file of the model alone, or write one without them"


def _check_whole(path: Path, family: Family, parts: Mapping[str, ComponentSource]) -> None:
    """Check that a checkpoint has tensors of all components that it is to provide.

    Raises:
        LdmError: it has none of some; the message says how to add them.
    """

    def there(part: ComponentSource) -> bool:
        return any(name.startswith(prefix) for name in part.store.infos for prefix, _ in part.layouts)

    missing = [name for name, part in parts.items() if not there(part)]
    if not missing:
        return
    words = ["autoencoder" if name == "vae" else name.replace("_", " ") for name in missing]
    alone = "unet" in parts and len(missing) == 1 + len(family.text)
    what = "is a U-Net alone" if alone else f"holds no {' and no '.join(words)}"
    options = " ".join(f"--component {name}=PATH" for name in missing)
    raise LdmError(
        f"{path} {what}; name {'one' if len(missing) == 1 else 'the others'} ({options}, or "
        "components=): a folder or file of it, or another checkpoint"
    )


def _what(names: Iterable[str]) -> str:
    """A guess for error messages at the content of a file that is not a whole model."""
    names = list(names)
    if is_adapter(names):
        return "it is a LoRA or another adapter; use it with a model (--lora PATH, adapters=)"
    if names and set(names) <= {"emb_params", "*", "clip_l", "clip_g"}:
        return "it is an embedding of textual inversion (--embedding, embeddings=)"
    starts = {
        "down_blocks.": ("a diffusers U-Net (or ControlNet)", "unet"),
        "input_blocks.": ("a U-Net", "unet"),
        "encoder.": ("an autoencoder", "vae"),
        "first_stage_model.": ("an autoencoder", "vae"),
        "text_model.": ("a text encoder", "text_encoder"),
        "transformer.resblocks.": ("an OpenCLIP text encoder", "text_encoder"),
        "control_model.": ("a ControlNet", ""),
    }
    for start, (answer, component) in starts.items():
        if any(name.startswith(start) for name in names):
            use = f"; use it in a whole model (--component {component}=PATH, components=)" if component else ""
            return f"it is {answer} alone{use}"
    return f"its tensors are called {listing(names)}" if names else "it holds no tensors"


def _recognise(path: Path, store: Store, named: str | None) -> Family:
    """The family whose U-Net has the file's shapes, or that the user named, with the settings stated in the file."""
    shapes = {name: info.shape for name, info in store.infos.items()}
    for name in ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"):
        if name in shapes:
            raise LdmError(f"{path} holds {name!r}: a model in EDM's parametrisation, which is not supported")
    signature = _signature(shapes)
    matches = [family_named(named)] if named else [f for f in FAMILIES.values() if _signature_of(f) == signature]
    if not matches:
        raise LdmError(
            f"{path} belongs to no known family: its U-Net has {signature[0]} channels, reads {signature[1]} latent "
            f"and {signature[2]} text channels and {signature[3]} of pooled text and size"
        )
    told = _told(path, store)
    if named:
        told.append((f"the family {named}", {"prediction_type": matches[0].schedule.prediction_type}))
    prediction = _agreed(path, told)
    if len(matches) > 1 and not prediction:
        raise LdmError(
            f"{path} may be {' or '.join(family.name for family in matches)}: both have the same tensors, and nothing "
            "says which; name it (family=, --family)"
        )
    prediction = prediction or matches[0].schedule.prediction_type
    family = next((match for match in matches if match.schedule.prediction_type == prediction), matches[0])
    numbers = {name: value for _, facts in told for name, value in facts.items() if name != "prediction_type"}
    scale = numbers.pop("scaling_factor", family.autoencoder.scaling_factor)
    schedule = replace(family.schedule, prediction_type=prediction, zero_terminal_snr="ztsnr" in shapes, **numbers)
    autoencoder = replace(family.autoencoder, scaling_factor=scale)
    guidance = shapes.get(f"{layouts.UNET_PREFIX}time_embed.cond_proj.weight", (0, 0))
    unet = replace(family.unet, guidance_dim=guidance[-1])
    return recognised(replace(family, unet=unet, schedule=schedule, autoencoder=autoencoder))


def _agreed(path: Path, told: list[tuple[str, dict[str, Any]]]) -> str | None:
    """The prediction type that the statements agree on, or None if no statement has one.

    Raises:
        LdmError: the statements contradict each other.
    """
    stated = [(origin, facts["prediction_type"]) for origin, facts in told if "prediction_type" in facts]
    if len({value for _, value in stated}) > 1:
        said = ", ".join(f"{origin} says {value}" for origin, value in stated)
        raise LdmError(f"{path}: {said}; they contradict each other")
    return stated[0][1] if stated else None


def _signature(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The numbers that identify a family: channels of first level, latents, text, pooled text with time ids."""

    def dim(ending: str, rank: int, index: int) -> int:
        names = (name for name in shapes if name.startswith(layouts.UNET_PREFIX) and name.endswith(ending))
        shape = shapes.get(next(names, ""), ())
        return shape[index] if len(shape) == rank else 0

    first = ".diffusion_model.input_blocks.0.0.weight"
    return (dim(first, 4, 0), dim(first, 4, 1), dim(".attn2.to_k.weight", 2, 1), dim(".label_emb.0.0.weight", 2, 1))


def _signature_of(family: Family) -> tuple[int, ...]:
    unet = family.unet
    size = unet.pooled_dim + unet.size_ids * unet.size_dim if family.xl else 0
    return (unet.channels[0], unet.in_channels, unet.text_dim, size)


def _told(path: Path, store: Store) -> list[tuple[str, dict[str, Any]]]:
    """The settings stated by metadata, by marker tensors and by a configuration beside a checkpoint, with origins."""
    told: list[tuple[str, dict[str, Any]]] = []
    stated = store.metadata.get("modelspec.prediction_type", "").strip()
    if stated.lower() not in ("", "none", "null"):  # some programs write an unset value so
        told.append(("its metadata", {"prediction_type": _prediction(f"{path}: modelspec.prediction_type", stated)}))
    if "v_pred" in store.infos:
        told.append(("its tensor v_pred", {"prediction_type": "v_prediction"}))
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        told.append((str(beside), _read_yaml(beside)))
        log.warning("%s is read too, because it lies beside the checkpoint", beside)
    return told


def _prediction(where: str, stated: Any) -> str:
    if not isinstance(stated, str) or stated not in _PREDICTION:
        raise LdmError(f"{where} {stated!r} is not known; known are {', '.join(_PREDICTION)}")
    return _PREDICTION[stated]


def _read_yaml(path: Path) -> dict[str, Any]:
    """Prediction type, betas and latent scale of an original configuration. Its `target` classes are not imported."""
    import yaml

    try:
        if path.stat().st_size > 2**20:
            raise LdmError(f"{path} has {path.stat().st_size} bytes; that is no model configuration")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = content["model"]["params"]
        if not isinstance(params, dict):
            raise TypeError
    except LdmError:
        raise
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError):
        raise LdmError(f"{path} is not a model configuration: it has no model.params") from None
    except Exception as error:  # the parser raises its own errors, and others for odd dates and numbers
        raise LdmError(f"{path} is not plain YAML: {first_line(error)}") from None
    told: dict[str, Any] = {}
    for theirs, ours in _YAML_NUMBERS.items():
        value = params.get(theirs)
        if value is not None:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise LdmError(f"{path}: {theirs} is {value!r}, not a number")
            told[ours] = value
    for name, only in (("beta_schedule", "linear"), ("given_betas", None), ("rescale_betas_zero_snr", False)):
        if params.get(name, only) != only:
            raise LdmError(f"{path}: {name} is {params[name]!r}; this program only reads {only!r}")
    if "parameterization" in params or "linear_start" in params:  # a LatentDiffusion, whose default is eps
        told["prediction_type"] = _prediction(f"{path}: parameterization", params.get("parameterization", "eps"))
    elif "denoiser_config" in params:  # a DiffusionEngine, which names its scaling by a class
        found = re.search(r"'target': '[\w.]*\.(Eps|V)Scaling'", str(params["denoiser_config"]))
        if not found:
            raise LdmError(f"{path}: denoiser_config names no scaling that is known (EpsScaling, VScaling)")
        told["prediction_type"] = {"Eps": "epsilon", "V": "v_prediction"}[found[1]]
    return told


# --- the configuration in the header ----------------------------------------------------------------------------------


def _write_config(family: Family) -> str:
    return json.dumps(
        {
            "name": family.name,
            "unet": configs.write_unet(family.unet),
            "vae": configs.write_autoencoder(family.autoencoder),
            "text": [
                {**configs.write_text(config, config.vocab_size - 1), "_pad_token": config.pad_token}
                for config in family.text
            ],
            "scheduler": configs.write_schedule(family.schedule),
            "zero_empty_prompt": family.zero_empty_prompt,
        },
        sort_keys=True,
    )


def _read_config(where: str, text: str) -> Family:
    try:
        content = json.loads(text)
        towers = [
            configs.read_text(
                f"{where}: text",
                tower,
                tower["architectures"] == ["CLIPTextModelWithProjection"],
                str(tower["_pad_token"]),
                tower["eos_token_id"],
            )
            for tower in content["text"]
        ]
        unet = configs.read_unet(f"{where}: unet", content["unet"], towers[-1].projection)
        schedule = configs.read_schedule(f"{where}: scheduler", content["scheduler"])
        vae = configs.read_autoencoder(f"{where}: vae", content["vae"])
        return recognised(Family("custom", unet, vae, tuple(towers), schedule, bool(content["zero_empty_prompt"])))
    except LdmError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise LdmError(f"{where} is damaged ({type(error).__name__}: {error}); fetch or write the file again") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def write_single_file(
    model: Components,
    path: Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    lineage: str = "",
) -> None:
    """Write a model atomically as one safetensors file with the names of the original repositories.

    `lineage`, JSON that describes how the model was made, goes into the header unless it is empty.

    Raises:
        LdmError: the file exists and `overwrite` is not set; writing fails; the disk is full; or the tokenizer is not
            CLIP's own, which this format cannot hold.
    """
    family = model.family
    check_float(dtype)
    configs.check_writable(family)
    modules = model.modules()
    for config, tokenizer in zip(family.text, model.text_encoders.tokenizers, strict=True):
        own = clip_tokenizer(config.pad_token, config.context, config.vocab_size)
        if tokenizer.vocabulary() != own.vocabulary():
            raise LdmError("the tokenizer is not CLIP's own, and a single file cannot hold it: write a folder instead")
    outputs: list[Output] = []
    for name, (_, layout) in layouts.original(family).items():
        outputs += link_outputs(layout(dict(modules[name].named_parameters())), modules[name], dtype)
    infos = layouts.extra_infos(family)
    outputs += [Output(name, infos[name], make) for name, make in layouts.original_extras(family).items()]
    metadata = {
        CONFIG: _write_config(family),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.architecture": _ARCHITECTURES.get(family.name, "stable-diffusion"),
    }
    metadata |= {LINEAGE: lineage} if lineage else {}
    if family.schedule.prediction_type != "sample":  # the modelspec standard has no value for "sample"
        metadata["modelspec.prediction_type"] = "v" if family.schedule.prediction_type == "v_prediction" else "epsilon"
    total = sum(output.info.nbytes for output in outputs)
    with replacing(path, folder=False, overwrite=overwrite, need=total) as temporary:
        write_safetensors(temporary, outputs, metadata, progress)
