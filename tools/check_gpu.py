"""Check training on a GPU, within ten minutes: the same curves as on the CPU, memory that does not suffice, speed.

    python tools/check_gpu.py --out benchmarks/gpu-training.json

`--small` makes everything small enough for a CPU, where what needs a GPU is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from ldm.training.config import load
from ldm.training.run import train
from ldm.training.selftest import Ground, draw_pictures

STEPS = 30
NEAR, NEAR_16_BIT = 2e-3, 3e-2  # relative differences of losses that are taken as rounding
ROOM = 0.6  # part of the memory that a run had needed, which does not suffice for it
HERE = Path(__file__).parent
Finding = tuple[bool, str, Any]  # whether it is as it should be, in words, and in numbers


def main() -> None:
    """Print a table; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run_here(Path(options.run), options.memory)
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("check_gpu: no GPU is found; --small tries the script itself")
    checks: dict[str, Callable[[], Finding]] = {
        "selftest, bf16": lambda: selftest("bf16"),
        "losses as on the CPU": curves,
    }
    if not options.small:
        checks |= {"selftest, fp16": lambda: selftest("fp16"), "too little memory": memory}
    sizes = [("sd15", 64, 1)] if options.small else [("sd15", 512, 32), ("sdxl", 1024, 4)]
    for family, size, batch in sizes:
        checks[f"training step, {family}"] = lambda f=family, s=size, b=batch: steps(f, s, b, options.small)
    results = {name: timed(check) for name, check in checks.items()}
    table = Table("check", "", "what was found", "seconds")
    for name, result in results.items():
        table.add_row(name, "ok" if result["well"] else "FAILED", result["found"], f"{result['seconds']:.0f}")
    Console(width=120).print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if options.out:
        content = {"device": device, "torch": torch.__version__, "checks": results}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not all(result["well"] for result in results.values()))


def timed(check: Callable[[], Finding]) -> dict[str, Any]:
    """What a check found; one that cannot be made fails, and the others go on."""
    began = time.monotonic()
    try:
        well, found, numbers = check()
    except subprocess.CalledProcessError as error:
        well, found, numbers = False, " ".join((error.stderr or error.stdout or str(error)).split())[-300:], None
    return {"well": well, "found": found, "numbers": numbers, "seconds": time.monotonic() - began}


def selftest(precision: str) -> Finding:
    """Gradients, weights, resuming, numbers that are not finite."""
    done = python("-m", "ldm", "selftest", "--precision", precision)
    return True, "all of it", done.stdout.splitlines()


def curves() -> Finding:
    """The base on the CPU in fp32, and here in fp32 and bf16."""
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder, "pictures"))
        expected = losses(Path(folder), "cpu", "no", ACCELERATE_USE_CPU="true")
        found = {precision: losses(Path(folder), precision, precision) for precision in ("no", "bf16")}
    far = {name: distance(own, expected) for name, own in found.items()}
    well = far["no"] < NEAR and far["bf16"] < NEAR_16_BIT
    return well, f"at most {far['no']:.1e} away in fp32, {far['bf16']:.1e} in bf16", {"cpu": expected, **found}


def memory() -> Finding:
    """A run with too little memory takes smaller parts, and its losses are the same."""
    changes = {"base__sizes": [{"size": 256}], "base__batch": 64}
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder, "pictures"))
        expected = losses(Path(folder), "whole", "no", **changes)
        peak = int((Path(folder) / "whole.peak").read_text())
        found = losses(Path(folder), "cut", "no", limit=int(ROOM * peak), **changes)
        said = (Path(folder) / "cut.log").read_text()
    far = distance(found, expected)
    cut = said.count("out of memory with")
    return cut > 0 and far < NEAR, f"cut {cut} times, losses at most {far:.1e} away", {"peak": peak, "limit": ROOM}


def distance(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def losses(folder: Path, name: str, precision: str, limit: int | None = None, **changes: Any) -> list[float]:
    """Of a run in a process of its own, whose messages stay in `name.log`; capitals are its environment."""
    environment = {key: changes.pop(key) for key in list(changes) if key.isupper()}
    settings = Ground(folder, precision, 8).config(
        name, stages=["base"], base__steps=STEPS, base__save_every=STEPS, **changes
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    limited = ["--memory", str(limit)] if limit else []
    done = python(str(HERE / "check_gpu.py"), "--run", str(path), *limited, **environment)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    rows = [json.loads(line) for line in (folder / name / "base" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/unet"] for row in rows if "loss/unet" in row]


def run_here(path: Path, limit: int | None) -> None:
    """Train in this process, with so many bytes of the GPU's memory; note the most that was used."""
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    train(load(path, []))
    if torch.cuda.is_available():
        path.with_suffix(".peak").write_text(str(torch.cuda.max_memory_reserved()), encoding="utf-8")


def steps(family: str, size: int, batch: int, once: bool) -> Finding:
    """Ours beside diffusers' example script's, in bf16."""
    options = ["--family", family, "--size", str(size), "--batch", str(batch), "--precision", "bf16"]
    done = python(
        str(HERE / "measure_training.py"), *options, "--steps", "1" if once else "5", "--rounds", "1" if once else "2"
    )
    said, numbers = done.stdout.splitlines()[-2:]
    return True, said, json.loads(numbers)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that must succeed."""
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, check=True
    )


if __name__ == "__main__":
    main()
