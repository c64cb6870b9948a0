"""`Adapter`: changes of a model's weights, read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ldm.patches.low_rank import Change


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model."""

    name: str  # by which prompts and settings call it: the stem of its file
    file: Path  # or its folder
    kind: str  # "LoRA", "LoHa", "LoKr", "DoRA", "difference", or several of them
    layout: str  # whose names the file has, a key of `ldm.weights.adapters.names.NAMINGS`
    changes: Mapping[str, Mapping[str, Change]]  # component ("unet", "text_encoder", …) -> parameter -> change
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file
    digest: str = ""  # SHA-256 of the file
    bundled: tuple[str, ...] = ()  # textual-inversion embeddings that the file holds too; they are not used
