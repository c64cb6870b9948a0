"""What each way of changing a network shares with the network, and what it leaves as it was."""

from __future__ import annotations

import copy

import tiny
import torch
from torch import nn

from ldm.models.layers import GEGLU, Attention, CrossAttention, ResnetBlock
from ldm.models.surgery import rebuilt, reclassed, replaced, twin


def network() -> nn.Module:
    return tiny.model("sd15").unet


def parameters(module: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in module.named_parameters()}


def modules(module: nn.Module) -> dict[str, int]:
    return {name: id(part) for name, part in module.named_modules()}


def test_a_twin_shares_all_parameters_and_no_module() -> None:
    unet = network()
    other = twin(unet)
    assert parameters(other) == parameters(unet)
    assert modules(other).keys() == modules(unet).keys()
    assert not set(modules(other).values()) & set(modules(unet).values())


def test_replaced_shares_the_other_parts() -> None:
    unet = network()
    before = modules(unet)
    identity = nn.Identity()
    other = replaced(unet, mid_block=identity)
    assert type(other) is type(unet) and other is not unet
    assert other.mid_block is identity
    assert list(dict(other.named_children())) == list(dict(unet.named_children()))  # in the same order
    for name, part in unet.named_children():
        assert name == "mid_block" or getattr(other, name) is part
    assert modules(unet) == before


def test_rebuilt_copies_only_the_way_to_what_it_replaces() -> None:
    unet = network()
    before = modules(unet)
    seen: list[nn.Module] = []

    def replacements(module: nn.Module) -> dict[str, nn.Module]:
        seen.append(module)
        return {"to_k": nn.Identity()} if isinstance(module, CrossAttention) else {}

    other = rebuilt(unet, replacements)
    assert modules(unet) == before
    keys = [name for name, part in unet.named_modules() if isinstance(part, CrossAttention)]
    assert keys
    for name, part in other.named_modules():
        changed = any(key == name or key.startswith(name + ".") or name == "" for key in keys)
        replaced_part = name.removesuffix(".to_k") in keys and name.endswith(".to_k")
        assert (id(part) != before[name]) == (changed or replaced_part), name
    gone = {id(unet.get_submodule(f"{key}.to_k")) for key in keys}
    assert not gone & {id(module) for module in seen}  # it is not asked about what it has replaced
    assert set(parameters(unet)) - set(parameters(other)) == {f"{key}.to_k.weight" for key in keys}
    assert rebuilt(unet, lambda module: {}) is unet


def test_reclassed_keeps_parameters_and_their_names() -> None:
    class OtherGEGLU(GEGLU):
        pass

    unet = network()
    before, state = parameters(unet), copy.deepcopy(unet.state_dict())
    kinds = {name: type(part) for name, part in unet.named_modules()}
    reclassed(unet, {GEGLU: OtherGEGLU, Attention: CrossAttention, ResnetBlock: ResnetBlock})
    assert parameters(unet) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    wanted = {GEGLU: OtherGEGLU, Attention: CrossAttention}  # exactly that class: a subclass stays as it is
    assert {name: type(part) for name, part in unet.named_modules()} == {
        name: wanted.get(kind, kind) for name, kind in kinds.items()
    }
