"""Pipelines, which turn prompts into images with an `ldm.LatentDiffusion`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ldm  # noqa: F401  (before PyTorch, because of its threads)

if TYPE_CHECKING:
    from pipelines.pipeline import Pipeline, Result

__all__ = ["Pipeline", "Result"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pipelines import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
