"""Weights in a kernel's order alone: freed, given back to the bit to who reads them, and changed by who holds them."""

from __future__ import annotations

import copy
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from networks import distance, inputs
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ldm.models.surgery import reweighted, twin
from ldm.runtime import graphs, reordered
from ldm.runtime.fused_cpu import CPULinear, FusedConv2d, fuse, works
from ldm.runtime.kernels import filters, products
from ldm.runtime.kernels.memory import drop_pages
from ldm.runtime.reordered import LARGE, Reordered, stored
from pipelines import Pipeline

KINDS = [
    ("convolution", torch.float32),
    pytest.param(
        ("convolution", torch.bfloat16), marks=pytest.mark.skipif(not works(torch.bfloat16), reason="no bf16")
    ),
    pytest.param(("linear", torch.bfloat16), marks=pytest.mark.skipif(not works(torch.bfloat16), reason="no bf16")),
]


@pytest.fixture(params=KINDS, ids=str)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    """A layer of a weight that is large enough to be freed."""
    kind, dtype = request.param
    made: nn.Module = FusedConv2d(64, 64, 3, padding=1) if kind == "convolution" else CPULinear(320, 160)
    assert sum(p.nbytes for p in made.to(dtype).parameters()) > LARGE
    return made


@pytest.fixture(autouse=True)
def no_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers and large filters are computed by oneDNN too."""
    monkeypatch.setattr(products, "MOST", 0)
    monkeypatch.setattr(filters, "LEAST", 10**9)


def used(layer: Any) -> Tensor:
    """What a layer makes of the same numbers, without gradients."""
    shape = (1, 64, 6, 5) if isinstance(layer, nn.Conv2d) else (7, 320)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.bias.dtype)
    with torch.inference_mode():
        return layer(x)


def expected(layer: Any) -> Tensor:
    """The same by a plain layer with the same weights."""
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    return used(plain)


def memory(layer: Any) -> StorageWeakRef:
    """A weak reference to the memory of a layer's weight."""
    return StorageWeakRef(layer.weight.untyped_storage())


def is_free(layer: Any) -> bool:
    """Whether a layer's weight is in a kernel's order alone."""
    found = dict.get(layer._parameters, "weight")
    return isinstance(found, Reordered) and found.weight is None


def test_it_is_freed_and_given_back_to_the_bit(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e-40, torch.inf, torch.nan])
    before, requires, place = layer.weight.detach().clone(), layer.weight.requires_grad, memory(layer)
    used(layer)
    assert is_free(layer) and place.expired()
    after = layer.weight
    assert type(after) is nn.Parameter and after.requires_grad == requires and not after.is_inference()
    assert torch.equal(after.view(torch.uint8), before.view(torch.uint8)) and after.stride() == before.stride()
    assert layer.weight is after
    again = memory(layer)
    del after
    used(layer)
    assert again.expired()
    assert list(layer.state_dict()) == ["weight", "bias"] and list(dict(layer.named_parameters())) == ["weight", "bias"]
    assert all(isinstance(value, nn.Parameter) for value in layer._parameters.values())


def hold_parameter(layer: Any) -> Any:
    return layer.weight


def hold_view(layer: Any) -> Any:
    return layer.weight.detach()[1:]


def hold_state(layer: Any) -> Any:
    return layer.state_dict()


def hold_graph(layer: Any) -> Any:
    return (layer.weight * 2).sum()


@pytest.mark.parametrize("hold", [hold_parameter, hold_view, hold_state, hold_graph])
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_stays_while_somebody_holds_it(layer: Any, hold: Callable[[Any], Any], when: str) -> None:
    if when == "after":
        used(layer)
    held, place = hold(layer), memory(layer)
    for _ in range(3):
        used(layer)
    assert not is_free(layer) and StorageWeakRef(layer.weight.untyped_storage()).cdata == place.cdata
    del held
    used(layer)
    assert is_free(layer) and place.expired()


def by_name(layer: Any) -> None:
    layer.weight.mul_(3)


def by_row(layer: Any) -> None:
    layer.weight[0].zero_()


def by_data(layer: Any) -> None:
    layer.weight.data.mul_(3)


