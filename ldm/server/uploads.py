"""The pixels of uploaded images that a server holds: counted before an image is decoded, until its job is over."""

from __future__ import annotations

import threading

from ldm.errors import LdmError
from ldm.server.engine import NotTakenError
from ldm.server.limits import Limits

MOST = 64  # images of one request


class Uploads:
    """The pixels of all requests and jobs of a server."""

    def __init__(self) -> None:
        self.pixels = 0
        self.changing = threading.Lock()


class RequestUploads:
    """What one request adds to them, within its limits."""

    def __init__(self, uploads: Uploads, limits: Limits) -> None:
        self.uploads, self.limits = uploads, limits
        self.images = self.pixels = 0

    def take(self, name: str, pixels: int) -> None:
        """Count an image of a setting, which is decoded next.

        Raises:
            LdmError: the request has too many images or pixels.
            NotTakenError: all requests together have too many pixels now.
        """
        most = self.limits.uploads
        if self.images == MOST:
            raise LdmError(f"{name}: this server takes at most {MOST} images in one request")
        if self.pixels + pixels > most:
            raise LdmError(f"{name}: the request's images have {self.pixels + pixels:,} pixels; at most {most:,} fit")
        with self.uploads.changing:
            if self.uploads.pixels + pixels > most:
                raise NotTakenError(
                    f"images uploaded for jobs have {self.uploads.pixels + pixels:,} pixels in all: try again later"
                )
            self.uploads.pixels += pixels
            self.images, self.pixels = self.images + 1, self.pixels + pixels

    def give_back(self) -> None:
        """Count the request's images no more."""
        with self.uploads.changing:
            self.uploads.pixels -= self.pixels
            self.pixels = 0
