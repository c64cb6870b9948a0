"""Networks changed without touching the ones that others use.

Three ways, each with its invariant: `twin` copies all modules and shares all parameters; `replaced` and `rebuilt` share
every module that they do not replace; `reclassed` changes a network in place, and keeps its parameters and their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def twin(module: M) -> M:
    """A copy of a module on the same parameters, for changes that no other user of them may see."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def replaced(module: M, **parts: nn.Module) -> M:
    """A shallow copy of a module with some of its parts replaced; it shares the others."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other


def rebuilt(module: M, change: Callable[[nn.Module], nn.Module | None]) -> M:
    """A copy of a module in which `change` has replaced parts; the module itself if it replaced none.

    `change` is asked from the outside in, for each part; None leaves the part and asks for the parts inside it.
    """
    changed = change(module)
    if changed is not None:
        return changed  # type: ignore[return-value]
    parts = {name: rebuilt(part, change) for name, part in module.named_children()}
    if all(part is getattr(module, name) for name, part in parts.items()):
        return module
    return replaced(module, **parts)


def reclassed(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Give the layers of a network other classes, by the class that they have; parameters stay as they are."""
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
