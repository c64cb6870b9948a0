"""The optimiser Muon: the momentum of a matrix is made orthogonal before it is added.

Jordan 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982), by which an
update is about as large as AdamW's, so that the same learning rates serve.

m, n rows and columns of a matrix, m ≤ n
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ldm.runtime.bf16 import computes_bf16
from ldm.training.parallel.spread import spread_like, whole

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of x, x³ and x⁵, which take singular values near 1 in few steps
STEPS = 5
SIZE = 0.2  # root mean square of an update, for a learning rate of 1


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, in which the first one counts rows; AdamW for all others."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        betas: tuple[float, float] = (0.95, 0.99),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        """Groups of parameters, each with its "lr"; the decay of the momentum and of AdamW's second moment; decoupled
        weight decay; and what is added to the root of AdamW's second moment."""
        super().__init__(params, {"betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights by their gradients; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                change = self._matrix(parameter, group) if parameter.ndim > 1 else self._vector(parameter, group)
                parameter.add_(change, alpha=-group["lr"])
        return loss

    def _matrix(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The change of a matrix, by Nesterov's momentum."""
        state, gradient, decay = self.state[parameter], parameter.grad, group["betas"][0]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - decay)
        matrix = whole(gradient.lerp(momentum, decay)).flatten(1)
        dtype = torch.bfloat16 if computes_bf16(matrix.device) else torch.float32
        change = orthogonal(matrix, dtype) * (SIZE * max(matrix.shape) ** 0.5)
        return spread_like(change.view(parameter.shape), parameter)

    def _vector(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The change of a vector, by AdamW."""
        state, gradient, (first, second) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["step"].item())
        square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["step"].item())
        return mean / (square.sqrt() + group["eps"])


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (m, n) or (n, m) with the same singular vectors, whose singular values are near 1, from 0.7 to 1.2.

    The iteration x ← a x + b (x xᵀ) x + c (x xᵀ)² x of Newton and Schulz, computed in `dtype`.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, dtype).T
    x = (matrix / matrix.norm().clamp(min=1e-12)).to(dtype)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrix.dtype)
