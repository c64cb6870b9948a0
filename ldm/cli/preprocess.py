"""`ldm preprocess`: makes a condition image."""

from __future__ import annotations

import logging
import sys

from PIL import Image

from ldm.cli.common import to_png
from ldm.conditions.table import condition
from ldm.images import load_image, save_png
from pipelines.settings import find

log = logging.getLogger(__name__)


def preprocess_image(kind: str, file: str, out: str, model: str | None, size: str | None) -> None:
    """Write the condition image of an image, and print its path."""
    logging.basicConfig(format="ldm: %(message)s", level=logging.WARNING, stream=sys.stderr)
    target, image = to_png(out), load_image(file)
    if size is not None:
        wanted = find("size", "shell").parse(size, "--size")
        if wanted != image.size:
            log.warning("%s is resized from %d×%d to %d×%d", file, *image.size, *wanted)
            image = image.resize(wanted, Image.Resampling.LANCZOS)
    save_png(condition(kind, image, model=model), target)
    print(target)
