"""Low-rank adapters as files: the names of every format, mapped to changes of a model's weights."""

from __future__ import annotations

from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.reading import open_adapter

__all__ = ["Adapter", "open_adapter"]
