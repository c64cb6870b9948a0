"""Evaluation of generated images: figures with their intervals, and comparisons of two models.

from ldm.evaluation import EvaluationPlan, Model, Workspace, evaluate
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import EvaluationPlan, Model, Workspace, evaluate

__all__ = ["EvaluationPlan", "Model", "Workspace", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ldm.evaluation import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'ldm.evaluation' has no attribute {name!r}")
