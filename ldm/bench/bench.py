"""`ldm bench`: how fast images are made, beside diffusers with the same weights, prompts, steps and noise schedule.

Each side lives in a process of its own, as its users have it, and they take turns, an image each, so that what else
the machine does meets all of them.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.cli.common import to_dtype
from ldm.cli.generate import parse_size
from ldm.errors import LdmError, first_line
from ldm.families import FAMILIES, Family
from ldm.files import replacing, write_json
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.unet import UNet
from ldm.training.stages.denoiser import blank
from ldm.weights.builtin import DEFAULT, builtin
from ldm.weights.configs import write_autoencoder, write_schedule, write_text, write_unet
from ldm.weights.sources import open_source
from ldm.weights.tokenizer import write_tokenizer
from pipelines import Pipeline
from pipelines.tuning import Tuning, default_device, default_dtype, device_named

log = logging.getLogger(__name__)
PROMPT = "a photograph of an astronaut riding a horse"
OURS = "ldm"
STAGES = ("before", "step", "decode", "image")  # of a call: text and all else before the steps; one step; the end; all
RIVALS = {
    "diffusers": "diffusers as it comes",
    "channels-last": "diffusers at its best without compiling",
    "compiled": "diffusers as its documentation says: channels last, fused projections, torch.compile",
    "compiled-blocks": "the same, with the blocks of the U-Net compiled each for itself",
    "openvino": "diffusers' pipeline with its networks run by OpenVINO, on the CPU",
    "plain": "ours, with plain layers and PyTorch's attention",
}
SIZES = {"cpu": 4096, "cuda": 8192}  # of the matrices whose multiplication says what a device can do at the most


@dataclass(frozen=True)
class BenchOptions:
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
    compile: bool = False  # of ours alone
    quantize: str | None = None  # likewise
    cold: bool = False
    out: str | None = None


@dataclass(frozen=True)
class Seconds:
    """Of one call."""

    before: float
    step: float
    decode: float
    image: float


WATCHED = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # a small process that starts another: one forked off a large one would count its memory from that
TIMED = """
import sys, time
began = time.perf_counter()
{imports}
imported = time.perf_counter()
model = {loads}
print(imported - began, time.perf_counter() - imported)
"""
Side = Callable[[int, Callable[[], None]], None]  # make images with that many steps, and tell after each


def run(options: BenchOptions) -> None:
    """Measure and print; with `out`, all numbers go there as JSON.

    Raises:
        LdmError: an option means nothing.
    """
    rivals = [name.strip() for name in options.against.split(",") if name.strip()]
    if unknown := [name for name in rivals if name not in RIVALS]:
        raise LdmError(f"--against {unknown[0]!r} is not known; choose from {', '.join(RIVALS)}")
    if min(options.steps - 1, options.rounds, options.batch) < 1:
        raise LdmError("--steps must be at least 2, --rounds and --batch at least 1")
    path = builtin(options.source) or Path(options.source)
    if options.cold and not path.is_dir():
        raise LdmError(f"--cold compares what opens a model folder; {options.source} is none")
    device = device_named(options.device or default_device())
    dtype = to_dtype(options.dtype) or default_dtype(device)
    family = _family(options.source) or open_source(options.source, verify=False).family
    width, height = parse_size(options.size) if options.size else (family.size,) * 2
    call = Call(width, height, options.batch, family.guidance)
    factor = family.autoencoder.factor
    work = 2 * call.batch * products(family, call.height // factor, call.width // factor)
    sides: dict[str, Process] = {}
    for name in (OURS, *rivals):
        sides[name] = Process(name, options, call, device, dtype)
        if device.type != "cuda":  # where memory is shared, of which models need most while they are made
            sides[name].wait()
    if device.type == "cuda":
        for side in sides.values():
            side.wait()
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    result: dict[str, Any] = {
        "options": asdict(options), "device": device_name(device), "dtype": str(dtype), "size": [width, height],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")}, "memory": memory,
    }  # fmt: skip
    fastest = 0.0
    for number in range(options.rounds + 1):
        fastest = max(fastest, speed(device, dtype))
        for name in list(found):
            try:
                seconds, memory[name] = sides[name].image(options.steps)
            except LdmError as error:
                if name == OURS or number:
                    raise
                log.warning("without %s: %s", name, error)  # which can do less than the others
                del found[name]
                continue
            if number:  # the first warms up
                found[name].append(seconds)
        if number:
            result["limit of a step"] = work / fastest
            result["seconds"] = {name: [asdict(one) for one in rows] for name, rows in found.items()}
            _write(options.out, result)
    console = Console()
    console.print(*_tables(found, memory, work / fastest))
    if options.cold:
        cold = cold_starts(path, options.rounds, str(device), options.quantize)
        result["cold"] = {name: [asdict(one) for one in rows] for name, rows in cold.items()}
        console.print(_cold_table(cold))
        _write(options.out, result)


def _write(out: str | None, result: dict[str, Any]) -> None:
    """All that was found so far, into the file that is asked for."""
    if out:
        with replacing(Path(out), folder=False, overwrite=True, need=0) as temporary:
            write_json(temporary, result)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What all sides make."""

    width: int
    height: int
    batch: int
    guidance: float