def by_new_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 3


def by_new_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight * 3)


def by_loading(layer: Any) -> None:
    layer.load_state_dict({name: value * 3 for name, value in layer.state_dict().items()})


def by_assigning(layer: Any) -> None:
    layer.load_state_dict({name: value * 3 for name, value in layer.state_dict().items()}, assign=True)


def by_parameters(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.copy_(parameter * 3)


CHANGES = [by_name, by_row, by_data, by_new_data, by_new_parameter, by_loading, by_assigning, by_parameters]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(layer: Any, change: Callable[[Any], None]) -> None:
    before = used(layer)
    with torch.no_grad():
        change(layer)
    after = used(layer)
    assert distance(after, before) > 0.01
    assert is_free(layer)
    assert distance(after, expected(layer)) < 1e-2


def test_new_data_in_memory_of_old_data() -> None:
    """Also where weights cannot be made anew to be compared."""
    layer = FusedConv2d(4, 4, 3)
    x = torch.randn(1, 4, 5, 5)
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(20):
            assert distance(layer(x), F.conv2d(x, layer.weight, layer.bias)) < 1e-5
            for _ in range(2):  # the second is likely to be where the weight was before the first
                layer.weight.data = layer.weight.data * 1.5


def test_changes_by_who_holds_it_count(layer: Any) -> None:
    used(layer)
    for held in (layer.weight, layer.weight.detach()[1:], layer.state_dict()["weight"]):
        for _ in range(2):
            before = used(layer)
            with torch.no_grad():
                held.mul_(2)
            assert distance(used(layer), before) > 0.1
            assert distance(used(layer), expected(layer)) < 1e-2
    with torch.no_grad():
        layer.weight.data.mul_(0)  # it was held, and nobody reads it before it would be freed
    held = None
    assert float(used(layer).std((-1, -2) if used(layer).ndim == 4 else 0).max()) < 1e-2  # the bias alone


def test_other_types(layer: Any) -> None:
    used(layer)
    wanted = layer.weight.double()
    layer.double()
    assert layer.weight.dtype == torch.float64 and torch.equal(layer.weight, wanted)
    assert used(layer).dtype == torch.float64


def test_gradients(layer: Any) -> None:
    used(layer)
    x = torch.randn((1, 64, 6, 5) if isinstance(layer, nn.Conv2d) else (7, 320)).to(layer.bias.dtype)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    used(layer)
    assert layer.weight.grad is not None and not is_free(layer)
    layer.requires_grad_(False).zero_grad()
    used(layer)
    assert is_free(layer) and not layer.weight.requires_grad


def test_copies(layer: Any) -> None:
    """Deep ones and files are independent; twins share the weight, in memory once."""
    wanted = used(layer)
    deep = copy.deepcopy(layer)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    read = torch.load(saved, weights_only=False)
    same, biased = twin(layer), reweighted(layer, {"bias": nn.Parameter(layer.bias + 1)})
    del saved
    assert torch.equal(used(same), wanted) and distance(used(biased), wanted + 1) < 1e-2
    assert same.weight is layer.weight is biased.weight
    used(layer)
    assert is_free(twin(layer)) and is_free(layer)  # and a twin makes none anew
    assert is_free(same) and is_free(layer) and is_free(biased)
    with torch.no_grad():
        layer.weight.zero_()
    assert distance(used(same), wanted) > 0.1 and torch.equal(used(same), used(layer))
    assert torch.equal(used(deep), wanted) and torch.equal(used(read), wanted)


def test_small_ones_stay() -> None:
    layer = FusedConv2d(4, 4, 3)
    with torch.inference_mode():
        layer(torch.randn(1, 4, 5, 5))
    assert not is_free(layer)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reordered, "LARGE", 0)


def layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those whose weights oneDNN's order takes the place of: all convolutions, and linear layers in bf16."""
    for name, one in network.named_modules():
        if isinstance(one, FusedConv2d) or (isinstance(one, CPULinear) and stored(one).dtype == torch.bfloat16):
            yield name, one


