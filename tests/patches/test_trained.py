"""Trained changes of layers: zero at first, equal to the merged layer, gradients beside peft's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.layers import TokenLinear
from ldm.patches.trained import ChangedLayer, ChangeForm, DoRA, LoRA, TrainedChange, new_change, shrink, split
from ldm.runtime.merging import merged

LAYERS = {
    "linear": (lambda: nn.Linear(24, 32), (2, 5, 24)),
    "vector": (lambda: nn.Linear(24, 32, bias=False), (2, 24)),
    "tokens": (lambda: TokenLinear(24, 32), (2, 24, 4, 3)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 5)),
    "1×1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 6, 5)),
}
FORMS = {
    f"{kind}{' with norms' if norms else ''}{f' of rank {rank}' if rank > 2 else ''}": ChangeForm(
        kind, rank, 3.0, norms
    )
    for kind in ("lora", "loha", "lokr")
    for norms in (False, True)
    for rank in ((1, 6) if kind == "lokr" else (2,))
}  # type: ignore[misc]


def stirred(change: TrainedChange) -> TrainedChange:
    """The change with random numbers in all of its parameters."""
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return change


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_change_begins_at_zero_and_merges_to_what_it_gives(name: str, form: ChangeForm) -> None:
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    changed = ChangedLayer(layer, new_change(layer.weight, form))
    assert torch.allclose(changed(x), layer(x), atol=1e-6)
    stirred(changed.change)
    assert not torch.allclose(changed(x), layer(x), atol=1e-2)
    whole = merged(nn.Sequential(layer), {"0.weight": [(1.0, changed.change.change())]})
    assert torch.allclose(changed(x), whole(x), atol=1e-5)
    changed(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in changed.change.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())


WHOLE = {name: form for name, form in FORMS.items() if name != "lora"}


@pytest.mark.parametrize("form", WHOLE.values(), ids=WHOLE)
def test_no_whole_matrix_is_kept_for_the_backward_pass(form: ChangeForm) -> None:
    """The backward pass computes it anew, and finds the same gradients."""
    layer, x = nn.Linear(96, 128).requires_grad_(False), torch.randn(2, 96, requires_grad=True)
    changed = ChangedLayer(layer, stirred(new_change(layer.weight, form)))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = [x, *changed.change.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = changed(x)
    del kept[layer.weight.untyped_storage().data_ptr()]
    assert sum(kept.values()) <= sum(parameter.nbytes for parameter in parameters)
    direct = layer(x) + nn.functional.linear(x, changed.change.change().delta(layer.weight))
    wanted = torch.autograd.grad(direct.square().sum(), parameters)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), parameters), wanted, strict=True):
        assert torch.equal(mine, other)


def test_dropped_ranks_are_those_of_the_sample() -> None:
    layer = nn.Linear(6, 4)
    change = LoRA(layer.weight, ChangeForm("lora", 3, 3.0))
    stirred(change)
    x = torch.randn(2, 5, 6)
    change.kept = torch.tensor([[2.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    first = 2 * x[0] @ change.down[[0, 2]].T @ change.up[:, [0, 2]].T
    assert torch.allclose(change(x, layer), torch.stack([first, torch.zeros(5, 4)]), atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_norm_shrinks_to_the_largest(kind: str) -> None:
    weight = torch.randn(16, 36)
    for form in (ChangeForm(kind, 2, 2.0), ChangeForm(kind, 2, 2.0, norms=True)):  # type: ignore[arg-type]
        change = stirred(new_change(weight, form))
        inner = change.inner if isinstance(change, DoRA) else change
        before = inner.change().delta(weight)
        assert torch.allclose(shrink(change, weight, 1e6), before.norm())
        assert torch.equal(inner.change().delta(weight), before)
        shrink(change, weight, 0.5)
        assert torch.allclose(inner.change().delta(weight), 0.5 * before / before.norm(), atol=1e-6)


@pytest.mark.parametrize(("side", "most", "parts"), [(320, None, (16, 20)), (320, 4, (4, 80)), (7, None, (1, 7))])
def test_the_parts_of_a_side(side: int, most: int | None, parts: tuple[int, int]) -> None:
    assert split(side, most) == parts


# --- beside peft ------------------------------------------------------------------------------------------------------


def theirs(layer: nn.Module, **options: Any) -> nn.Module:
    """peft's LoRA of a layer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options)
    return peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)


def parts(model: nn.Module, name: str) -> Tensor:
    return next(parameter for key, parameter in model.named_parameters() if name in key)


@pytest.mark.parametrize("norms", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_outputs_and_gradients_are_those_of_peft(name: str, norms: bool) -> None:
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    changed = ChangedLayer(layer, stirred(new_change(layer.weight, ChangeForm("lora", 2, 3.0, norms))))
    other = theirs(layer, use_dora=norms)
    change = changed.change
    inner = change.inner if isinstance(change, DoRA) else change
    assert isinstance(inner, LoRA)
    pairs = [(inner.down, parts(other, "lora_A")), (inner.up, parts(other, "lora_B"))]
    if isinstance(change, DoRA):
        pairs.append((change.norms, parts(other, "magnitude")))
    for mine, other_one in pairs:
        other_one.data = mine.detach().reshape(other_one.shape).clone()
    target = torch.randn_like(layer(x))
    for network in (changed, other):
        loss = (network(x) - target).square().mean()
        loss.backward()
    assert torch.allclose(changed(x), other(x), atol=1e-5)
    for mine, other_one in pairs:
        assert mine.grad is not None
        assert other_one.grad is not None
        assert torch.allclose(mine.grad, other_one.grad.reshape(mine.shape), atol=1e-5)
