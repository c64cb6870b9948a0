"""The models that come with the package: ordinary model folders in `ldm/builtin`, opened by name.

`words.txt` beside one lists the words that its captions had: what it can have learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ldm.weights.folder import INDEX

FOLDER = Path(__file__).parent.parent / "builtin"
DEFAULT = "emoji"  # what is taken where no model is named
REFINER = "emoji-refiner"  # its refiner, which has a U-Net of its own and takes the other parts from it
WORDS = "words.txt"
_WORD = re.compile(r"[^\W\d_]+")


def builtin(name: object) -> Path | None:
    """The folder of a built-in model, if that is a name of one, and not of a model here."""
    if not isinstance(name, str) or name not in (DEFAULT, REFINER):
        return None
    return None if Path(name).is_file() or Path(name, INDEX).is_file() else FOLDER / name


def lender(folder: Path) -> Path | None:
    """The built-in model that a built-in model takes parts from."""
    return FOLDER / DEFAULT if folder == FOLDER / REFINER else None


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())


def vocabulary(captions: Iterable[str]) -> list[str]:
    """All words of some captions, sorted."""
    return sorted({word for caption in captions for word in words(caption)})


@cache
def known_words(folder: Path) -> frozenset[str] | None:
    """The words that the model in a folder knows, or None if nothing says so."""
    path = folder / WORDS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else None
