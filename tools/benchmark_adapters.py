"""Measure adapters beside diffusers, on random weights of real shapes.

    python tools/benchmark_adapters.py lora /tmp/adapters --rounds 3 --out adapters.json
    python tools/benchmark_adapters.py control --family sd15 --rounds 5
    python tools/benchmark_adapters.py control --family sdxl --rounds 5

`lora`: the time to open a LoRA of rank 32 over all of SDXL's attention and to merge it into the U-Net in bf16, beside
reading the U-Net once more and beside diffusers' `load_lora_weights` and `fuse_lora`; and a step of the U-Net with two
merged LoRAs beside a plain step. The folder receives the U-Net's weights (SDXL: 5.1 GB) and stays.

`control`: a guided step of a U-Net with a ControlNet (two images in a batch: the negative prompt's and the prompt's),
with fused layers and what a run precomputes, beside diffusers' U-Net and ControlNet on the same weights; and a step
without the ControlNet. Both sides share the memory of the weights (SDXL: 7.6 GB in bf16), as far as layouts allow.

Sides take turns. Seconds are those of the clock and, in brackets, of all processors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.families import FAMILIES
from ldm.files import check_digest
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import Conditioning, UNet, UNetConfig
from ldm.patches.controlnet import NamedControlNet
from ldm.patches.low_rank import Change
from ldm.patches.patching import patched
from ldm.runtime import fused_cpu
from ldm.runtime.attention import best_attention, set_attention
from ldm.runtime.merging import merged
from ldm.sampling.guidance import plain
from ldm.sampling.loop import Time
from ldm.weights.adapters import Adapter, open_adapter
from ldm.weights.adapters.names import written
from ldm.weights.components import Components
from ldm.weights.configs import write_unet
from ldm.weights.tensors import Output, Store, TensorInfo, write_safetensors

BF16 = torch.bfloat16
RANK = 32
WEIGHTS = "diffusion_pytorch_model.safetensors"
Seconds = tuple[float, float]  # of the clock, of all processors


def timed(work: Callable[[], Any]) -> Seconds:
    clock, processors = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processors


# --- files ------------------------------------------------------------------------------------------------------------


def write_base(folder: Path, family: str) -> Path:
    """A U-Net's folder with random weights in bf16, unless it is there."""
    place = folder / family / "unet"
    if not (place / WEIGHTS).exists():
        place.mkdir(parents=True, exist_ok=True)
        noise = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 30).to(BF16)
        outputs = [
            Output(name, TensorInfo(BF16, tuple(p.shape)), partial(tiled, noise, p.shape))
            for name, p in empty(family).named_parameters()
        ]
        (place / "config.json").write_text(json.dumps(write_unet(FAMILIES[family].unet)))
        write_safetensors(place / WEIGHTS, outputs, {})
    return place


def tiled(noise: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape full of repeated noise."""
    return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)


def empty(family: str) -> UNet:
    with torch.device("meta"):
        return UNet(FAMILIES[family].unet)


def base_of(place: Path, family: str) -> Components:
    """The U-Net, mapped from its file."""
    unet, store = empty(family), Store([place / WEIGHTS])
    unet.load_state_dict(dict(store.read(store.infos, None, "cpu")), assign=True)
    return Components(FAMILIES[family], {"unet": unet.eval().requires_grad_(False)})


def write_lora(model: Components, file: Path, naming: str) -> Path:
    """A LoRA in fp16 over all attention layers, with noise in it."""
    tensors: dict[str, Tensor] = {}
    for place, name in written(model, naming).items():
        if ".attn" in place.layer:
            rows, columns = model.unet.get_parameter(f"{place.layer}.weight").shape
            tensors[f"{name}.lora_down.weight"] = (torch.randn(RANK, columns) / 30).half()
            tensors[f"{name}.lora_up.weight"] = (torch.randn(rows, RANK) / 30).half()
            tensors[f"{name}.alpha"] = torch.tensor(16.0)
    save_file(tensors, file)
    return file


# --- sides ------------------------------------------------------------------------------------------------------------


def merged_with(model: Components, *adapters: Adapter) -> UNet:
    changes: dict[str, list[tuple[float, Change]]] = {}
    for one in adapters:
        for name, change in one.changes["unet"].items():
            changes.setdefault(name, []).append((0.8, change))
    return merged(model.unet, changes)


def copied(place: Path) -> None:
    """Read a base's weights from the file into memory."""
    store = Store([place / WEIGHTS])
    for _, tensor in store.read(store.infos, None, "cpu"):
        tensor.clone()


def checked(place: Path) -> None:
    """Read them as a model is loaded: with the file's digest."""
    check_digest(place / WEIGHTS)
    copied(place)


def by_diffusers(unet: Any, file: Path) -> None:
    import diffusers

    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.EulerDiscreteScheduler()
    pipeline = diffusers.StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **parts)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=0.8)
    pipeline.unload_lora_weights()


