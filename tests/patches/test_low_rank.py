"""The mathematics of adapters against the written formulas, element by element in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.patches.low_rank import Change, Decomposed, Difference, Factors, Hadamard, Kronecker, LowRank

O, I, R, K = 6, 4, 3, 3  # noqa: E741


def close(change: Change, weight: Tensor, wanted: Tensor) -> None:
    made = change.delta(weight)
    assert made.dtype == torch.float32 and made.shape == weight.shape
    torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=1e-6)


def kernel(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """A Tucker decomposition: outputs (R, O), inputs (S, I)."""
    made = torch.zeros(outputs.shape[1], inputs.shape[1], *core.shape[2:], dtype=torch.float64)
    for r in range(core.shape[0]):
        for s in range(core.shape[1]):
            outer = outputs[r, :, None].double() * inputs[s, None, :].double()
            made += outer[:, :, None, None] * core[r, s].double()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lora(dtype: torch.dtype) -> None:
    up, down = torch.randn(O, R).to(dtype), torch.randn(R, I).to(dtype)
    close(LowRank(up, down, 0.5), torch.zeros(O, I, dtype=dtype), 0.5 * up.double() @ down.double())
    wide = torch.randn(R, I, K, K).to(dtype)
    wanted = torch.einsum("or,rikl->oikl", up.double(), wide.double())
    close(LowRank(up[:, :, None, None], wide, 1.0), torch.zeros(O, I, K, K), wanted)
    core = torch.randn(R, R, K, K).to(dtype)
    tucker = LowRank(up[:, :, None, None], down[:, :, None, None], 2.0, core)
    close(tucker, torch.zeros(O, I, K, K), 2 * kernel(core, up.T, down))


def test_loha() -> None:
    a, b, c, d = torch.randn(O, R), torch.randn(R, I * K * K), torch.randn(O, 2), torch.randn(2, I * K * K)
    wanted = 0.5 * (a.double() @ b.double()) * (c.double() @ d.double())
    close(Hadamard(Factors(a, b), Factors(c, d), 0.5), torch.zeros(O, I, K, K), wanted.reshape(O, I, K, K))
    sides = [torch.randn(R, O), torch.randn(R, I), torch.randn(R, O), torch.randn(R, I)]
    cores = [torch.randn(R, R, K, K), torch.randn(R, R, K, K)]
    made = Hadamard(Factors(sides[0], sides[1], cores[0]), Factors(sides[2], sides[3], cores[1]))
    wanted = kernel(cores[0], sides[0], sides[1]) * kernel(cores[1], sides[2], sides[3])
    close(made, torch.zeros(O, I, K, K), wanted)


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Blocks of `second`, each times an element of `first`."""
    rows = [torch.cat([element * second.double() for element in row], dim=1) for row in first.double()]
    return torch.cat(rows)


def test_lokr() -> None:
    first, second = torch.randn(2, 2), torch.randn(3, 2)
    close(Kronecker(first, second, 0.5), torch.zeros(O, I), 0.5 * kronecker(first, second))
    close(Kronecker(first, second[:, :, None, None]), torch.zeros(O, I), kronecker(first, second))
    whole = torch.randn(3, 2, K, K)
    close(Kronecker(first, whole), torch.zeros(O, I, K, K), kronecker(first, whole))
    a, b, c, d = torch.randn(2, 1), torch.randn(1, 2), torch.randn(3, R), torch.randn(R, 2 * K * K)
    wanted = kronecker(a @ b, (c @ d).reshape(3, 2, K, K))
    close(Kronecker(Factors(a, b), Factors(c, d)), torch.zeros(O, I, K, K), wanted)
    core, outputs, inputs = torch.randn(R, R, K, K), torch.randn(R, 3), torch.randn(R, 2)
    wanted = kronecker(first, kernel(core, outputs, inputs))
    close(Kronecker(first, Factors(outputs, inputs, core)), torch.zeros(O, I, K, K), wanted)


def test_differences() -> None:
    value = torch.randn(O, I).half()
    close(Difference(value), torch.zeros(O, I, 1, 1), value.double()[:, :, None, None])
    close(Difference(value[:, 0]), torch.zeros(O), value[:, 0].double())


@pytest.mark.parametrize("shape", [(O, I), (O, I, K, K)])
@pytest.mark.parametrize("per_input", [False, True])
def test_dora(shape: tuple[int, ...], per_input: bool) -> None:
    weight, change = torch.randn(shape), Difference(torch.randn(shape))
    moved = (weight + change.value).double()
    side = 1 if per_input else 0
    norms = torch.rand(shape[side]) + 0.5
    wanted = moved.clone()
    for index in range(shape[side]):
        part = moved.select(side, index)
        wanted.select(side, index).copy_(norms[index] * part / part.pow(2).sum().sqrt())
    columns = [1] * len(shape)
    columns[side] = -1
    close(Decomposed(change, norms.reshape(columns)), weight, wanted - weight.double())


def test_dora_of_rows_that_are_zeros() -> None:
    weight = torch.zeros(O, I)
    assert torch.equal(Decomposed(Difference(torch.zeros(O, I)), torch.ones(O, 1)).delta(weight), weight)
