"""Measure a LoRA's training step beside diffusers' example scripts on the same shapes, with random weights.

    python tools/benchmark_train_adapter.py --family sd15 --size 512 --batch 1 --steps 3 --rounds 3
    python tools/benchmark_train_adapter.py --family sdxl --size 512 --precision bf16 --checkpointing --out lora.json

Three sides, each in its own process, take turns; figures are medians over all steps but each process's first, and the
peak memory of the steps (a GPU's allocated, or the process's resident memory):

ours            latents and captions come from the cache, as `data.cache` keeps them
diffusers       the step of `train_text_to_image_lora.py` and `train_text_to_image_lora_sdxl.py`, which encode images
                and captions in every step
diffusers, U-Net alone    the same without the encoders, on latents and encoded captions that are there

All have LoRA of the same rank in all attention, AdamW, clipping, and the same precision. As in the scripts, the frozen
U-Net and text encoders are held in it, and SDXL's autoencoder in fp32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from taking_turns import DEVICE, in_turn, parse, timed, write_found
from torch import nn

from ldm.bench.measuring import peak, reset_peak
from ldm.data.keyed import generator
from ldm.data.loader import Batch
from ldm.families import FAMILIES, Family
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning, UNet
from ldm.training.frozen import numbers
from ldm.training.loop import Training
from ldm.training.run import fit_to_device, own
from ldm.training.stages.adapter import AdapterStage
from ldm.training.stages.sections import AdapterSection
from ldm.training.stages.stage import StageInputs
from ldm.weights.configs import write_autoencoder, write_text, write_unet

SIDES = ("ours", "diffusers", "diffusers, U-Net alone")
END_ID = 49407  # of CLIP's tokenizer
TINY = {"channels": (32, 64), "mid_depth": 1, "heads": (2, 4), "depth": (1, 1), "layers": 1, "groups": 8}


def family_of(options: argparse.Namespace) -> Family:
    """The family, small with `--tiny`."""
    family = FAMILIES[options.family]
    if not options.tiny:
        return family
    autoencoder = replace(family.autoencoder, channels=(8, 8, 8, 8), groups=8)
    return replace(family, unet=replace(family.unet, **TINY), autoencoder=autoencoder)


def random(make: Callable[[], Any], precision: str, device: torch.device) -> Any:
    """A network with random weights from a fixed seed, in the dtype of a precision."""
    torch.manual_seed(0)
    torch.set_default_dtype(numbers(precision))
    with device:
        network = make()
    torch.set_default_dtype(torch.float32)
    return network.requires_grad_(False)


def conditioning(family: Family, batch: int, device: torch.device) -> Conditioning:
    """Random encoded captions and time ids."""
    text = torch.randn(batch, 77, family.unet.text_dim, generator=torch.Generator().manual_seed(1)).to(device)
    if not family.xl:
        return Conditioning(text)
    return Conditioning(text, text[:, 0, : family.unet.pooled_dim].contiguous(), time_ids(batch, device))


def time_ids(batch: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * batch, device=device)


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(options: argparse.Namespace) -> Callable[[int], None]:
    """Our step: keyed noise, loss, backward pass, checks, clipping, update."""
    family, accelerator = family_of(options), Accelerator(mixed_precision=options.precision)
    device = accelerator.device
    unet = random(lambda: UNet(family.unet), options.precision, device)
    own(unet, device, numbers(options.precision))
    model = LatentDiffusion(family, {"unet": unet, "autoencoder": nn.Linear(1, 1), "text_encoders": nn.Linear(1, 1)})
    model.autoencoder.config = family.autoencoder  # type: ignore[assignment]
    section = AdapterSection(
        steps=10**6, batch=options.batch, rank=options.rank, log_every=10**6, checkpointing=options.checkpointing,
        compile=options.compile, quantize="int8-weights" if options.int8 else None,
    )  # fmt: skip
    cond = conditioning(family, options.batch, device)
    given: Any = StageInputs(
        "adapter", section, model, accelerator, 0, Path(options.folder) / "run" / "adapter", None, [], lambda: (),
        lambda _: cond, None,
    )  # type: ignore[arg-type]  # fmt: skip
    stage = AdapterStage(given)
    fit_to_device(stage, accelerator)
    training = Training(accelerator, stage, Path(options.folder), lambda _: iter(()), lambda: (), lambda *_: None)
    side = options.size // family.autoencoder.factor
    shape = (options.batch, 2 * family.autoencoder.latent_channels, side, side)
    moments = torch.randn(shape, generator=generator(0, "moments")).abs().to(device)
    keys, ones = [str(number) for number in range(options.batch)], torch.ones(options.batch, device=device)

    def step(number: int) -> None:
        size = time_ids(options.batch, device)
        epochs, captions = [number] * options.batch, ["a cat"] * options.batch
        training.train_step([Batch(keys, epochs, captions, None, moments, size, ones, ones)])
        training.step += 1

    return step


# --- diffusers' scripts -----------------------------------------------------------------------------------------------


class Encoders:
    """The frozen encoders of diffusers' scripts."""

    def __init__(self, family: Family, precision: str, device: torch.device) -> None:
        self.xl = family.xl
        self.autoencoder = random(
            lambda: diffusers.AutoencoderKL.from_config(write_autoencoder(family.autoencoder)),
            "no" if family.xl else precision, device,
        )  # fmt: skip
        self.towers = []
        for config in family.text:
            kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
            written = transformers.CLIPTextConfig(**write_text(config, END_ID))
            self.towers.append(random(lambda kind=kind, written=written: kind(written), precision, device))

    @torch.no_grad()
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) to scaled latents (B, C, h, w)."""
        encoded = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).latent_dist.sample()
        return encoded * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def texts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B, 77) to text (B, 77, D) and, for SDXL, pooled text (B, P)."""
        if not self.xl:
            return self.towers[0](tokens, return_dict=False)[0], None
        found = [tower(tokens, output_hidden_states=True) for tower in self.towers]
        return torch.cat([one.hidden_states[-2] for one in found], dim=-1), found[-1][0]


