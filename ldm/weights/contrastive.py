"""The folder of a contrastive pair without its text encoders, which are saved with the model.

image_encoder/          a `CLIPVisionModelWithProjection` that transformers opens
heads.safetensors       heads of the text encoders without a projection, and the logarithms of the logits' scales
ldm_manifest.json       digests
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.files import read_json, replacing, write_json
from ldm.models.contrastive import ContrastivePair, ImageEncoderConfig
from ldm.models.unfilled import unfilled
from ldm.weights import layouts
from ldm.weights.components import Components, ComponentSource, fingerprint
from ldm.weights.configs import Reader
from ldm.weights.folder import link_outputs, store_of
from ldm.weights.manifest import check_manifest, write_manifest
from ldm.weights.tensors import write_safetensors

_IMAGE, _HEADS = Path("image_encoder", "model.safetensors"), Path("heads.safetensors")
_TEXT_ENCODERS = "ldm.text_encoders"  # key in a header: fingerprint of the text encoders used in training
_FIXED: dict[str, Any] = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_channels": 3,
}


def _modules(pair: ContrastivePair) -> dict[Path, nn.Module]:
    return {_IMAGE: pair.image_encoder, _HEADS: pair.heads}


def write_clip(pair: ContrastivePair, folder: Path) -> None:
    """Write a pair without its text encoders, which are part of the model; atomically, replacing an older pair.

    Raises:
        LdmError: the folder cannot be written.
    """
    outputs = {
        file: link_outputs(layouts.diffusers(dict(module.named_parameters())), module, None)
        for file, module in _modules(pair).items()
    }
    total = sum(output.info.nbytes for group in outputs.values() for output in group)
    header = {_TEXT_ENCODERS: fingerprint({"text": pair.text_encoders})}
    with replacing(folder, folder=True, overwrite=True, need=total) as temporary:
        (temporary / _IMAGE.parent).mkdir()
        digests = {
            file.as_posix(): write_safetensors(temporary / file, group, header) for file, group in outputs.items()
        }
        write_json(temporary / _IMAGE.parent / "config.json", _write_config(pair.config))
        write_manifest(temporary, digests)


def load_clip(folder: Path, model: Components) -> ContrastivePair:
    """A pair of the model's text encoders and a folder written by `write_clip`, on their device and in their dtype.

    Raises:
        LdmError: the folder is damaged or holds no pair, or the pair was trained with other text encoders.
    """
    if not (folder / _HEADS).is_file():
        raise LdmError(f"{folder} holds no contrastive pair ({_HEADS} is missing); the stage text writes one")
    check_manifest(folder, [folder / _IMAGE, folder / _HEADS])
    place = folder / _IMAGE.parent / "config.json"
    config = _read_config(str(place), read_json(place))
    stores = {file: store_of([folder / file], allow_pickle=False) for file in (_IMAGE, _HEADS)}
    stated = stores[_HEADS].metadata.get(_TEXT_ENCODERS)
    if stated != fingerprint({"text": model.text_encoders}):
        raise LdmError(
            f"{folder} was trained with other text encoders ({stated}); take the model of the same stage, "
            "with dtype=torch.float32"
        )
    with unfilled():
        pair = ContrastivePair(config, model.text_encoders)
    some = next(model.text_encoders.parameters())
    for file, module in _modules(pair).items():
        links = ComponentSource(stores[file], [("", layouts.diffusers)]).links(module)
        tensors = stores[file].read([link.theirs for link in links], some.dtype, some.device)
        module.load_state_dict(dict(tensors), assign=True)
    embeddings = pair.image_encoder.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=some.device)[
        None
    ]  # a buffer that is not in the file
    return pair.eval()


def _write_config(config: ImageEncoderConfig) -> dict[str, Any]:
    """transformers' `config.json` of an image encoder."""
    return {
        **_FIXED,
        "hidden_size": config.width,
        "image_size": config.size,
        "intermediate_size": 4 * config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
        "projection_dim": config.embed_dim,
    }


def _read_config(where: str, json: dict[str, Any]) -> ImageEncoderConfig:
    """The inverse of `_write_config`."""
    reader = Reader(where, json)
    width = reader.take("hidden_size", int)
    config = ImageEncoderConfig(
        width=width,
        layers=reader.take("num_hidden_layers", int),
        heads=reader.take("num_attention_heads", int),
        patch=reader.take("patch_size", int),
        size=reader.take("image_size", int),
        embed_dim=reader.take("projection_dim", int),
    )
    fixed = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in _FIXED.items()}
    reader.done({"intermediate_size": (4 * width,), **fixed})
    return config
