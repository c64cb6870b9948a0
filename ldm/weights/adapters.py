"""Low-rank adapters as files: the names of every format, mapped to changes of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ldm.patches.low_rank import Change


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model."""

    name: str  # by which prompts and settings call it: the stem of its file
    file: Path
    kind: str  # "LoRA", "LoHa", "LoKr", "DoRA", "difference", or several of them
    layout: str  # whose names the file has: "kohya", "LyCORIS", "diffusers", "peft", …
    changes: Mapping[str, Mapping[str, Change]]  # component ("unet", "text_encoder", …) -> parameter -> change
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file
    digest: str = ""  # SHA-256 of the file
