"""What a run will need, before it begins: parameters, memory, arithmetic.

Networks are built on the meta device, where nothing has memory, and run once: the arithmetic and what the backward pass
keeps are counted, not guessed. Memory is predicted all the same: allocators and libraries take more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.families import Family
from ldm.models.attention import attention_layers, math
from ldm.models.discriminator import Discriminator, DiscriminatorConfig
from ldm.models.unet import Conditioning
from ldm.training.config import Config, StageName, StageSection
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.phases import Phase, phases
from ldm.training.stages.text import contrastive_pair
from ldm.training.start import starting_family
from ldm.weights.components import Components, build

STATE = {"adamw": 8, "adamw-8bit": 2, "adafactor": 0, "prodigy": 16}  # bytes of the optimiser for each parameter
PEAK = {  # dense bf16 TFLOP/s of devices, as their makers state them
    "H200": 989, "H100": 989, "A100": 312, "L40": 181, "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What one stage will need at one resolution. Memory is that of one device, in bytes."""

    stage: str
    size: int  # pixels
    steps: int
    batch: int
    micro_batch: int
    trained: int  # parameters
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    flops_per_image: int  # forward and backward, frozen networks included
    flops_per_step: int

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations


def forecast(config: Config, processes: int = 1) -> list[Forecast]:
    """What each stage of a configuration will need, at each of its resolutions.

    Raises:
        LdmError: the configuration does not describe a model, or a batch does not divide.
    """
    found = []
    for name in config.stages:
        section: StageSection = getattr(config, name)
        model = config.refiner.model if name == "refiner" else config.model
        with torch.device("meta"):
            parts = build(starting_family(model, "refiner.model" if name == "refiner" else "model"))
        for phase in phases(section):
            micro = phase.batch // (phase.parts(processes) * processes)
            found.append(_forecast(config, name, section, parts, phase, micro))
    return found


def _forecast(
    config: Config, name: StageName, section: StageSection, parts: Components, phase: Phase, micro: int
) -> Forecast:
    trained, frozen, learning, fixed = _work(config, name, parts, phase.size)
    count, still = (sum(p.numel() for module in group for p in module.parameters()) for group in (trained, frozen))
    if section.checkpointing:
        for module in trained:
            checkpointed(module)
    kept, forward = _count(learning)
    flops = (4 if section.checkpointing else 3) * forward + sum(_count(run)[1] for run in fixed)
    averages = bool(section.ema.decay) + len(section.ema.widths)
    kept *= micro
    if config.precision != "no":  # half of it, and a copy of the weights in 16 bits
        kept = kept // 2 + 2 * count
    return Forecast(
        stage=name, size=phase.size, steps=phase.end - phase.first, batch=phase.batch, micro_batch=micro,
        trained=count, frozen=still, weights=4 * (count + still), gradients=4 * count,
        optimizer=STATE[section.optimizer.name] * count, averages=4 * count * averages,
        activations=kept, flops_per_image=flops,
        flops_per_step=flops * phase.batch,
    )  # fmt: skip


Pass = Callable[[], Tensor]  # one forward pass of one image


def _work(
    config: Config, name: StageName, parts: Components, size: int
) -> tuple[list[nn.Module], list[nn.Module], Pass, list[Pass]]:
    """Networks that are trained and that are not, the pass that is learned from, and those that only run."""
    family = parts.family
    side = size // family.autoencoder.factor
    image = torch.empty(1, 3, size, size, device="meta")
    texts = [torch.zeros(1, tower.context, dtype=torch.long, device="meta") for tower in family.text]

    def read() -> Conditioning:
        return parts.text_encoders.encode(texts)

    def encode() -> Tensor:
        return parts.autoencoder.encode(image).mode()

    if name == "autoencoder":
        trained: list[nn.Module] = [parts.autoencoder]
        if config.autoencoder.adversarial_weight:
            with torch.device("meta"):
                trained.append(Discriminator(DiscriminatorConfig()))

        def reconstruct() -> Tensor:
            made = parts.autoencoder(image)[0]
            return sum((judge(made).mean() for judge in trained[1:]), made.mean())

        return trained, [], reconstruct, []
    if name == "text":
        with torch.device("meta"):
            pair = contrastive_pair(config.text, parts.text_encoders)
        rest: list[nn.Module] = [parts.unet, parts.autoencoder]
        if config.text.image_only:
            images, heads = pair.image_encoder, pair.heads
            read_texts = partial(pair.embed_texts, texts)
            return [images, heads], [*rest, parts.text_encoders], partial(pair.embed_images, image), [read_texts]
        return [pair], rest, lambda: torch.stack([part.mean() for part in pair(image, texts)[:2]]).sum(), []
    latents, time, cond = blank(family, side, side)
    section = config.refiner if name == "refiner" else config.base
    if section.attention == "math":  # which alone keeps its scores
        for layer in attention_layers(parts.unet):
            layer.kernel = math
    fixed: list[Pass] = [] if config.data.cache else [encode]
    if section.train_text:
        return (
            [parts.unet, parts.text_encoders],
            [parts.autoencoder],
            lambda: parts.unet(latents, time, replace(cond, text=read().text)),
            fixed,
        )
    if not config.data.cache:
        fixed.append(lambda: read().text)
    return [parts.unet], [parts.autoencoder, parts.text_encoders], lambda: parts.unet(latents, time, cond), fixed


def blank(family: Family, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
    """What a family's U-Net is given for one image, of these many latents, without memory: to count with."""
    unet = family.unet
    with torch.device("meta"):
        cond = Conditioning(
            torch.empty(1, family.text[0].context, unet.text_dim),
            torch.empty(1, unet.pooled_dim) if family.xl else None,
            torch.empty(1, unet.size_ids) if family.xl else None,
        )
        return torch.empty(1, unet.in_channels, height, width), torch.zeros(1, dtype=torch.long), cond


class _Fused(TorchFunctionMode):
    """Attention as devices do it, whose kernels keep no scores: on the meta device, PyTorch would keep them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = _attention if func is F.scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` by the kernel that every GPU has."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=options.get("scale"))[0]


def _count(run: Pass) -> tuple[int, int]:
    """Bytes, in fp32, that the backward pass of a forward pass needs besides weights; and its FLOPs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        weight = tensor if tensor._base is None else tensor._base  # of which a product keeps a view
        if not isinstance(weight, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks, _Fused():
        run()
    return sum(kept.values()), counter.get_total_flops()


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """What a GPU can do at the most in 16 bits, or nothing where that is not known."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(value) for label, value in PEAK.items() if label in name), None)
