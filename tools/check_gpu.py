"""Check a GPU within ten minutes.

Layers: fused against plain layers, on the shapes of SD 1.5 at 512² and SDXL at 1024². Images: the same with fused
layers, compilation and offload. Training: the same loss curves as on the CPU, recovery from too little memory, speed.

    python tools/check_gpu.py --out benchmarks/gpu-checks.json

The result of each check is printed and saved when the check ends, the most informative checks first. `--small` runs
small checks on a CPU, without those that need a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ldm.errors import first_line
from ldm.models.layers import GEGLU
from ldm.runtime import fused_gpu
from ldm.training.config import load
from ldm.training.layout import METRICS
from ldm.training.run import train
from ldm.training.selftest import Ground, lay_out
from pipelines import Pipeline

STEPS = 30
NEAR, NEAR_16_BIT = 2e-3, 3e-2  # largest relative differences that count as rounding
ROOM = 0.6  # memory limit of the out-of-memory check, as a part of the memory that the run needs
NORMS = [  # batch, channels, height and width
    (2, 320, 64), (2, 960, 64), (2, 640, 32), (2, 1920, 32), (2, 1280, 16), (2, 2560, 16), (2, 1280, 8),  # SD 1.5
    (2, 320, 128), (2, 960, 128), (2, 640, 64), (2, 1920, 64), (2, 1280, 32), (2, 2560, 32),  # SDXL
    (1, 512, 128), (1, 512, 512), (1, 256, 1024), (1, 128, 1024),  # SDXL's decoder
]  # fmt: skip
GATED = [(2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 4096, 640), (2, 1024, 1280)]  # batch, tokens, channels
CALLS = 10  # calls of a layer in one CUDA graph
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # exact fp32: no TF32, which convolutions use by default
PATIENCE = 300  # time limit of a process in seconds
HERE = Path(__file__).parent
Finding = tuple[bool, str, Any]  # whether the check passed, the result in words, and in numbers


def main() -> None:
    """Run the checks and print their results; the exit code is 0 if all checks passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run_here(Path(options.run), options.memory)
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("check_gpu: no GPU is found; --small tests the script without one")
    large: dict[str, Callable[[], Finding]] = {
        "fused layers, bf16": lambda: layers(torch.bfloat16),
        "images": lambda: images({"fused": {}}),
        "training step, sd15": lambda: steps("sd15", 512, 8),
        "images, compiled": lambda: images({"compiled": {"compile": True}}),
        "images, offload": lambda: images({name: {"offload": name} for name in ("components", "layers")}),
        "selftest, bf16": lambda: selftest("bf16"),
        "losses as on the CPU": curves,
        "fused layers, fp16": lambda: layers(torch.float16),
        "too little memory": memory,
        "training step, sdxl": lambda: steps("sdxl", 1024, 2),
        "selftest, fp16": lambda: selftest("fp16"),
    }
    small: dict[str, Callable[[], Finding]] = {
        "images": lambda: images({"fused": {}, "components": {"offload": "components"}}),
        "training step, sd15": lambda: steps("sd15", 64, 1),
        "selftest, bf16": large["selftest, bf16"],
        "losses as on the CPU": curves,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    for name, check in (small if options.small else large).items():
        result = results[name] = timed(check)
        print(
            f"{name}: {'ok' if result['well'] else 'FAILED'}, {result['found']}, {result['seconds']:.0f} s", flush=True
        )
        if options.out:
            content = {"device": device, "torch": torch.__version__, "checks": results}
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not all(result["well"] for result in results.values()))


def timed(check: Callable[[], Finding]) -> dict[str, Any]:
    """Run a check and time it; a check that raises an error counts as failed."""
    began = time.monotonic()
    try:
        well, found, numbers = check()
    except subprocess.CalledProcessError as error:
        well, found, numbers = False, " ".join((error.stderr or error.stdout or str(error)).split())[-300:], None
    except Exception as error:  # any package may raise
        traceback.print_exc()
        well, found, numbers = False, f"{type(error).__name__}: {first_line(error)}", None
    return {"well": well, "found": found, "numbers": numbers, "seconds": time.monotonic() - began}


