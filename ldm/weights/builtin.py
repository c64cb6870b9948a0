"""The models and adapters that come with the package: ordinary folders and files in `ldm/builtin`, opened by name.

A model's `words.txt` lists the words of its training captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ldm.errors import LdmError
from ldm.weights.names import HUB_ID, INDEX

FOLDER = Path(__file__).parent.parent / "builtin"
DEFAULT = "emoji"  # the model that is used if none is named
REFINER = "emoji-refiner"  # its refiner: has its own U-Net and takes the other components from DEFAULT
ADAPTERS = FOLDER / "adapters"  # of DEFAULT: a file for each, which has its name
WORDS = "words.txt"
GIVE = f"give a model folder, a checkpoint file, a Hub name (owner/name) or {DEFAULT}"
GIVE_SAFETY_CHECKER = "give a safety checker's folder or Hub name (owner/name)"
_WORD = re.compile(r"[^\W\d_]+")


def builtin(name: object) -> Path | None:
    """The folder of the built-in model of this name; None if there is none, or a local path has this name."""
    if not isinstance(name, str) or name not in (DEFAULT, REFINER):
        return None
    return None if Path(name).is_file() or Path(name, INDEX).is_file() else FOLDER / name


def check_named(source: str, give: str = GIVE) -> None:
    """Check that a model is there, as far as its name tells: a path, a built-in model, or a name that the Hub may know.

    `give` says in an error what to give.

    Raises:
        LdmError: it is not.
    """
    if builtin(source) or HUB_ID.fullmatch(source):
        return
    if "://" in source:
        raise LdmError(f"{source} is an address: name a model of the Hub as owner/name, or fetch the file")
    try:
        Path(source).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise LdmError(f"{source} does not exist; {give}") from None
    except (OSError, ValueError):  # which is told when the model is opened
        return


@cache
def builtin_adapters() -> dict[str, Path]:
    """The files of the built-in adapters, by name."""
    return {path.stem: path for path in sorted(ADAPTERS.glob("*.safetensors"))}


def builtin_adapter(name: object) -> Path | None:
    """The file of the built-in adapter of this name; None if there is none, or a local path has this name."""
    found = builtin_adapters().get(str(name))
    return None if found is None or Path(str(name)).exists() else found


def adapters_of(source: str) -> list[str]:
    """The names of the built-in adapters that a source's model can have: they are for the built-in one."""
    return list(builtin_adapters()) if builtin(source) == FOLDER / DEFAULT else []


def lender(folder: Path) -> Path | None:
    """The built-in model from which this built-in model takes components."""
    return FOLDER / DEFAULT if folder == FOLDER / REFINER else None


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def vocabulary(captions: Iterable[str]) -> list[str]:
    """All words of the captions, sorted."""
    return sorted({word for caption in captions for word in words(caption)})


@cache
def known_words(folder: Path) -> frozenset[str] | None:
    """The words of a model's training captions, or None if its folder has no `words.txt`."""
    path = folder / WORDS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else None
