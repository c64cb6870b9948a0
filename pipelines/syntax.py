"""Prompt syntax of the web interfaces that means nothing here, so that it is read as words."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

from ldm.errors import listing
from ldm.models.textual_inversion import plain
from pipelines.request import Request

log = logging.getLogger(__name__)

# in square brackets; AND between prompts; <lora:name:weight> and other extra networks; ComfyUI's embedding:name
_FOREIGN = re.compile(
    r"(?<!\\)\[([^\[\]]*)\]|\bAND\b|<\w{1,40}:[^<>]*>|(?:^|(?<=\s))--[a-z]\w*|\bembedding:[^\s,()\[\]:]+"
)
_EDITED = re.compile(r"\||:\s{0,9}(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s{0,9}$")  # [a|b], [a:b:0.5], [a:0.5], [a::10]


def foreign(texts: Iterable[str]) -> list[str]:
    """What texts hold of prompt editing, alternating words, composed prompts and extra networks, each once."""
    return list(dict.fromkeys(piece for text in texts for piece in _pieces(text)))


def _pieces(text: str) -> Iterator[str]:
    for match in _FOREIGN.finditer(text):
        if match[1] is None or _EDITED.search(match[1]):
            yield match[0]


def note_foreign(request: Request, embeddings: Iterable[str] = ()) -> None:
    """Log, in one line, the syntax of a request's prompts that is read as words. Without `weights` all are words.

    `embeddings` are the names of those that are read.
    """
    if not request.weights:
        return
    columns = (request.prompts, request.negative, request.prompts_2 or (), request.negative_2 or ())
    found = foreign(text for texts in columns for text in dict.fromkeys(texts) if text)
    known = {plain(name) for name in embeddings}
    found = [piece for piece in found if plain(piece).removeprefix("embedding:") not in known]
    if found:
        shown = [piece if len(piece) <= 60 else f"{piece[:60]}…" for piece in found]
        log.warning("prompt syntax of other programs, which is read as plain words here: %s", listing(shown))
