"""`ldm bench`: how fast pictures are made, beside diffusers with the same weights, prompts, steps and noise schedule.

All sides live in one process and take turns, a picture each, so that what else the machine does meets all of them.
"Best" is diffusers as its own documentation says: channels last, fused projections, `torch.compile`.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.cli.common import to_dtype
from ldm.cli.generate import parse_size
from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.unet import UNet
from ldm.training.forecast import blank
from ldm.weights.builtin import DEFAULT, builtin
from ldm.weights.configs import write_autoencoder, write_schedule, write_text, write_unet
from ldm.weights.files import replacing, write_json
from ldm.weights.tokenizer import write_tokenizer
from pipelines import Pipeline
from pipelines.pipeline import default_device, default_dtype, device_named, tune

PROMPT = "a photograph of an astronaut riding a horse"
STAGES = ("before", "step", "decode", "image")  # of a call: text and all else before the steps; one step; the end; all
RIVALS = ("diffusers", "diffusers-best")
SIZE = 4096  # of the matrices whose multiplication says what the device can do at the most


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    source: str = DEFAULT
    size: str | None = None
    batch: int = 1
    steps: int = 4
    rounds: int = 5
    dtype: str | None = None
    rival_dtype: str | None = None
    device: str | None = None
    against: str = "diffusers"
    cold: bool = False
    out: str | None = None


@dataclass(frozen=True)
class Seconds:
    """Of one call."""

    before: float
    step: float
    decode: float
    image: float


Side = Callable[[int, Callable[[], None]], None]  # make pictures with that many steps, and tell after each


def run(options: Options) -> None:
    """Measure and print; with `out`, all numbers go there as JSON.

    Raises:
        LdmError: an option means nothing.
    """
    rivals = [name.strip() for name in options.against.split(",") if name.strip()]
    if unknown := [name for name in rivals if name not in RIVALS]:
        raise LdmError(f"--against {unknown[0]!r} is not known; choose from {', '.join(RIVALS)}")
    if min(options.steps - 1, options.rounds, options.batch) < 1:
        raise LdmError("--steps must be at least 2, --rounds and --batch at least 1")
    device = device_named(options.device or default_device())
    dtype = to_dtype(options.dtype) or default_dtype(device)
    model = _model(options.source, device, dtype)
    width, height = parse_size(options.size) if options.size else (model.family.size,) * 2
    call = Call(width, height, options.batch, model.family.guidance)
    sides: dict[str, Side] = {"ldm": ours(model, call)}
    for name in rivals:
        sides[name] = theirs(model, call, to_dtype(options.rival_dtype) or dtype, best=name == "diffusers-best")
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            seconds = timed(side, options.steps, device)
            if number:  # the first warms up
                found[name].append(seconds)
    limit = limit_seconds(model, call, device, dtype)
    result = {
        "options": asdict(options), "device": device_name(device), "dtype": str(dtype), "size": [width, height],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "limit of a step": limit, "seconds": {name: [asdict(one) for one in rows] for name, rows in found.items()},
    }  # fmt: skip
    console = Console()
    console.print(_table(found, limit))
    if options.cold:
        result["cold"] = cold = cold_starts(options.source, options.rounds)
        console.print(_cold_table(cold))
    if options.out:
        with replacing(Path(options.out), folder=False, overwrite=True, need=0) as temporary:
            write_json(temporary, result)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What all sides make."""

    width: int
    height: int
    batch: int
    guidance: float


