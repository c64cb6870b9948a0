"""Embeddings of textual inversion in a pipeline: the files that its settings name, and those that a prompt uses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ldm.errors import LdmError, listing
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.textual_inversion import WordTokenizer, plain, with_words
from ldm.weights.embeddings import TextualInversion, embedding_files, fitted, open_embedding
from pipelines.request import Request
from pipelines.settings import LOADING, find

log = logging.getLogger(__name__)


def find_embeddings(paths: Any, configs: Sequence[TextEncoderConfig], allow_pickle: bool) -> list[TextualInversion]:
    """The embeddings of files, which must all fit a model's text encoders, and those that fit in folders.

    `paths` is a value of the setting `embeddings`. A warning names the files of a folder that are left out, and words
    that several files state: such embeddings go by the names of their files alone.

    Raises:
        LdmError: a file cannot be read or does not fit, or two files have the same name.
    """
    given = find("embeddings", "python", rows=LOADING).check(paths)
    found: dict[str, TextualInversion] = {}  # by name
    left_out: list[str] = []
    for path in map(Path, given if isinstance(given, tuple) else (given,)):
        for file in embedding_files(path) if path.is_dir() else [path]:
            try:
                one = open_embedding(file, allow_pickle)
                fitted(one, configs)
                other = found.setdefault(plain(one.names[0]), one)
                if other.digest != one.digest:
                    raise LdmError(f"{file} and {other.file} are both called {one.names[0]}; rename one of them")
            except LdmError as error:
                if not path.is_dir():
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
    encoders = with_words(model.text_encoders, [fitted(one, model.text_encoders.configs) for one in found])
    return model.with_networks({"text_encoders": encoders})


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
