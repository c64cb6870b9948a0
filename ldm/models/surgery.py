"""Functions that change the layers of a network.

`twin` copies all modules and shares all parameters; `replaced`, `rebuilt` and `exchanged` make a copy that shares every
module that they do not replace, `reweighted` one with other parameters; `reclassed` changes a network in place, and
keeps its parameters and their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def twin(module: M) -> M:
    """A copy of a module with the same parameters; changes to the copy's modules do not affect the original."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in held_parameters(module)})


def held_parameters(module: nn.Module) -> list[Any]:
    """The parameters that a module and its sub-modules hold; in place of a freed weight, what makes it anew."""
    return [held for part in module.modules() for held in dict.values(part._parameters) if held is not None]


def replaced(module: M, **parts: nn.Module) -> M:
    """A shallow copy of a module with the named sub-modules replaced; all other sub-modules are shared."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other


def rebuilt(module: M, replacements: Callable[[nn.Module], Mapping[str, nn.Module]]) -> M:
    """A copy of a module with sub-modules replaced at any depth; the module itself if nothing is replaced.

    `replacements` is called for each module, from the outside in, and returns the replacements of its direct
    sub-modules by name; it is not called inside a replaced sub-module.
    """
    new = replacements(module)
    parts = {name: new[name] if name in new else rebuilt(part, replacements) for name, part in module.named_children()}
    if all(part is getattr(module, name) for name, part in parts.items()):
        return module
    return replaced(module, **parts)


def exchanged(module: M, layers: Mapping[str, nn.Module]) -> M:
    """A copy of a module with the named sub-modules, at any depth, replaced; all else is shared."""
    parts = {name: layer for name, layer in layers.items() if "." not in name}
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        part, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(part, {})[rest] = layer
    return replaced(module, **parts, **{part: exchanged(getattr(module, part), own) for part, own in inner.items()})


def reweighted(layer: M, parameters: Mapping[str, nn.Parameter]) -> M:
    """A shallow copy of a module with the named parameters of its own replaced; all else is shared."""
    other = copy.copy(layer)
    other._parameters = layer._parameters.copy()
    other._parameters.update(parameters)
    return other


def widened(layer: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """A convolution that reads more channels, whose new weights are zeros, so that it ignores them at first."""
    weight = layer.weight.new_zeros(len(layer.weight), in_channels, *layer.kernel_size)
    weight[:, : layer.in_channels] = layer.weight.detach()
    wide = reweighted(layer, {"weight": nn.Parameter(weight)})
    wide.in_channels = in_channels
    return wide


def reclassed(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Change the classes of a network's layers in place: `classes` maps old classes to new ones."""
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