def selftest(precision: str) -> Finding:
    """Run `ldm selftest`, which checks gradients, weights, resuming, and numbers that are not finite."""
    done = python("-m", "ldm", "selftest", "--precision", precision)
    return True, "all tests passed", done.stdout.splitlines()


def curves() -> Finding:
    """Compare the losses of the stage base on the GPU, in fp32 and bf16, with those on the CPU in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        expected = losses(Path(folder), "cpu", "no", ACCELERATE_USE_CPU="true")
        found = {precision: losses(Path(folder), precision, precision, **EXACT) for precision in ("no", "bf16")}
    far = {name: distance(own, expected) for name, own in found.items()}
    well = far["no"] < NEAR and far["bf16"] < NEAR_16_BIT
    return well, f"at most {far['no']:.1e} away in fp32, {far['bf16']:.1e} in bf16", {"cpu": expected, **found}


def memory() -> Finding:
    """Check that a run with too little memory uses smaller micro-batches and has the same losses."""
    changes: dict[str, Any] = {"base__sizes": [{"size": 256}], "base__batch": 64}
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        expected = losses(Path(folder), "whole", "no", **changes, **EXACT)
        peak = int((Path(folder) / "whole.peak").read_text())
        found = losses(Path(folder), "cut", "no", limit=int(ROOM * peak), **changes, **EXACT)
        said = (Path(folder) / "cut.log").read_text()
    far = distance(found, expected)
    cut = said.count("out of memory with")
    return cut > 0 and far < NEAR, f"cut {cut} times, losses at most {far:.1e} away", {"peak": peak, "limit": ROOM}


def images(ways: dict[str, dict[str, Any]]) -> Finding:
    """Compare the built-in model's images in fp32 from pipelines with these settings with those of plain layers."""
    torch.backends.cudnn.allow_tf32 = False
    plain = Pipeline(dtype=torch.float32, quick=False, offload="none")
    several = [{"n": 3}, {"n": 3, "batch": 2}, {"guidance": 1.0}, {"hires": 1.5}, {"reuse": 2}, {"merge": 0.5}]
    far = {}
    for name, settings in ways.items():
        pipeline, far[name] = Pipeline(dtype=torch.float32, **settings), 0.0
        for prompt in ("a cat, noto style", "two very happy dogs, fluent flat style"):  # both use one CUDA graph
            for more in several:
                made, wanted = (one(prompt, seed=1, steps=8, **more).latents for one in (pipeline, plain))
                for a, b in zip(made, wanted, strict=True):
                    far[name] = max(far[name], float((a - b).abs().max() / b.abs().max()))
    return max(far.values()) < NEAR, ", ".join(f"{name} {value:.1e}" for name, value in far.items()) + " away", far


def layers(dtype: torch.dtype) -> Finding:
    """Compare each kernel with the plain layer in a CUDA graph: its error against fp64 is at most 1.1 times the plain
    layer's. Reports the speed-up."""
    if not fused_gpu.works(torch.device("cuda"), dtype):
        return False, "the kernels do not work here", None
    rows = []
    with torch.inference_mode():
        for shape in NORMS:
            rows += [norm_row(shape, offset, dtype) for offset in (False, True)]
        rows += [gated_row(shape, dtype) for shape in GATED]
    table = Table("layer", "shape", "distance", "plain's", "ms", "plain's", title=str(dtype))
    for row in rows:
        numbers = [f"{row[key]:.3g}" for key in ("distance", "plain's distance", "ms", "plain's ms")]
        table.add_row(row["layer"], str(row["shape"]), *numbers)
    Console(width=120).print(table)
    well = all(row["distance"] <= 1.1 * row["plain's distance"] and row["again"] for row in rows)
    faster = sorted(row["plain's ms"] / row["ms"] for row in rows)
    return well, f"{faster[0]:.2f} to {faster[-1]:.2f} times as fast, median {faster[len(faster) // 2]:.2f}", rows


