"""Images that cannot be used: counted, listed in a file, and an error when they are too many to be accidents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ldm.errors import LdmError, listing
from ldm.files import replacing

MOST = 0.05  # of the images may be unusable
HANDFUL = 5  # fewer are never too many


class Skipped:
    """The unusable images of one source, with the reason of each in `path`, a line each, written as they are found."""

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
        """Count and list images that are known at once; the list is written anew."""
        self.reasons = dict(reasons)
        with replacing(self.path, folder=False, overwrite=True, need=0) as temporary:
            temporary.write_text("".join(_line(*pair) for pair in self.reasons.items()), "utf-8", "backslashreplace")

    def check(self, seen: int) -> None:
        """Raise when more than 5 % of the images seen, and more than a few, are unusable.

        Raises:
            LdmError: they are.
        """
        count = len(self.reasons)
        if count >= HANDFUL and count > MOST * seen:
            first = [f"{key} ({reason})" for key, reason in list(self.reasons.items())[:3]]
            raise LdmError(
                f"{self.name}: {count} of {seen} images cannot be used: {listing([*first, *[''] * (count - 3)], 3)}; "
                f"all are listed in {self.path}; mend or remove them"
            )


def _line(key: str, reason: str) -> str:
    return f"{key}\t{reason}".replace("\n", " ") + "\n"