class Process:
    """A side in a process of its own."""

    def __init__(self, name: str, options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype) -> None:
        """Start it."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, name, options, call, device, dtype), daemon=True)
        self.process.start()
        other.close()

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            LdmError: it has no such model, or a package is missing.
        """
        self._answer()

    def image(self, steps: int) -> tuple[Seconds, float]:
        """Make one; how long it took, and the most memory since it was ready, GB.

        Raises:
            LdmError: the process has died.
        """
        return self._answer(steps)

    def _answer(self, steps: int = 0) -> Any:
        try:
            if steps:
                self.pipe.send(steps)
            problem, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise LdmError(f"the process of {self.name} has died; does memory suffice for all sides?") from None
        if problem:
            raise LdmError(problem)
        return answer


def _serve(pipe: Any, name: str, options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype) -> None:
    """Make images in the way of a side until nobody asks any more."""
    try:
        side = make_side(name, options, call, device, dtype)
        reset_peak(device)
        pipe.send(("", None))
        while True:
            steps = pipe.recv()
            pipe.send(("", (timed(side, steps, device), peak(device))))
    except LdmError as error:
        pipe.send((str(error), None))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:  # of the other side's packages, say
        pipe.send((f"{name}: {type(error).__name__}: {first_line(error)}", None))


def make_side(name: str, options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype) -> Side:
    """A side by its name: ours, or one of `RIVALS`."""
    if name == OURS:
        tuning = Tuning(compile=options.compile, quantize=options.quantize, offload="none")
        return ours(_model(options.source, device, dtype, tuning), call)
    model = _model(options.source, device, dtype, Tuning("sdpa", quick=False, offload="none"))
    return ours(model, call) if name == "plain" else theirs(model, call, to_dtype(options.rival_dtype) or dtype, name)


def reset_peak(device: torch.device) -> None:
    """Forget how much memory was needed so far, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux's highest resident size


def peak(device: torch.device) -> float:
    """The most memory that was needed, GB: a GPU's, or what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _family(source: str) -> Family | None:
    """The family whose name a source is, if it is not a model's."""
    return None if builtin(source) else FAMILIES.get(source)


