"""What holds for all images of a folder within a source: repeats, a weight of their loss, a caption.

Folders are named in the configuration or, where it says so, by their numbers: in `10_sks dog`, as kohya's programs read
it, ten is how often an image comes in an epoch, and `sks dog` the caption of images without one.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ldm.errors import LdmError, listing, suggestion

log = logging.getLogger(__name__)
MOST_REPEATS = 10_000
_NUMBERED = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class FolderRule:
    """What holds for the images of a folder."""

    repeats: int = 1  # visits in an epoch
    weight: float = 1.0  # of their loss
    caption: str = ""  # of images without one; "": none


@dataclass(frozen=True)
class FolderRules:
    """The rules of a source's folders."""

    named: Mapping[str, FolderRule] = field(default_factory=dict)  # by path within the source; the innermost counts
    numbered: bool = False  # whether other folders at the top that have numbers say repeats and caption

    def of(self, source: str, keys: pa.ChunkedArray) -> tuple[list[FolderRule], np.ndarray]:
        """All rules, and the number of each image's rule (N,).

        Raises:
            LdmError: a named folder holds no image; numbers are read and no folder has one, or one is out of bounds.
        """
        rules, number_of = [FolderRule()], dict[str, int]()
        numbers = np.zeros(len(keys), dtype=np.int32)
        if not self.named and not self.numbered:
            return rules, numbers
        folders = [posixpath.dirname(key.decode("utf-8", "surrogateescape")) for key in keys.to_pylist()]
        used, bare = set[str](), set[str]()
        for row, folder in enumerate(folders):
            if folder not in number_of:
                name, rule = self._rule(folder)
                used.add(name)
                if not name:
                    bare.add(folder)
                number_of[folder] = len(rules)
                rules.append(rule)
            numbers[row] = number_of[folder]
        self._check(source, sorted(set(folders)), used)
        if self.numbered and bare:
            names = listing(sorted({folder.split("/")[0] or "at the top" for folder in bare}))
            count = sum(folder in bare for folder in folders)
            log.warning("%s: %d images in no folder with a number (%s) come once in an epoch", source, count, names)
        return rules, numbers

    def _rule(self, folder: str) -> tuple[str, FolderRule]:
        """The name of the folder whose rule holds in a folder ("": none), and the rule."""
        parts = folder.split("/")
        for length in range(len(parts), 0, -1):
            name = "/".join(parts[:length])
            if name in self.named:
                return name, self.named[name]
        found = _NUMBERED.fullmatch(parts[0]) if self.numbered else None
        if found:
            if not 1 <= int(found[1]) <= MOST_REPEATS:
                raise LdmError(
                    f"the folder {parts[0]} says that its images come {int(found[1])} times in an epoch, and 1 to "
                    f"{MOST_REPEATS} are possible: take it out, rename it, or name it in data.folders"
                )
            return parts[0], FolderRule(int(found[1]), caption=found[2].strip())
        return "", FolderRule()

    def _check(self, source: str, folders: list[str], used: set[str]) -> None:
        around = {"/".join(folder.split("/")[:length]) for folder in folders for length in range(1, 9)} - {""}
        for name in self.named:
            if name not in used and name not in around:
                has = suggestion(name, sorted(around)[:20]) if around else "it has no folders"
                raise LdmError(f"{source} has no images in the folder {name}; {has}")
        if self.numbered and not any(_NUMBERED.fullmatch(folder.split("/")[0]) for folder in folders):
            has = f"it has {listing(sorted(around))}" if around else "it has no folders"
            raise LdmError(f"{source} has no folder with a number, such as 10_dog; {has}; leave numbered_folders out")
