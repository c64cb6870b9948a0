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


def rebuilt(module: M, replacements: Callable[[nn.Module], Mapping[str, nn.Module]]) -> M:
    """A copy of a module with parts replaced at any depth; the module itself if none are.

    `replacements` is asked for each module, from the outside in, which of its direct parts to replace, by their names;
    it is not asked about what lies inside a replaced part.
    """
    new = replacements(module)
    parts = {name: new[name] if name in new else rebuilt(part, replacements) for name, part in module.named_children()}
    if all(part is getattr(module, name) for name, part in parts.items()):
        return module
    return replaced(module, **parts)


def reclassed(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Change the classes of a network's layers, each by the class that it has; parameters stay as they are."""
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
