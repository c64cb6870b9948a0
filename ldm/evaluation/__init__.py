"""How good generated images are, in figures with their intervals, and whether one model is better than another.

from ldm.evaluation import EvaluationPlan, Model, Workspace, evaluate
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import EvaluationPlan, Model, evaluate
    from ldm.evaluation.stored import Workspace

__all__ = ["EvaluationPlan", "Model", "Workspace", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ldm.evaluation import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'ldm.evaluation' has no attribute {name!r}")
