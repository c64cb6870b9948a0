"""Adapters merged into copies of networks that are fused, quantised, offloaded, compiled or recorded."""

from __future__ import annotations

import copy
import random
import threading
from pathlib import Path

import pytest
import tiny
import torch
from adapter_files import adapter, everything, saved
from networks import inputs
from torch import Tensor, nn

from ldm.models.unet import UNet
from ldm.patches.low_rank import Change, Decomposed, Difference, LowRank, add
from ldm.runtime import graphs
from ldm.runtime.compilation import _blocks, compile_blocks
from ldm.runtime.fused_cpu import fuse
from ldm.runtime.graphs import RecordedUNet, Recordings, Step
from ldm.runtime.merging import Branched, merged
from ldm.runtime.offload import by_layers
from ldm.runtime.precomputing import precomputed
from ldm.runtime.quantization import quantize
from ldm.weights.adapters import open_adapter

Changes = dict[str, list[tuple[float, Change]]]


def random_changes(unet: UNet, seed: int, weight: float = 1.0, biases: bool = False) -> Changes:
    """LoRAs of all layers of a U-Net."""
    torch.manual_seed(seed)
    changes: Changes = {}
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            ones = [1] * (parameter.ndim - 2)
            up, down = torch.randn(len(parameter), 4, *ones), torch.randn(4, *parameter.shape[1:])
            changes[name] = [(weight, LowRank(up, down, 0.01))]
        elif biases:
            changes[name] = [(weight, Difference(0.01 * torch.randn_like(parameter)))]
    return changes


def by_hand(unet: UNet, changes: Changes) -> UNet:
    """A whole copy, changed in place."""
    other = copy.deepcopy(unet)
    for name, parameter in other.named_parameters():
        total = parameter.detach().float().clone(memory_format=torch.preserve_format)
        for weight, change in changes.get(name, []):
            add(change, weight, parameter.detach(), total)
        parameter.data = total.to(parameter.dtype)
    return other