def _model(source: str, device: torch.device, dtype: torch.dtype, tuning: Tuning) -> LatentDiffusion:
    """A model as pipelines have it by default; with the name of a family, one of its shape with random weights."""
    if family := _family(source):
        with device:  # which fills its memory faster than this one could
            model = LatentDiffusion.from_family(family)
        for module in model.modules().values():
            module.to(dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what lay there in fp32
        return tuning.apply(model)
    return Pipeline(source, device=device, dtype=dtype, **vars(tuning)).model


def ours(model: LatentDiffusion, call: Call, **settings: Any) -> Side:
    """This package's pipeline."""
    pipeline = Pipeline(model)

    def make(steps: int, tell: Callable[[], None]) -> None:
        pipeline(
            [PROMPT] * call.batch, batch=call.batch, steps=steps, guidance=call.guidance, width=call.width,
            height=call.height, seed=0, on_step=lambda _: tell(), **settings,
        )  # fmt: skip

    return make


def theirs(model: LatentDiffusion, call: Call, dtype: torch.dtype, name: str = "diffusers") -> Side:
    """diffusers' pipeline, on the same weights in memory where dtype and layout allow it; `name` is one of `RIVALS`."""
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
    if family.xl:
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
    pipeline.set_progress_bar_config(disable=True)
    if name in ("channels-last", "compiled", "compiled-blocks"):
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if name == "openvino":
        pipeline.to(torch.float32)  # numpy knows no bf16; OpenVINO computes in it
        run_by_openvino(pipeline, model, call, dtype)
    if name in ("compiled", "compiled-blocks"):
        pipeline.fuse_qkv_projections()
        blocks = name == "compiled-blocks"
        how: Any = {} if blocks or unet.device.type != "cuda" else {"mode": "max-autotune", "fullgraph": True}
        if blocks:
            pipeline.unet.compile_repeated_blocks(fullgraph=True)
        else:
            pipeline.unet = torch.compile(pipeline.unet, **how)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, **how)

    def make(steps: int, tell: Callable[[], None]) -> None:
        def after(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            tell()
            return values

        pipeline(
            [PROMPT] * call.batch, num_inference_steps=steps, guidance_scale=call.guidance, width=call.width,
            height=call.height, generator=torch.Generator().manual_seed(0), callback_on_step_end=after,
        )  # fmt: skip

    return make


def run_by_openvino(pipeline: Any, model: LatentDiffusion, call: Call, dtype: torch.dtype) -> None:
    """Let OpenVINO run the U-Net and the decoder of diffusers' pipeline, in this precision and for calls of this shape.

    Raises:
        LdmError: it is not installed.
    """
    try:
        import openvino  # type: ignore[import-not-found]
    except ImportError:
        raise LdmError("--against openvino needs the package openvino: pip install openvino") from None
    factor, channels = model.family.autoencoder.factor, model.family.autoencoder.latent_channels
    x, _, cond = blank(model.family, call.height // factor, call.width // factor)
    parts = [part for part in (x, cond.text, cond.pooled, cond.size) if part is not None]
    latents, *more = (torch.zeros(2 * call.batch, *part.shape[1:]) for part in parts)
    names = ("text_embeds", "time_ids")[: len(more) - 1]
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"}
    unet, vae = pipeline.unet.requires_grad_(False), pipeline.vae.requires_grad_(False)

    class Denoiser(nn.Module):
        network = unet

        def forward(self, x: Tensor, t: Tensor, text: Tensor, *added: Tensor) -> Tensor:
            named = dict(zip(names, added, strict=True))
            return self.network(x, t, text, added_cond_kwargs=named, return_dict=False)[0]

    class Decoder(nn.Module):
        network = vae

        def forward(self, z: Tensor) -> Tensor:
            return self.network.decode(z, return_dict=False)[0]

    def compiled(module: nn.Module, *inputs: Tensor) -> Callable[..., Tensor]:
        made = openvino.convert_model(module, example_input=inputs)
        made.reshape({port: list(value.shape) for port, value in zip(made.inputs, inputs, strict=True)})
        network = openvino.Core().compile_model(made, "CPU", hint)
        return lambda *values: torch.from_numpy(network([value.float().numpy() for value in values])[0].copy())

    with torch.no_grad():
        denoise = compiled(Denoiser(), latents, torch.tensor(1.0), *more)
        decode = compiled(Decoder(), latents[: call.batch, :channels])
    unet.forward = lambda x, t, encoder_hidden_states, added_cond_kwargs=None, **_: (
        denoise(x, t, encoder_hidden_states, *((added_cond_kwargs or {})[name] for name in names)),
    )
    vae.decode = lambda z, **_: (decode(z),)


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
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":  # which goes on meanwhile
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    side(steps, mark)
    mark()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        marks = [marks[0].elapsed_time(event) / 1000 for event in marks]
    start, *after, end = marks
    step = median(later - earlier for earlier, later in pairwise(after))
    return Seconds(after[0] - start - step, step, end - after[-1], end - start)


def products(family: Family, height: int, width: int) -> int:
    """Floating-point operations of the U-Net's multiplications, for one image of these many latents, once."""
    with torch.device("meta"):
        unet = UNet(family.unet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*blank(family, height, width))
    return counter.get_total_flops()


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a plain product of large matrices: what a device can do at the most."""
    size = SIZES.get(device.type, SIZES["cpu"])
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        began = now(device)
        a @ b
        best = min(best, now(device) - began)
    return 2 * size**3 / best


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Cold:
    """Of a new process, from the command to the image."""

    seconds: float
    memory: float  # the most that was resident, GB
    imports: float  # seconds, of another new process that loads the model
    load: float


def cold_starts(path: Path, rounds: int, device: str, quantize: str | None = None) -> dict[str, list[Cold]]:
    """New processes that make an image: `ldm generate`, and a script that uses diffusers."""
    imports = {
        OURS: "from pipelines import Pipeline",
        "diffusers": "import torch; from diffusers import DiffusionPipeline",
    }
    loads = {
        OURS: f"Pipeline(sys.argv[1], device=sys.argv[2], quantize={quantize!r})",
        "diffusers": "DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to(sys.argv[2])",
    }
    script = (
        f"import sys; {imports['diffusers']}; p = {loads['diffusers']}\n"
        "p(sys.argv[3], num_inference_steps=20).images[0].save(sys.argv[4])\n"
    )
    found: dict[str, list[Cold]] = {OURS: [], "diffusers": []}
    more = ["--device", device, *([] if quantize is None else ["--quantize", quantize])]
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder, "image.png"))
        commands = {
            OURS: ["-m", "ldm", "generate", PROMPT, "--model", str(path), "--steps", "20", "--out", image, *more],
            "diffusers": ["-c", script, str(path), device, PROMPT, image],
        }
        for number in range(rounds + 1):
            for name, command in commands.items():
                Path(image).unlink(missing_ok=True)
                seconds, kilobytes = printed(name, [WATCHED, *command])
                if not Path(image).is_file():
                    raise LdmError(f"a new process of {name} made no image")
                parts = printed(name, [TIMED.format(imports=imports[name], loads=loads[name]), str(path), device])
                if number:
                    found[name].append(Cold(seconds, kilobytes * 1024 / 1e9, *parts))
    return found


def printed(name: str, command: Sequence[str]) -> list[float]:
    """The numbers that a new process prints last, of a Python program with arguments.

    Raises:
        LdmError: it fails.
    """
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        last = first_line(RuntimeError("\n".join(done.stderr.strip().splitlines()[-1:])))
        raise LdmError(f"a new process of {name} failed: {last}")
    return [float(number) for number in done.stdout.split("\n")[-2].split()]


def device_name(device: torch.device) -> str:
    """What a reader must know of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


# --- what is printed --------------------------------------------------------------------------------------------------


def ratios(others: Sequence[float], own: Sequence[float]) -> str:
    """How many times as long the others took, round by round: median, and the middle half."""
    found = [other / mine for other, mine in zip(others, own, strict=True)]
    low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else (found[0],) * 3
    return f"{median(found):.2f} ({low:.2f}–{high:.2f})"


def _tables(found: dict[str, list[Seconds]], memory: dict[str, float], limit: float) -> tuple[Table, Table]:
    """Seconds of all sides, and how many times as long as ours those of the others are."""
    seconds = Table("seconds", *STAGES, "of the limit", "memory, GB", box=SIMPLE)
    against = Table("times ours", *STAGES, box=SIMPLE)
    for name, rows in found.items():
        columns = [[getattr(one, stage) for one in rows] for stage in STAGES]
        share = limit / median(one.step for one in rows)
        times = (f"{median(column):.3f}" for column in columns)
        seconds.add_row(name, *times, f"{share:.0%}", f"{memory[name]:.2f}")
        if name != OURS:
            own = [[getattr(one, stage) for one in found[OURS]] for stage in STAGES]
            against.add_row(name, *(ratios(*both) for both in zip(columns, own, strict=True)))
    return seconds, against


def _cold_table(found: dict[str, list[Cold]]) -> Table:
    table = Table("new process", *found, "times ours", box=SIMPLE)
    labels = {
        "seconds": "command to image, s", "memory": "memory, GB", "imports": "importing, s", "load": "loading, s",
    }  # fmt: skip
    for field, label in labels.items():
        columns = {name: [getattr(one, field) for one in rows] for name, rows in found.items()}
        medians = (f"{median(column):.2f}" for column in columns.values())
        table.add_row(label, *medians, ratios(columns["diffusers"], columns[OURS]))
    return table
