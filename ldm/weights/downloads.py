"""Digests of files that came from the Hugging Face Hub, as huggingface_hub keeps them.

In its cache a file is a link to `blobs/ETAG`; of a download to a folder (`local_dir`), `.cache/huggingface/download`
holds a file NAME.metadata with the lines commit, ETAG and time. The ETag is the SHA-256 of a file of Git LFS, and
git's SHA-1 of a small file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from ldm.errors import LdmError
from ldm.files import Progress, file_digest, silent

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DEPTH = 3  # most folders between a file and the folder of its download


def hub_digest(path: Path) -> str:
    """The Hub's digest of a downloaded file, 64 hexadecimal digits of SHA-256 or 40 of SHA-1; "" if it is not known.

    A file that was changed after its download to a folder has none, as for huggingface_hub.
    """
    target = path.resolve()
    if target.parent.name == "blobs":
        return target.name if _DIGEST.fullmatch(target.name) else ""
    for folder in list(path.absolute().parents)[:_DEPTH]:
        name = path.absolute().relative_to(folder)
        stated = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        try:
            _, etag, time = stated.read_text().split()
            if path.stat().st_mtime - 1 <= float(time):
                return etag if _DIGEST.fullmatch(etag) else ""
        except (OSError, ValueError):  # there is none, or it is damaged
            continue
    return ""


def check_download(path: Path, progress: Progress = silent) -> bool:
    """Compare a file with the Hub's digest of it; returns False if that is not known.

    Raises:
        LdmError: they differ.
    """
    wanted = hub_digest(path)
    if not wanted:
        return False
    if len(wanted) == 64:
        digests = {file_digest(path, progress, plain=True)}
    else:  # a copy of the Hub may give the SHA-1 of the content itself
        content = path.read_bytes()
        digests = {hashlib.sha1(start + content).hexdigest() for start in (b"blob %d\0" % len(content), b"")}
    if wanted not in digests:
        raise LdmError(
            f"{path} is not what the Hub has (its digest there is {wanted[:12]}…): delete {path.resolve()} and fetch "
            "it again, or, if the change is wanted, copy the model to another folder"
        )
    return True


def check_texts(folders: Iterable[Path]) -> None:
    """Compare configurations and tokenizers in folders with the Hub's digests.

    Raises:
        LdmError: one differs.
    """
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".txt") and path.is_file():
                check_download(path)
