"""Files of textual inversion, told by their keys:

string_to_param: {"*": (N, W)}, name    AUTOMATIC1111's .pt; and the first programs'
emb_params: (N, W)                      AUTOMATIC1111's .safetensors
a word: (N, W) or (W,)                  diffusers' learned_embeds.bin and .safetensors
clip_l: (N, W), clip_g: (N, W)          for SDXL's two text encoders

N vectors of a word, W channels of a text encoder
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError, listing
from ldm.files import file_digest, replacing, walked
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.textual_inversion import LearnedWord, plain
from ldm.weights.tensors import Output, TensorInfo, open_store, write_safetensors

SUFFIXES = (".safetensors", ".pt", ".bin")
_ENCODERS = {  # key in a file -> text encoder; the second names are those of diffusers' trainer of several words
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
_NO_WORDS = ("emb_params", "*")  # keys of the vectors that are no word
_NO_NAME = "learned_embeds"  # how the names of diffusers' files begin, which is no word either
_MODELS = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SDXL", (1280,): "SDXL's refiner"}  # by channels


@dataclass(frozen=True)
class TextualInversion:
    """A file of textual inversion."""

    file: Path
    names: tuple[str, ...]  # in prompts: the stem of the file, and the word that the file states
    layout: str  # "AUTOMATIC1111", "diffusers" or "SDXL"
    vectors: Mapping[str, Tensor]  # text encoder, or "" in a file for the only one -> (N, W)
    digest: str  # SHA-256 of the file


def open_embedding(file: Path, allow_pickle: bool = False) -> TextualInversion:
    """Read a file of textual inversion.

    Raises:
        LdmError: the file cannot be read, is of another kind, or its vectors are damaged; or it is a pickle, and
            `allow_pickle` is not set.
    """
    store = open_store(file, allow_pickle)
    infos = store.infos
    pair = {name: _ENCODERS[name] for name in infos if name in _ENCODERS}
    if len(infos) != (len(pair) or 1):
        raise LdmError(
            f"{file} is no embedding: it holds {len(infos)} tensors ({listing(list(infos), 3)}); an embedding has one, "
            "or clip_l and clip_g"
        )
    tensors = dict(store.read(list(infos), None, "cpu"))
    for name, tensor in tensors.items():
        if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
            raise LdmError(
                f"{file} is no embedding: {name} is {list(tensor.shape)}, {tensor.dtype}; vectors (N, W) are needed"
            )
        if not tensor.isfinite().all():
            raise LdmError(f"{file}: {name} holds numbers that are not finite; fetch the file again")
    vectors = {pair.get(name, ""): tensor.detach().reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()}
    vectors = dict(sorted(vectors.items()))
    if len({len(rows) for rows in vectors.values()}) > 1:
        counts = {name: len(rows) for name, rows in vectors.items()}
        raise LdmError(f"{file}: the text encoders have different numbers of vectors: {counts}")
    key = next(iter(infos))
    layout = "SDXL" if pair else "AUTOMATIC1111" if key in _NO_WORDS else "diffusers"
    word = key if layout == "diffusers" else store.metadata.get("name", "")
    names: tuple[str, ...] = (file.stem, word)
    if plain(word) in ("", plain(file.stem)):
        names = (file.stem,)
    elif file.stem.startswith(_NO_NAME):
        names = (word,)
    return TextualInversion(file, names, layout, vectors, file_digest(file, plain=True))


def fitted(found: TextualInversion, configs: Sequence[TextEncoderConfig]) -> LearnedWord:
    """The word for a model's text encoders.

    Raises:
        LdmError: the file is for other text encoders, or has more vectors than a text has tokens.
    """
    by_name = found.vectors
    if len(by_name) == len(configs) == 1:  # whatever the file calls it
        by_name = {configs[0].component: next(iter(by_name.values()))}
    last = [*by_name][-1] == configs[-1].component  # SDXL's refiner has the second of its encoders alone
    vectors = [by_name[config.component] for config in configs if last and config.component in by_name]
    if [rows.shape[1] for rows in vectors] != [config.width for config in configs]:
        theirs, ours = (rows.shape[1] for rows in found.vectors.values()), (config.width for config in configs)
        raise LdmError(
            f"{found.file} is for text encoders with {_described(theirs)}, the model's have {_described(ours)}: it "
            "belongs to models of another family"
        )
    room = min(config.context for config in configs) - 2
    if len(vectors[0]) > room:
        raise LdmError(f"{found.file} has {len(vectors[0])} vectors; a text has at most {room} tokens")
    return LearnedWord(found.names, tuple(vectors))


def _described(widths: Iterable[int]) -> str:
    """Numbers of channels, and the models that have them."""
    found = tuple(widths)
    models = f" ({_MODELS[found]})" if found in _MODELS else ""
    return f"{' and '.join(map(str, found))} channels{models}"


def write_embedding(
    vectors: Mapping[str, Tensor], word: str, path: Path, metadata: Mapping[str, str], as_diffusers: bool = False
) -> None:
    """Write the vectors of a word, (N, W) for each text encoder by its name, in fp32.

    Vectors of one text encoder get AUTOMATIC1111's key, or with `as_diffusers` the word as theirs; those of two get the
    keys of SDXL's pair. The header states the word.

    Raises:
        LdmError: the file cannot be written.
    """
    single = word if as_diffusers else _NO_WORDS[0]
    keys = {component: key for key, component in reversed(_ENCODERS.items())} if len(vectors) > 1 else {}
    outputs = [
        Output(keys.get(name, single), TensorInfo(torch.float32, tuple(rows.shape)), partial(Tensor.float, rows))
        for name, rows in vectors.items()
    ]
    need = sum(output.info.nbytes for output in outputs)
    with replacing(path, folder=False, overwrite=True, need=need) as temporary:
        write_safetensors(temporary, outputs, {"name": word, **metadata})


def embedding_files(folder: Path) -> list[Path]:
    """The files in a folder, at any depth and behind links, that may be embeddings, by their suffixes, sorted.

    Raises:
        LdmError: it is no folder.
    """
    if not folder.is_dir():
        raise LdmError(f"{folder} is no folder of embeddings")
    found = (place / name for place, _, names in walked(folder) for name in names)
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())