def norm_row(shape: tuple[int, int, int], with_offset: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Compare group norm and SiLU; the plain layer gets contiguous tensors, as in plain pipelines."""
    batch, channels, side = shape
    norm = nn.GroupNorm(32, channels, 1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.to("cuda", dtype)
    x = torch.randn(batch, channels, side, side, device="cuda").to(dtype)
    offset = torch.randn(batch, channels, device="cuda").to(dtype) if with_offset else None
    last = x.to(memory_format=torch.channels_last)

    def plain(layer: nn.Module, x: Tensor, offset: Tensor | None) -> Tensor:
        return F.silu(layer(x if offset is None else x + offset[:, :, None, None]))

    exact = plain(copy.deepcopy(norm).double(), x.double(), None if offset is None else offset.double())
    name = "group norm, SiLU, offset" if with_offset else "group norm, SiLU"
    return row(
        name, shape, exact, lambda: fused_gpu.kernels().group_norm(norm, last, offset, silu=True),
        lambda: plain(norm, x, offset),
    )  # fmt: skip


def gated_row(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Compare GEGLU with its matrix product, since the plain layer adds the bias in the product."""
    layer = GEGLU(shape[-1], 4 * shape[-1]).to("cuda", dtype)
    x = torch.randn(shape, device="cuda").to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    weight, bias = layer.proj.weight, layer.proj.bias
    return row(
        "GEGLU", shape, exact, lambda: fused_gpu.kernels().geglu(F.linear(x, weight), bias), lambda: layer(x)
    )  # fmt: skip


def row(
    layer: str, shape: tuple[int, ...], exact: Tensor, quick: Callable[[], Tensor], plain: Callable[[], Tensor]
) -> dict[str, Any]:
    """Relative errors of both layers, whether a graph gives the same as a call, and milliseconds of a call."""
    found, expected = quick(), plain()
    far, plain_far = (float((one.double() - exact).norm() / exact.norm()) for one in (found, expected))
    ms, from_graph = in_graph(quick)
    return {
        "layer": layer, "shape": shape, "distance": far, "plain's distance": plain_far, "ms": ms,
        "plain's ms": in_graph(plain)[0], "again": torch.equal(found, from_graph),
    }  # fmt: skip


def in_graph(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Milliseconds of a call in a CUDA graph, without Python's time, the best of several; and the result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            result = call()
    best = float("inf")
    for _ in range(5):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        best = min(best, before.elapsed_time(after) / CALLS)
    return best, result.clone()


def distance(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def losses(folder: Path, name: str, precision: str, limit: int | None = None, **changes: Any) -> list[float]:
    """The losses of a run in a new process, which writes to `name.log`; changes in capitals set its environment."""
    environment = {key: changes.pop(key) for key in list(changes) if key.isupper()}
    settings = Ground(folder, precision, 8).config(
        name, stages=["base"], base__steps=STEPS, base__save_every=STEPS, **changes
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    limited = ["--memory", str(limit)] if limit else []
    done = python(str(HERE / "check_gpu.py"), "--run", str(path), *limited, **environment)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    rows = [json.loads(line) for line in (folder / name / "base" / METRICS).read_text().splitlines()]
    return [row["loss/unet"] for row in rows if "loss/unet" in row]


def run_here(path: Path, limit: int | None) -> None:
    """Train in this process with at most `limit` bytes of the GPU's memory; record the peak memory."""
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    train(load(path, []))
    if torch.cuda.is_available():
        path.with_suffix(".peak").write_text(str(torch.cuda.max_memory_reserved()), encoding="utf-8")


def steps(family: str, size: int, batch: int) -> Finding:
    """Compare the time of our training step with diffusers' example script in bf16."""
    options = ["--family", family, "--size", str(size), "--batch", str(batch), "--precision", "bf16"]
    done = python(str(HERE / "measure_training.py"), *options, "--steps", "3", "--rounds", "1")
    said, numbers = done.stdout.splitlines()[-2:]
    return True, said, json.loads(numbers)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process; raises CalledProcessError if it fails."""
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, check=True,
        timeout=PATIENCE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
