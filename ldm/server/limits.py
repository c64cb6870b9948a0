"""The limits of a server: everything is bounded before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.errors import LdmError


@dataclass(frozen=True)
class Limits:
    """Upper bounds of requests."""

    body: int = 32 * 2**20  # bytes of a request
    upload: int = 16 * 2**20  # pixels of an uploaded image
    pixels: int = 2**22  # of an image to make, or of a batch of its job, in the largest pass
    steps: int = 150  # of one pass
    images: int = 16  # of one job
    characters: int = 4000  # of one text
    chunks: int = 16  # of one prompt, of 75 tokens each
    seconds: float = 600.0  # that a job may take, with its time in the queue
    queue: int = 256  # images that may wait
    uploads: int = 2**27  # pixels of all uploaded images of jobs that are not over
    kept: int = 2**27  # pixels of images of jobs that are over, kept to be fetched
    kept_jobs: int = 1000  # that are over
    keep_seconds: float = 900.0  # how long they are kept


def check_most(*rows: tuple[str, int, int]) -> None:
    """Raise unless each value of the rows (name, value, limit) is within its limit.

    Raises:
        LdmError: one is not.
    """
    for name, value, most in rows:
        if value > most:
            raise LdmError(f"{value:,} {name}: this server makes at most {most:,}")
