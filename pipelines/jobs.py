"""Jobs: images of one list, each with settings of its own. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

TEXTS = ("negative", "prompt_2", "negative_2")  # settings that each image of a batch has for itself, as its prompt
IMAGES = (("image", "RGB"), ("mask", "L"))  # settings that are image files, and PIL's modes


@dataclass(frozen=True)
class Job:
    """One image to make."""

    index: int
    prompt: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()  # of its line, or of its cell, alone
    place: str = ""  # the place of that line or cell, for errors
    loading: tuple[tuple[str, Any], ...] = ()  # settings of loading the model, of its cell alone

    def name(self, common: dict[str, Any]) -> str:
        """A file name that is different for every different image."""
        text = json.dumps([self.prompt, self.seed, self.settings, common], sort_keys=True, default=str)
        return f"{self.index:06d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png"
