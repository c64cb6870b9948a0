"""Measure a training step of the U-Net, compared with diffusers' example scripts on the same weights and batch.

Each side runs in its own process, alternating; the results are medians over all steps but each process's first. Both
sides train on cached latents and encoded captions with AdamW, gradient clipping and the same precision, without weight
averages. Diffusers' step is that of `train_text_to_image.py` and `train_text_to_image_sdxl.py`, on
`UNet2DConditionModel`. "Use" is the U-Net's operations per second divided by the device's peak (a GPU's from its data
sheet).

    python tools/measure_training.py --family sd15 --size 512 --batch 1 --steps 3 --rounds 2
    python tools/measure_training.py --family sdxl --size 1024 --batch 8 --precision bf16 --compile
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from taking_turns import DEVICE, in_turn, parse, timed, write_found

from ldm.bench.measuring import products
from ldm.data.keyed import generator
from ldm.data.loader import Batch
from ldm.families import FAMILIES
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning, UNet
from ldm.runtime.kernels.memory import keep_freed
from ldm.training.forecast import peak_tflops
from ldm.training.gradient_checkpointing import checkpointed
from ldm.training.loop import Training
from ldm.training.sections import EmaSection
from ldm.training.stages.denoiser import DenoiserStage
from ldm.training.stages.sections import DenoiserSection
from ldm.weights.configs import write_unet


def conditioning(family: Any, batch: int, device: torch.device) -> Conditioning:
    """Random encoded captions and time ids."""
    text = torch.randn(batch, 77, family.unet.text_dim, generator=torch.Generator().manual_seed(1)).to(device)
    if not family.xl:
        return Conditioning(text)
    size = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * batch, device=device)
    return Conditioning(text, text[:, 0, : family.unet.pooled_dim].contiguous(), size)


def weights(options: argparse.Namespace, device: torch.device) -> UNet:
    """A U-Net with random weights from a fixed seed."""
    torch.manual_seed(0)
    with device:
        return UNet(FAMILIES[options.family].unet)


def ours(options: argparse.Namespace) -> Callable[[int], None]:
    """Our training step: keyed noise, loss, backward, checks, clipping, update."""
    family = FAMILIES[options.family]
    accelerator = Accelerator(mixed_precision=options.precision)
    unet = weights(options, accelerator.device)
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    else:
        keep_freed()
    model = LatentDiffusion(family, {"unet": unet, "autoencoder": torch.nn.Linear(1, 1)})
    model.autoencoder.config = family.autoencoder  # type: ignore[assignment]
    cond = conditioning(family, options.batch, accelerator.device)
    section = DenoiserSection(steps=10**6, batch=options.batch, ema=EmaSection(decay=0), log_every=10**6)
    stage = DenoiserStage("base", section, model, accelerator, 0, texts=lambda _: cond)
    if options.checkpointing:
        checkpointed(unet)
    if options.compile:
        unet.compile()
    training = Training(accelerator, stage, Path(options.folder), lambda _: iter(()), lambda: (), lambda *_: None)
    side = options.size // family.autoencoder.factor
    shape = (options.batch, 2 * family.autoencoder.latent_channels, side, side)
    moments = torch.randn(shape, generator=generator(0, "moments")).abs().to(accelerator.device)
    size = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * options.batch, device=accelerator.device)
    scores = torch.full((options.batch,), 6.0, device=accelerator.device)
    keys, texts = [str(number) for number in range(options.batch)], ["a cat"] * options.batch
    ones = torch.ones_like(scores)

    def step(number: int) -> None:
        training.train_step([Batch(keys, [number] * options.batch, texts, None, moments, size, scores, ones)])
        training.step += 1

    return step


def theirs(options: argparse.Namespace) -> Callable[[int], None]:
    """The training step of diffusers' example scripts."""
    family = FAMILIES[options.family]
    accelerator = Accelerator(mixed_precision=options.precision)
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel.from_config(write_unet(family.unet))
    unet.load_state_dict(weights(options, accelerator.device).state_dict(), assign=True)
    unet.train()
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=accelerator.device.type == "cuda" or None)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    schedule = family.schedule
    scheduler = diffusers.DDPMScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule=schedule.beta_schedule
    )
    cond = conditioning(family, options.batch, accelerator.device)
    side = options.size // family.autoencoder.factor
    latents = torch.randn(options.batch, 4, side, side, device=accelerator.device)
    added = {"text_embeds": cond.pooled, "time_ids": cond.size} if cond.pooled is not None else None

    def step(number: int) -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (options.batch,), device=latents.device).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, cond.text, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        accelerator.gather(loss.repeat(options.batch)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print medians and their ratio, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sd15", choices=["sd15", "sdxl"])
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each process, after a warm-up step")
    parser.add_argument("--rounds", type=int, default=2, help="number of processes of each side")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="ours")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for both sides")
    options = parse(parser, ("ours", "theirs"))
    if options.side:
        step = (ours if options.side == "ours" else theirs)(options)
        print(json.dumps(timed(step, options.steps)))
        return
    rows = in_turn(("ours", "theirs"), options.rounds)
    found = {side: [second for one in own for second in one] for side, own in rows.items()}
    mine, other = median(found["ours"]), median(found["theirs"] or [float("nan")])
    family = FAMILIES[options.family]
    side = options.size // family.autoencoder.factor
    work = 3 * options.batch * products(family, side, side)  # forward and backward
    tflops, peak = work / mine / 1e12, peak_tflops(DEVICE, options.precision)
    print(
        f"ours {mine:.3f} s   diffusers {other:.3f} s   ratio {other / mine:.2f}   images/s {options.batch / mine:.3f}"
        f"   TFLOP/s {tflops:.2f}" + (f"   use {tflops / peak:.0%}" if peak else "")
    )
    seconds = {side: seconds for side, seconds in found.items() if seconds}
    write_found(options, {"seconds": seconds, "tflops": tflops, "peak": peak})


if __name__ == "__main__":
    main()