def theirs(options: argparse.Namespace) -> Callable[[int], None]:
    """The step of diffusers' scripts."""
    family, accelerator = family_of(options), Accelerator(mixed_precision=options.precision)
    device, precision = accelerator.device, options.precision
    unet = random(lambda: diffusers.UNet2DConditionModel.from_config(write_unet(family.unet)), precision, device)
    unet.add_adapter(
        peft.LoraConfig(
            r=options.rank, lora_alpha=options.rank, init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )  # fmt: skip
    if precision == "fp16":
        cast_training_params(unet, dtype=torch.float32)
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=1e-2)
    unet, optimizer = accelerator.prepare(unet.train(), optimizer)
    schedule = family.schedule
    scheduler = diffusers.DDPMScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule=schedule.beta_schedule
    )
    encode = inputs(options, family, device)

    def step(number: int) -> None:
        latents, text, added = encode()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (options.batch,), device=device).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        accelerator.gather(loss.repeat(options.batch)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inputs(options: argparse.Namespace, family: Family, device: torch.device) -> Callable[[], tuple[Any, Any, Any]]:
    """A function that gives latents, text and further conditions of a step: encoded anew, or the same each time."""
    dtype, side = numbers(options.precision), options.size // family.autoencoder.factor
    cond = conditioning(family, options.batch, device)
    known = torch.randn(options.batch, 4, side, side, device=device, dtype=dtype)
    pixels = torch.rand(options.batch, 3, options.size, options.size, device=device) * 2 - 1
    tokens = torch.randint(0, 49000, (options.batch, 77), device=device)
    encoders = Encoders(family, options.precision, device) if options.side == "diffusers" else None

    def encode() -> tuple[Any, Any, Any]:
        latents = encoders.latents(pixels).to(dtype) if encoders else known
        text, pooled = encoders.texts(tokens) if encoders else (cond.text.to(dtype), cond.pooled)
        added = {"text_embeds": pooled, "time_ids": cond.size} if family.xl else None
        return latents, text, added

    return encode


# --- turns ------------------------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step but the first, and the peak memory of all, in this process."""
    step = (ours if options.side == "ours" else theirs)(options)
    reset_peak(DEVICE)
    return {"seconds": timed(step, options.steps), "peak": peak(DEVICE)}


def main() -> None:
    """Print medians and their ratios, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sd15", choices=["sd15", "sdxl"])
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each process, after a warm-up step")
    parser.add_argument("--rounds", type=int, default=3, help="number of processes of each side")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all sides")
    parser.add_argument("--compile", action="store_true", help="ours")
    parser.add_argument("--int8", action="store_true", help="ours: frozen weights of transformer blocks in 8 bits")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the tool")
    options = parse(parser, SIDES)
    if options.side:
        print(json.dumps(measured(options)))
        return
    found = in_turn(SIDES, options.rounds)
    seconds = {
        side: median(second for one in rows for second in one["seconds"]) for side, rows in found.items() if rows
    }
    for side, value in seconds.items():
        highest = max(one["peak"] for one in found[side])
        print(
            f"{side:24} {value:8.3f} s a step   {options.batch / value:7.3f} images/s   peak {highest:6.2f} GB   "
            f"ours is {value / seconds['ours']:.2f} times as fast"
        )
    write_found(options, {"found": found}, peft=peft.__version__)


if __name__ == "__main__":
    main()