def diffusers_unet(place: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(place, torch_dtype=BF16)


# --- commands ---------------------------------------------------------------------------------------------------------


def lora(options: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Opening and merging a LoRA, and steps with two."""
    place = write_base(options.folder, options.family)
    model = base_of(place, options.family)
    naming = "kohya-sgm" if model.family.xl else "kohya"
    files = [write_lora(model, options.folder / f"lora-{n}.safetensors", naming) for n in (1, 2)]
    found: dict[str, list[Seconds]] = {}

    def side(name: str, work: Callable[[], Any]) -> None:
        found.setdefault(name, []).append(timed(work))
        print(f"{name:>34}  {found[name][-1][0]:7.2f} s  [{found[name][-1][1]:7.2f} s]", flush=True)

    for _ in range(options.rounds):
        side("base read", lambda: copied(place))
        side("base read and checked", lambda: checked(place))
        side("opened and merged", lambda: merged_with(model, open_adapter(files[0], model)))
        if not options.alone and model.family.xl:
            theirs = diffusers_unet(place)
            side("loaded and fused by diffusers", lambda unet=theirs: by_diffusers(unet, files[0]))
            del theirs
    step(model, [open_adapter(file, model) for file in files], options, side)
    return found


@torch.inference_mode()
def step(model: Components, adapters: list[Adapter], options: argparse.Namespace, side: Callable[..., None]) -> None:
    """Steps at a small size, plain and with the adapters, in turn."""
    c, both = model.unet.config, merged_with(model, *adapters)
    x, t = torch.randn(1, c.in_channels, options.side, options.side).to(BF16), torch.tensor(500)
    pooled = torch.randn(1, c.pooled_dim).to(BF16) if c.pooled_dim else None
    size = torch.zeros(1, c.size_ids) if c.size_ids else None
    cond = Conditioning(torch.randn(1, 77, c.text_dim).to(BF16), pooled, size)
    for unet in (model.unet, both):
        unet(x, t, cond)
    for _ in range(2 * options.rounds):
        side("plain step", lambda: model.unet(x, t, cond))
        side("step with two LoRAs", lambda: both(x, t, cond))


@torch.inference_mode()
def control(options: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Guided steps with a ControlNet, here and in diffusers, on the same random weights."""
    import diffusers

    family, dtype = FAMILIES[options.family], getattr(torch, options.dtype)
    torch.set_default_dtype(dtype)
    own = {field: getattr(family.unet, field) for field in UNetConfig.__dataclass_fields__}
    unet, network = UNet(family.unet).eval(), ControlNet(ControlNetConfig(**own)).eval()
    json_of = {name: value for name, value in write_unet(family.unet).items() if not name.startswith("_")}
    half = {name: json_of[name] for name in json_of if name not in ("up_block_types", "out_channels", "sample_size")}
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**json_of).eval(), diffusers.ControlNetModel(**half).eval()
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)  # as after training
    for ours, other in zip((unet, network), theirs, strict=True):
        other.load_state_dict(ours.state_dict(), assign=True)
        fused_cpu.fuse(ours)
        set_attention(ours, best_attention(torch.device("cpu"), dtype), torch.device("cpu"))
    torch.set_default_dtype(torch.float32)
    side, c = options.side, family.unet
    x, image = torch.randn(2, c.in_channels, side, side).to(dtype), torch.rand(2, 3, 8 * side, 8 * side).to(dtype)
    pooled = torch.randn(2, c.pooled_dim).to(dtype) if c.pooled_dim else None
    size = torch.zeros(2, c.size_ids) if c.size_ids else None
    more = {
        "net.image": network.embed_image(image),
        "net.scales": torch.ones(2, len(network.config.skips) + 1, dtype=dtype),
    }
    cond = Conditioning(torch.randn(2, 77, c.text_dim).to(dtype), pooled, size, more)
    time_of = Time(500.0, torch.tensor(500.0))
    with_net = plain(patched(unet, {"controlnets": (NamedControlNet(network, "net"),)}), cond, [500.0])
    without = plain(unet, cond, [500.0])

    def in_diffusers() -> Tensor:
        added = {"text_embeds": pooled, "time_ids": size} if c.pooled_dim else None
        common = {"encoder_hidden_states": cond.text, "added_cond_kwargs": added, "return_dict": False}
        down, middle = theirs[1](x, time_of.tensor, controlnet_cond=image, **common)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return theirs[0](x, time_of.tensor, **common, **residuals)[0]

    sides: dict[str, Callable[[], Tensor]] = {
        "step": lambda: without(x, time_of),
        "step with a ControlNet": lambda: with_net(x, time_of),
        "the same in diffusers": in_diffusers,
    }
    made = [work().float() for work in sides.values()]
    print(f"largest difference {(made[1] - made[2]).abs().max():.1e} of {made[2].abs().max():.1e}")
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, work in sides.items():
            found[name].append(timed(work))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("lora", help="a LoRA opened and merged, and steps with two")
    command.set_defaults(run=lora)
    command.add_argument("folder", type=Path, help="for the weights")
    command.add_argument("--family", default="sdxl", choices=list(FAMILIES))
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--side", type=int, default=32, help="of the latents in a step")
    command.add_argument("--alone", action="store_true", help="without diffusers")
    command.add_argument("--out", type=Path, help="a JSON file for all figures")
    command = commands.add_parser("control", help="guided steps with a ControlNet")
    command.set_defaults(run=control)
    command.add_argument("--family", default="sd15", choices=list(FAMILIES))
    command.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--side", type=int, default=32, help="of the latents in a step")
    command.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    found = options.run(options)
    print()
    for name, seconds in found.items():
        clock, processors = (median(each) for each in zip(*seconds, strict=True))
        print(f"{name:>34}  {clock:7.2f} s  [{processors:7.2f} s]")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