@pytest.mark.usefixtures("all_are_large")
def test_each_weight_of_a_network_is_in_memory_once() -> None:
    """All but those of layers that double, whose order cannot be turned back."""
    unet = tiny.model("sd15").unet
    wanted = {name: value.clone() for name, value in unet.state_dict().items()}
    fuse(unet)
    places = {name: memory(layer) for name, layer in layers(unet)}
    with torch.inference_mode():
        unet(*inputs(unet, torch.float32))
    kept = {name for name, place in places.items() if not place.expired()}
    assert kept == {name for name in places if "upsamplers" in name}
    found = unet.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    found.clear()
    next(unet.parameters())
    with torch.inference_mode():
        unet(*inputs(unet, torch.float32))
    assert {name for name, layer in layers(unet) if not is_free(layer)} == kept


@pytest.mark.usefixtures("all_are_large")
def test_reading_one_weight_after_the_other_frees_them() -> None:
    unet = tiny.model("sd15").unet
    fuse(unet)
    with torch.inference_mode():
        unet(*inputs(unet, torch.float32))
    free = [layer for _, layer in layers(unet) if is_free(layer)]
    for layer in free:
        layer.weight.sum()
    assert sum(not is_free(layer) for layer in free) == 1


@pytest.mark.usefixtures("all_are_large")
def test_threads_share_a_network() -> None:
    unet = tiny.model("sd15").unet
    given, wanted = inputs(unet, torch.float32), {name: value.clone() for name, value in unet.state_dict().items()}
    fuse(unet)
    with torch.inference_mode():
        exact = unet(*given)
    wrong: list[str] = []

    def use() -> None:
        with torch.inference_mode():
            wrong.extend("output" for _ in range(6) if not torch.equal(unet(*given), exact))

    def read() -> None:
        for _ in range(6):
            wrong.extend(name for name, value in unet.state_dict().items() if not torch.equal(value, wanted[name]))

    threads = [threading.Thread(target=target) for target in (use, read, use, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("all_are_large")
def test_a_pipeline_of_mapped_weights(tmp_path: Path) -> None:
    """The file's pages stay the weights: nothing is freed, and what others change counts."""
    tiny.model("sd15").save_pretrained(tmp_path / "model")
    pipeline = Pipeline(tmp_path / "model", device="cpu", dtype=torch.float32)
    again = tiny.model("sd15")
    pipeline("a fox", steps=2, seed=3)
    assert tiny.same_weights(pipeline.model, again)
    assert not any(is_free(layer) for _, layer in layers(pipeline.model.unet))
    pipeline.model.save_pretrained(tmp_path / "again")
    assert tiny.same_weights(type(again).from_pretrained(tmp_path / "again"), again)


def test_pages_of_a_file(tmp_path: Path) -> None:
    """Pages that are as in the file leave memory, and are read again; changed ones and other memory stay."""
    file = tmp_path / "numbers"
    file.write_bytes(torch.arange(2**16, dtype=torch.int32).numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=2**16, dtype=torch.int32)
    wanted = torch.arange(2**16, dtype=torch.int32)
    assert torch.equal(mapped, wanted)
    dropped = drop_pages(mapped)
    assert torch.equal(mapped, wanted)
    mapped[12345] = wanted[12345] = -1
    assert not drop_pages(mapped) and torch.equal(mapped, wanted)
    assert not drop_pages(wanted) and not drop_pages(mapped[:5]) and int(wanted[12345]) == -1
    if not dropped:
        pytest.skip("this system does not tell of pages")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_forks_while_a_thread_reorders() -> None:
    """Its child waits for nobody: it reads a weight, and takes the lock of recordings, which a thread held."""
    layer = FusedConv2d(64, 64, 3, padding=1)
    used(layer)
    assert is_free(layer)
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with graphs.LOCK, reordered._LOCK:
            held.set()
            forked.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    if (process := os.fork()) == 0:
        signal.alarm(10)
        torch.set_num_threads(1)
        os._exit(0 if graphs.LOCK.acquire(timeout=5) and layer.weight.shape == (64, 64, 3, 3) else 1)
    forked.set()
    thread.join()
    assert os.waitpid(process, 0)[1] == 0
