"""Embeddings of textual inversion in a pipeline: the files that its settings name, and those that a prompt uses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ldm.errors import LdmError, listing
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.textual_inversion import WordTokenizer, plain, with_words
from ldm.weights.builtin import builtin_adapter
from ldm.weights.embeddings import TextualInversion, embedding_files, fitted, open_embedding
from pipelines.request import Request
from pipelines.settings import LOADING, find

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddingFiles:
    """The embeddings of files that were named, and those of folders, of which some may be for other models."""

    named: tuple[TextualInversion, ...] = ()
    others: tuple[TextualInversion, ...] = ()
    left_out: tuple[str, ...] = ()  # why files of folders cannot be read


def read_embeddings(paths: Any, allow_pickle: bool) -> EmbeddingFiles:
    """The embeddings of a value of the setting `embeddings`, files and folders.

    Raises:
        LdmError: the value is not allowed, or a file that is named cannot be read.
    """
    given = find("embeddings", "python", rows=LOADING).check(paths)
    named: list[TextualInversion] = []
    others: list[TextualInversion] = []
    left_out: list[str] = []
    for path in (builtin_adapter(one) or Path(one) for one in (given if isinstance(given, tuple) else (given,))):
        if not path.is_dir():
            named.append(open_embedding(path, allow_pickle))
            continue
        for file in embedding_files(path):
            try:
                others.append(open_embedding(file, allow_pickle))
            except LdmError as error:
                left_out.append(str(error))
    return EmbeddingFiles(tuple(named), tuple(others), tuple(left_out))


def fitting(read: EmbeddingFiles, configs: Sequence[TextEncoderConfig]) -> list[TextualInversion]:
    """The embeddings for a model's text encoders: all that are named, and those of folders that fit.

    A warning names the files of a folder that are left out, and words that several files state: such embeddings go by
    the names of their files alone.

    Raises:
        LdmError: a file that is named does not fit, or two have the same name.
    """
    found: dict[str, TextualInversion] = {}  # by name
    left_out = list(read.left_out)
    for number, one in enumerate((*read.named, *read.others)):
        try:
            fitted(one, configs)
            other = found.setdefault(plain(one.names[0]), one)
            if other.digest != one.digest:
                raise LdmError(f"{one.file} and {other.file} are both called {one.names[0]}; rename one of them")
        except LdmError as error:
            if number < len(read.named):
                raise
            left_out.append(str(error))
    if left_out:
        log.warning("%d embeddings are left out: %s", len(left_out), "; ".join(left_out[:3]))
    counts = Counter(plain(name) for one in found.values() for name in one.names)
    shared = [name for name, count in counts.items() if count > 1]
    if shared:
        log.warning("several embeddings state the same word; use the names of their files: %s", listing(shared))
    return [
        replace(one, names=(one.names[0], *(name for name in one.names[1:] if counts[plain(name)] == 1)))
        for one in found.values()
    ]


def with_embeddings(model: LatentDiffusion, found: Sequence[TextualInversion]) -> LatentDiffusion:
    """A model whose text encoders know these embeddings; it shares all weights with the given one.

    Raises:
        LdmError: one does not fit the text encoders.
    """
    if not found:
        return model
    words = [fitted(one, model.text_encoders.configs) for one in found]
    return model.with_networks({"text_encoders": with_words(model.text_encoders, words)})


def used(found: Sequence[TextualInversion], model: LatentDiffusion, request: Request, row: int) -> dict[str, Any]:
    """The record of the embeddings that the prompts of one image use: name, path and digest of each."""
    tokenizer = cast("WordTokenizer", model.text_encoders.tokenizers[0])
    texts = [column[row] for columns in request.texts(len(model.family.text)) for column in columns if column]
    names = {name for text in texts for part, _ in request.reader.parts(text) for name in tokenizer.learned(part)}
    files = [
        {"name": one.names[0], "path": str(one.file.absolute()), "sha256": one.digest}
        for one in found
        if one.names[0] in names
    ]
    return {"embeddings": files} if files else {}
