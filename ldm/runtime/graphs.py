"""A U-Net's step is recorded once and then replayed, without the time that it takes to start its kernels: as a CUDA
graph on a GPU, as calls of kernels on a CPU (`calls.py`).

A graph reads and writes the same places in memory every time: the inputs and the outputs precomputed from text and time
are copied there, and the result is copied out. One recording thus serves all prompts, and weights changed in place.

B batch, C channels, H×W height and width of the latents
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ldm.errors import first_line, out_of_memory
from ldm.models.attention import attention_layers
from ldm.models.surgery import held_parameters, twin
from ldm.models.unet import Conditioning, UNet
from ldm.runtime.calls import CallRecorder
from ldm.runtime.fused import hooked
from ldm.runtime.precomputing import (
    PrecomputedOutput,
    RunInput,
    TimestepOutput,
    precomputed_outputs,
    reads_conditioning,
)

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
Step = Callable[[], Tensor]
LOCK = threading.Lock()  # a process can record one graph at a time, and graphs share memory
MOST = 8  # recordings kept of one U-Net
NUMBERS = 2**18  # of the first map of all images, up to which the CPU gains: a recording keeps all tensors of a step


def _renew_lock() -> None:
    """Let a forked process record and replay, though another thread may have held the lock that it copied."""
    global LOCK
    LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def record_steps(unet: UNet) -> None:
    """Make a U-Net record its steps, where no gradients are wanted and its conditioning is `precomputed`."""
    device = next(unet.parameters()).device
    if device.type == "cuda":
        recordings = Recordings(unet, CudaRecorder(device))
    else:
        recordings = Recordings(unet, CallRecorder(), NUMBERS // unet.config.channels[0])
    unet.recordings = recordings  # type: ignore[assignment]
    unet.__class__ = RecordedUNet


def record_anew(unet: M) -> M:
    """Let a copy of a U-Net with other layers record steps of its own, if the U-Net records; returns the copy."""
    if isinstance(unet, RecordedUNet):
        before = unet.recordings
        unet.recordings = Recordings(unet, before.record, before.pixels)
        unet.recordings.admit_those_of(before)
    return unet


def admit(unet: UNet, other: UNet) -> None:
    """Let a U-Net, if it records, also record copies that run the layers of `other`, such as one with ControlNets."""
    if isinstance(unet, RecordedUNet):
        unet.recordings.admit_those_of(Recordings(other, unet.recordings.record))


def unrecorded(unet: UNet) -> UNet:
    """The same U-Net, whose steps are no longer recorded."""
    if isinstance(unet, RecordedUNet):
        unet.records = False
    return unet


class CudaRecorder:
    """Records steps as CUDA graphs in one pool of memory, since they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, step: Step) -> Step:
        """Run a step, record it, and return a function that replays it; its result is always the same tensor."""
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # the first calls compile kernels and choose algorithms, which must not be recorded
                    step()
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            recording = torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            )  # other threads may use the GPU meanwhile
            try:
                with recording:
                    out = step()
            finally:
                torch.cuda.set_stream(here)  # PyTorch does not restore it after an error

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class RecordedUNet(UNet):
    """A U-Net that replays recordings of its steps; a step that cannot be recorded runs as it is."""

    recordings: Recordings
    records = True  # whether its steps are recorded; False for copies that few steps are made of

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if torch.is_grad_enabled() or not self.records:
            return super().forward(x, t, cond)
        with LOCK:
            found = self.recordings.replayed(self, x, t, cond)
        return super().forward(x, t, cond) if found is None else found

    def step(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The plain forward pass."""
        return super().forward(x, t, cond)


@dataclass(frozen=True, eq=False)
class GraphInputs:
    """The precomputed outputs that a copy of a U-Net reads at each step, and the key of recordings that fit it."""

    key: tuple[Any, ...]  # places of the weights, shapes of the outputs
    conditioning: list[PrecomputedOutput]
    timestep: list[TimestepOutput]

    @classmethod
    def of(cls, unet: UNet) -> GraphInputs:
        """The inputs of a `precomputed` U-Net."""
        outputs = precomputed_outputs(unet)
        key = (*map(_place, held_parameters(unet)), *(layer.output.shape for layer in outputs))
        timestep = [layer for layer in outputs if isinstance(layer, TimestepOutput)]
        return cls(key, [layer for layer in outputs if not isinstance(layer, TimestepOutput)], timestep)


class Recording:
    """A recorded step for inputs of one shape."""

    def __init__(self, unet: RecordedUNet, x: Tensor, t: Tensor, cond: Conditioning, record: Callable[[Step], Step]):
        self.unet = twin(unet)  # with precomputed outputs of its own, which the graph reads
        del self.unet.recordings  # they will hold this recording
        self.x, self.t, self.places = x.clone(), t.clone(), GraphInputs.of(self.unet)
        for layer in self.places.timestep:
            layer.output = layer.output.clone()  # one row alone, not a view of the whole table
        self.filled_from: ref[GraphInputs] | None = None  # the inputs whose outputs were copied last
        self.replay = record(lambda: self.unet.step(self.x, self.t, cond))

    def __call__(self, inputs: GraphInputs, x: Tensor, t: Tensor) -> Tensor:
        if self.filled_from is None or self.filled_from() is not inputs:
            self.filled_from = None  # until all are copied
            _copy(self.places.conditioning, inputs.conditioning)
            self.filled_from = ref(inputs)
        _copy(self.places.timestep, inputs.timestep)
        self.x.copy_(x)
        self.t.copy_(t)
        return self.replay().clone()


class Recordings:
    """The recordings of one U-Net, shared by its copies that are `precomputed` for one conditioning or another."""

    def __init__(self, unet: UNet, record: Callable[[Step], Step], pixels: float = math.inf) -> None:
        """`pixels` of the latents of all images, at most, are recorded."""
        self.record, self.pixels = record, pixels
        self.works = True  # False once a recording has failed
        leaves = (module for module in unet.modules() if not any(module.children()))
        self.own = {id(module) for module in leaves if not isinstance(module, RunInput)}  # which are replaced
        self.kinds = {RecordedUNet, PrecomputedOutput, TimestepOutput, *(type(module) for module in unet.modules())}
        self.kernels = {layer.kernel for layer in attention_layers(unet)}
        self.inputs: WeakKeyDictionary[nn.Module, GraphInputs | None] = WeakKeyDictionary()  # None: not recordable
        self.found: OrderedDict[Any, Recording] = OrderedDict()

    def admit_those_of(self, other: Recordings) -> None:
        """Record copies that run the other U-Net's layers, too; these must not change from step to step."""
        self.own |= other.own
        self.kinds |= other.kinds
        self.kernels |= other.kernels

    def __deepcopy__(self, memo: Any) -> Recordings:
        return self

    def replayed(self, unet: RecordedUNet, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor | None:
        """The result of the recording for inputs of this shape, which is recorded first if there is none.

        Of more than `MOST` recordings, the least recently used one is dropped. The result is None for a copy of the
        U-Net that runs other layers, or not the same ones at every step, or still reads the conditioning itself, and
        for larger latents than are recorded.
        """
        if x[:, 0].numel() > self.pixels:
            return None
        if unet not in self.inputs:
            self.inputs[unet] = GraphInputs.of(unet) if self.works and self._recordable(unet) else None
        inputs = self.inputs[unet]
        if inputs is None:
            return None
        # tensors made in inference mode cannot be written outside of it
        modes = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled(x.device.type), torch.get_num_threads())
        key = (inputs.key, x.shape, x.dtype, t.shape, t.dtype, modes)
        if key not in self.found:
            try:
                self.found[key] = Recording(unet, x, t, cond, self.record)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                log.warning("steps are not recorded: %s", first_line(error))
                self.inputs, self.works = WeakKeyDictionary(), False
                return None
        self.found.move_to_end(key)
        while len(self.found) > MOST:
            self.found.popitem(last=False)
        return self.found[key](inputs, x, t)

    def _recordable(self, unet: RecordedUNet) -> bool:
        """Whether a copy runs the U-Net's own layers at every step, but for precomputed outputs, and has no hooks."""
        modules = list(unet.modules())
        leaves = [layer for layer in modules if not any(layer.children()) and not isinstance(layer, PrecomputedOutput)]
        return (
            not reads_conditioning(unet)
            and not any(hooked(module) for module in modules)
            and all(type(module) in self.kinds for module in modules)
            and all(id(module) in self.own for module in leaves)
            and self.kernels.issuperset(layer.kernel for layer in attention_layers(unet))
        )


def _copy(places: Iterable[PrecomputedOutput], layers: Iterable[PrecomputedOutput]) -> None:
    """Copy the outputs of layers to the places of others."""
    pairs = list(zip(places, layers, strict=True))
    if pairs:
        torch._foreach_copy_([place.output for place, _ in pairs], [layer.output for _, layer in pairs])


def _place(weight: Any) -> int:
    """A number that changes when a weight moves in memory.

    A quantised one consists of several tensors; a `Reordered` one may not be in memory itself, and is not made anew.
    """
    return weight.data_ptr() if type(weight) is nn.Parameter else id(weight)
