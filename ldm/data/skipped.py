"""Unusable images are counted and listed in a file; too many of them are an error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ldm.errors import LdmError, listing
from ldm.files import replacing

MOST = 0.05  # largest share of unusable images
HANDFUL = 5  # fewer unusable images than this are never an error


class Skipped:
    """The unusable images of one source. Each is appended to the file `path` with its reason when it is found."""

    def __init__(self, name: str, path: Path, fresh: bool = False) -> None:
        self.name = name
        self.path = path
        self.reasons: dict[str, str] = {}  # by key
        if fresh:
            path.unlink(missing_ok=True)

    def add(self, key: str, reason: str) -> None:
        """Count and list an image, once."""
        if key in self.reasons:
            return
        self.reasons[key] = reason
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(_line(key, reason))
        except OSError as error:
            raise LdmError(f"{self.path} cannot be written: {error.strerror}") from None

    def add_all(self, reasons: Iterable[tuple[str, str]]) -> None:
        """Count and list many images at once; the file is rewritten."""
        self.reasons = dict(reasons)
        with replacing(self.path, folder=False, overwrite=True, need=0) as temporary:
            temporary.write_text("".join(_line(*pair) for pair in self.reasons.items()), "utf-8", "backslashreplace")

    def check(self, seen: int) -> None:
        """Raise if too many images are unusable.

        Raises:
            LdmError: more than 5 % of the `seen` images, and more than a few, are unusable.
        """
        count = len(self.reasons)
        if count >= HANDFUL and count > MOST * seen:
            first = [f"{key} ({reason})" for key, reason in list(self.reasons.items())[:3]]
            raise LdmError(
                f"{self.name}: {count} of {seen} images cannot be used: {listing(first, 3, count)}; "
                f"all are listed in {self.path}; mend or remove them"
            )


def _line(key: str, reason: str) -> str:
    return f"{key}\t{reason}".replace("\n", " ") + "\n"