def _model(source: str, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """A model as pipelines have it by default; with the name of a family, one of its shape with random weights."""
    if source in FAMILIES and not builtin(source):
        model = LatentDiffusion.from_family(source)
        for module in model.modules().values():
            module.to(device, dtype)
        tune(model)
        return model
    return Pipeline(source, device=device, dtype=dtype).model


def ours(model: LatentDiffusion, call: Call, **settings: Any) -> Side:
    """This package's pipeline."""
    pipeline = Pipeline(model)

    def make(steps: int, tell: Callable[[], None]) -> None:
        pipeline(
            [PROMPT] * call.batch, batch=call.batch, steps=steps, guidance=call.guidance, width=call.width,
            height=call.height, seed=0, on_step=lambda _: tell(), **settings,
        )  # fmt: skip

    return make


def theirs(model: LatentDiffusion, call: Call, dtype: torch.dtype, best: bool) -> Side:
    """diffusers' pipeline, on the same weights in memory where dtype and layout allow it."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # diffusers imports it, and it says what does not load
    import diffusers
    from transformers import CLIPTokenizer

    diffusers.utils.logging.set_verbosity_error()
    family = model.family
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(write_unet(family.unet))
        vae = diffusers.AutoencoderKL.from_config(write_autoencoder(family.autoencoder))
    unet.load_state_dict(model.unet.state_dict(), assign=True)
    vae.load_state_dict(model.autoencoder.state_dict(), assign=True)
    scheduler = getattr(diffusers, family.schedule.scheduler).from_config(write_schedule(family.schedule))
    parts: dict[str, Any] = {"unet": unet.to(dtype), "vae": vae.to(dtype), "scheduler": scheduler}
    encoders = model.text_encoders
    for number, (config, tower, tokenizer) in enumerate(
        zip(encoders.configs, encoders.towers, encoders.tokenizers, strict=True)
    ):
        ending = f"_{number + 1}" if number else ""
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(tokenizer, Path(folder))
            parts[f"tokenizer{ending}"] = CLIPTokenizer.from_pretrained(folder)
        parts[f"text_encoder{ending}"] = their_tower(config, tower, tokenizer.end_id).to(dtype)
    if family.unet.pooled_dim:
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
    pipeline.set_progress_bar_config(disable=True)
    if best:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.fuse_qkv_projections()
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)

    def make(steps: int, tell: Callable[[], None]) -> None:
        def after(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            tell()
            return values

        pipeline(
            [PROMPT] * call.batch, num_inference_steps=steps, guidance_scale=call.guidance, width=call.width,
            height=call.height, generator=torch.Generator().manual_seed(0), callback_on_step_end=after,
        )  # fmt: skip

    return make


def their_tower(config: TextEncoderConfig, tower: nn.Module, end_id: int) -> nn.Module:
    """transformers' class of a text tower, on the weights of ours."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    with torch.device("meta"):
        theirs = kind(CLIPTextConfig(**write_text(config, end_id)))
    theirs.load_state_dict(tower.state_dict(), assign=True)
    embeddings: Any = getattr(theirs, "text_model", theirs).embeddings
    embeddings.position_ids = torch.arange(config.context, device=next(tower.parameters()).device)[None]
    return theirs.eval()


def timed(side: Side, steps: int, device: torch.device) -> Seconds:
    """One call, by its stages."""
    marks: list[float] = []

    def mark() -> None:
        marks.append(now(device))

    mark()
    side(steps, mark)
    mark()
    start, *after, end = marks
    step = median(later - earlier for earlier, later in pairwise(after))
    return Seconds(after[0] - start - step, step, end - after[-1], end - start)


def limit_seconds(model: LatentDiffusion, call: Call, device: torch.device, dtype: torch.dtype) -> float:
    """What a step with guidance must take: its multiplications at the speed of a plain product of large matrices."""
    factor = model.family.autoencoder.factor
    with torch.device("meta"):
        unet = UNet(model.family.unet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*blank(model.family, call.height // factor, call.width // factor))
    a, b = torch.randn(2, SIZE, SIZE, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        began = now(device)
        a @ b
        best = min(best, now(device) - began)
    return 2 * call.batch * counter.get_total_flops() / (2 * SIZE**3 / best)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cold_starts(source: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of new processes that make a picture: `ldm generate`, and a script that uses diffusers."""
    path = builtin(source) or Path(source)
    if not path.is_dir():
        raise LdmError(f"--cold compares what opens a model folder; {source} is none")
    script = (
        "import sys, torch, diffusers\n"
        "p = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)\n"
        "p(sys.argv[2], num_inference_steps=20).images[0].save(sys.argv[3])\n"
    )
    found: dict[str, list[float]] = {"ldm": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder, "picture.png"))
        commands = {
            "ldm": ["-m", "ldm", "generate", PROMPT, "--model", str(path), "--steps", "20", "--out", picture],
            "diffusers": ["-c", script, str(path), PROMPT, picture],
        }
        for number in range(rounds + 1):
            for name, command in commands.items():
                Path(picture).unlink(missing_ok=True)
                began = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, capture_output=True)
                if number:
                    found[name].append(time.perf_counter() - began)
    return found


def device_name(device: torch.device) -> str:
    """What a reader must know of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


# --- what is printed --------------------------------------------------------------------------------------------------


def ratios(others: Sequence[float], own: Sequence[float]) -> str:
    """How many times as long the others took, round by round: median, and the middle half."""
    found = [other / mine for other, mine in zip(others, own, strict=True)]
    low, _, high = quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return f"{median(found):.2f} ({low:.2f}–{high:.2f})"


def _table(found: dict[str, list[Seconds]], limit: float) -> Table:
    table = Table("stage", *(f"{name}, s" for name in found), *(f"{name} ×" for name in found if name != "ldm"))
    for stage in STAGES:
        seconds = {name: [getattr(one, stage) for one in rows] for name, rows in found.items()}
        against = [ratios(others, seconds["ldm"]) for name, others in seconds.items() if name != "ldm"]
        table.add_row(stage, *(f"{median(column):.3f}" for column in seconds.values()), *against)
    steps = [median(one.step for one in rows) for rows in found.values()]
    table.add_row("a step's share of the limit", *(f"{100 * limit / step:.0f} %" for step in steps))
    return table


def _cold_table(found: dict[str, list[float]]) -> Table:
    table = Table("new process", *(f"{name}, s" for name in found), "diffusers ×")
    against = ratios(found["diffusers"], found["ldm"])
    table.add_row("command to picture", *(f"{median(seconds):.2f}" for seconds in found.values()), against)
    return table
