"""A U-Net whose step is recorded once as a CUDA graph and then replayed: no time goes into starting its kernels.

A graph reads and writes the same places in memory every time: inputs are copied there, as is what is known of text and
time, and the result is copied out. So one recording serves all prompts, and weights that change in their place.

B batch, C channels, H×W height and width of the latents
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ldm.errors import first_line, out_of_memory
from ldm.models.attention import attention_layers
from ldm.models.layers import TransformerBlock
from ldm.models.surgery import twin
from ldm.models.unet import Conditioning, NoEmbedding, UNet
from ldm.runtime.fused import hooked
from ldm.runtime.precomputing import Given, GivenTime, known

log = logging.getLogger(__name__)
Step = Callable[[], Tensor]
LOCK = threading.Lock()  # a process can record one graph at a time, and graphs share memory
MOST = 8  # recordings of a U-Net


def record_steps(unet: UNet) -> None:
    """Make a U-Net on a GPU record its steps, where nobody wants gradients and the text is known (`prepared`)."""
    recorder = CudaRecorder(next(unet.parameters()).device)
    unet.recordings = Recordings(unet, recorder)  # type: ignore[assignment]
    unet.__class__ = RecordedUNet


class CudaRecorder:
    """Records steps in memory that they share, since they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, step: Step) -> Step:
        """Run a step a few times, record it, and return what replays it: always the same tensor, filled anew."""
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # what is compiled or chosen at the first calls must not be recorded
                    step()
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            recording = torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            )  # other threads may go on
            try:
                with recording:
                    out = step()
            finally:
                torch.cuda.set_stream(here)  # where PyTorch does not go back after an error

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class RecordedUNet(UNet):
    """See `record_steps`."""

    recordings: Recordings

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, t, cond)
        with LOCK:
            found = self.recordings.replayed(self, x, t, cond)
        return super().forward(x, t, cond) if found is None else found

    def step(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The plain forward pass."""
        return super().forward(x, t, cond)


@dataclass(frozen=True, eq=False)
class Served:
    """A copy of a U-Net that runs the same layers at every step."""

    key: tuple[Any, ...]  # what tells its graphs from others
    text: list[Given]  # what it knows but for the time, and pooled text
    time: list[GivenTime]

    @classmethod
    def of(cls, unet: UNet) -> Served:
        """One that does."""
        given = known(unet)
        key = (*(_place(parameter) for parameter in unet.parameters()), *(layer.result.shape for layer in given))
        time = [layer for layer in given if isinstance(layer, GivenTime)]
        return cls(key, [layer for layer in given if not isinstance(layer, GivenTime)], time)


class Recording:
    """A step for inputs of one shape."""

    def __init__(self, unet: RecordedUNet, x: Tensor, t: Tensor, cond: Conditioning, record: Callable[[Step], Step]):
        self.unet = twin(unet)  # which has its own places for what is known of the text
        del self.unet.recordings  # among which this will be
        self.x, self.t, self.places = x.clone(), t.clone(), Served.of(self.unet)
        for layer in self.places.time:
            layer.result = layer.result.clone()  # of one timestep, where it was a part of many
        self.holds: ref[Served] | None = None  # whose text lies there
        self.replay = record(lambda: self.unet.step(self.x, self.t, cond))

    def __call__(self, served: Served, x: Tensor, t: Tensor) -> Tensor:
        if self.holds is None or self.holds() is not served:
            _copy(self.places.text, served.text)
            self.holds = ref(served)
        _copy(self.places.time, served.time)
        self.x.copy_(x)
        self.t.copy_(t)
        return self.replay().clone()


class Recordings:
    """Those of one U-Net."""

    def __init__(self, unet: UNet, record: Callable[[Step], Step]) -> None:
        self.record = record
        self.works = True  # until something cannot be recorded
        self.own = {id(module) for module in unet.modules() if not any(module.children())}
        self.kinds = {RecordedUNet, Given, GivenTime, *(type(module) for module in unet.modules())}
        self.kernels = {layer.kernel for layer in attention_layers(unet)}
        self.served: WeakKeyDictionary[nn.Module, Served | None] = WeakKeyDictionary()
        self.found: OrderedDict[Any, Recording] = OrderedDict()

    def __deepcopy__(self, memo: Any) -> Recordings:
        return self

    def replayed(self, unet: RecordedUNet, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor | None:
        """What the recording for inputs of that shape gives; the least recently used one goes where there are too many.

        None for a copy of the U-Net that does not run the same layers at every step, or reads the text itself.
        """
        if unet not in self.served:
            self.served[unet] = Served.of(unet) if self.works and self._steady(unet) else None
        served = self.served[unet]
        if served is None:
            return None
        # tensors of inference mode cannot be written outside of it
        key = (served.key, x.shape, x.dtype, t.shape, t.dtype, torch.is_inference_mode_enabled())
        if key not in self.found:
            try:
                self.found[key] = Recording(unet, x, t, cond, self.record)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                log.warning("steps are not recorded: %s", first_line(error))
                self.served, self.works = WeakKeyDictionary(), False
                return None
        self.found.move_to_end(key)
        while len(self.found) > MOST:
            self.found.popitem(last=False)
        return self.found[key](served, x, t)

    def _steady(self, unet: RecordedUNet) -> bool:
        """Whether its layers are those of the U-Net, and `Given`, and nobody looks at what they do."""
        blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
        given = [unet.add_embedding, *(layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v))]
        leaves = [module for module in unet.modules() if not any(module.children()) and not isinstance(module, Given)]
        return (
            all(isinstance(layer, (Given, NoEmbedding)) for layer in given)
            and not any(hooked(module) for module in unet.modules())
            and all(type(module) in self.kinds for module in unet.modules())
            and all(id(module) in self.own for module in leaves)
            and self.kernels.issuperset(layer.kernel for layer in attention_layers(unet))
        )


def _copy(places: Iterable[Given], layers: Iterable[Given]) -> None:
    """Copy what is given in layers to the places of others."""
    pairs = list(zip(places, layers, strict=True))
    if pairs:
        torch._foreach_copy_([place.result for place, _ in pairs], [layer.result for _, layer in pairs])


def _place(weight: nn.Parameter) -> int:
    """What changes when a weight lies elsewhere; those of 8 bits have several places."""
    return weight.data_ptr() if type(weight) is nn.Parameter else id(weight)