def result(unet: UNet, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    x, t, cond = inputs(unet, dtype)
    with torch.inference_mode():
        return precomputed(unet, cond)(x, t, cond)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_copy_is_changed_and_the_network_is_not(family: str) -> None:
    unet = tiny.model(family, shallow=True).unet
    before, plain = copy.deepcopy(unet.state_dict()), result(unet)
    changes = random_changes(unet, 1, biases=True)
    del changes["conv_in.weight"]
    other = merged(unet, changes)
    assert torch.equal(result(other), result(by_hand(unet, changes)))
    assert not torch.equal(result(other), plain)
    assert other.conv_in.weight is unet.conv_in.weight
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert torch.equal(result(unet), plain)


def test_twenty_mixes_in_random_order(tmp_path: Path) -> None:
    """Merged, changed and taken out, of files of all components."""
    model = tiny.model("sdxl", shallow=True)
    whole = copy.deepcopy({name: network.state_dict() for name, network in model.modules().items()})
    torch.manual_seed(0)
    files = [saved(adapter(model, "kohya-sgm", chosen=everything), tmp_path / f"{n}.safetensors") for n in range(3)]
    opened = [open_adapter(file, model) for file in files]
    choose = random.Random(0)
    for _ in range(20):
        mix = [(choose.uniform(-1, 1.5), one) for one in choose.sample(opened, choose.randint(0, 3))]
        for component, network in model.modules().items():
            changes: Changes = {}
            for weight, one in mix:
                for name, change in one.changes.get(component, {}).items():
                    changes.setdefault(name, []).append((weight, change))
            other = merged(network, changes)
            assert (other is network) == (not changes)
            for name, value in choose.sample(list(other.named_parameters()), 3):
                total = whole[component][name].float()
                for weight, change in changes.get(name, []):
                    total = total + weight * change.delta(total)
                torch.testing.assert_close(value, total, rtol=0, atol=1e-6)
    for component, network in model.modules().items():
        assert all(torch.equal(value, whole[component][name]) for name, value in network.state_dict().items())


def test_two_threads_do_not_see_each_others_adapters() -> None:
    unet = tiny.model("sd15", shallow=True).unet
    wanted = [result(by_hand(unet, random_changes(unet, seed))) for seed in (1, 2)]
    changes = [random_changes(unet, seed) for seed in (1, 2)]
    wrong: list[int] = []
    x, t, cond = (torch.manual_seed(0), inputs(unet, torch.float32))[1]

    def work(number: int) -> None:
        for _ in range(5):
            with torch.inference_mode():
                if not torch.equal(precomputed(merged(unet, changes[number]), cond)(x, t, cond), wanted[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_fused_layers_and_packed_copies(dtype: torch.dtype) -> None:
    unet = tiny.model("sdxl", shallow=True).unet.to(dtype)
    fuse(unet)
    changes = random_changes(unet, 1, biases=True)
    plain = result(unet, dtype)
    other = merged(unet, changes)
    changed = result(other, dtype)
    assert torch.equal(changed, result(by_hand(unet, changes), dtype))
    assert not torch.equal(changed, plain)
    assert torch.equal(result(unet, dtype), plain)
    assert {type(layer) for layer in other.modules()} == {type(layer) for layer in unet.modules()}


def test_with_layers_offloaded_one_at_a_time() -> None:
    unet = tiny.model("sdxl", shallow=True).unet
    changes = random_changes(unet, 1, biases=True)
    del changes["mid_block.resnets.0.conv1.bias"]  # a layer of which one parameter is changed
    wanted, plain = result(by_hand(unet, changes)), result(unet)
    by_layers(unet, torch.device("cpu"))
    other = merged(unet, changes)
    assert torch.equal(result(other), wanted)
    assert torch.equal(result(unet), plain)
    assert all(parameter.is_meta for parameter in other.parameters())
    assert torch.equal(result(merged(unet, changes)), wanted)


def shapes_of_branches(unet: nn.Module) -> set[int]:
    return {len(layer.factors) for layer in unet.modules() if isinstance(layer, Branched)}


def decomposed(unet: UNet, changes: Changes) -> Changes:
    def one(name: str, change: Change) -> Change:
        weight = unet.get_parameter(name)
        if type(weight) is nn.Parameter:
            return change
        return Decomposed(change, 1.1 * weight.dequantize().norm(dim=1, keepdim=True))

    return {name: [(weight, one(name, change)) for weight, change in own] for name, own in changes.items()}


@pytest.mark.parametrize("kind", ["int8", "int8-weights"])
def test_beside_quantised_weights(kind: str) -> None:
    plain = tiny.model("sdxl", shallow=True).unet
    unet = copy.deepcopy(plain)
    quantize(unet, kind)
    before = result(unet)
    low = {name: [*own, (-0.5, own[0][1])] for name, own in random_changes(unet, 1).items()}
    for changes, factors in ((low, 2), (decomposed(unet, low), 1)):
        other = merged(unet, changes)
        assert shapes_of_branches(other) == {factors}
        wanted, made = result(by_hand_branch(unet, plain, changes)), result(other)
        assert float((made - wanted).norm() / (wanted - before).norm()) < 0.05
        assert torch.equal(result(unet), before)


def by_hand_branch(unet: UNet, plain: UNet, changes: Changes) -> UNet:
    """The plain U-Net with the quantised one's weights, changed."""
    other = copy.deepcopy(plain)
    for name, parameter in other.named_parameters():
        weight = unet.get_parameter(name).detach()
        base = weight if type(unet.get_parameter(name)) is nn.Parameter else weight.dequantize()
        parameter.data = base.float() + sum((w * c.delta(base) for w, c in changes.get(name, [])), torch.zeros(()))
    return other


def test_recorded_steps_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def record(step: Step) -> Step:
        recorded.append(step)
        return step

    unet = tiny.model("sdxl", shallow=True).unet
    changes = random_changes(unet, 1)
    wanted, plain = result(by_hand(unet, changes)), result(unet)
    unet.recordings = Recordings(unet, record)  # type: ignore[assignment]
    unet.__class__ = RecordedUNet
    assert torch.equal(result(unet), plain) and len(recorded) == 1
    other = merged(unet, changes)
    assert torch.equal(result(other), wanted) and len(recorded) == 2
    assert torch.equal(result(other), wanted) and len(recorded) == 2
    assert torch.equal(result(unet), plain) and len(recorded) == 2
    assert graphs.LOCK.acquire(blocking=False)
    graphs.LOCK.release()


def test_with_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of blocks are compiled, and weights are inputs of what is compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("ldm.runtime.compilation.check_compiling", lambda device: None)
    monkeypatch.setattr("ldm.runtime.compilation._blocks", _blocks.__wrapped__)  # neither what others compiled nor kept
    unet = tiny.model("sdxl", shallow=True).unet
    changes = random_changes(unet, 1)
    wanted = result(by_hand(unet, changes))
    compile_blocks(unet)
    other = merged(unet, changes)
    torch.testing.assert_close(result(other), wanted)
    kernels = [p for p in other.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert {type(layer) for layer in other.modules()} == {type(layer) for layer in unet.modules()}
