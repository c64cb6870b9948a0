"""Cold starts: time and memory of a new process that makes an image, and its phases."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.bench.options import OURS, PROMPT
from ldm.errors import LdmError, first_line

WATCHED = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # run in a small process, because the peak memory of a forked child starts at that of its parent
TIMED = """
import sys, time
began = time.perf_counter()
{imports}
imported = time.perf_counter()
model = {loads}
print(imported - began, time.perf_counter() - imported)
"""


@dataclass(frozen=True)
class Cold:
    """Time and memory of a new process, from the command to the image."""

    seconds: float
    memory: float  # peak resident memory, GB
    imports: float  # seconds of importing, measured in another new process that only loads the model
    load: float


def cold_starts(path: Path, rounds: int, device: str, quantize: str | None = None) -> dict[str, list[Cold]]:
    """Measure new processes that make an image: `ldm generate`, and a script that uses diffusers."""
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


def phase_seconds(path: Path, rounds: int, device: str, quantize: str | None = None) -> list[dict[str, float]]:
    """The seconds of each phase of `ldm generate` in new processes (`ldm.bench.phases`), after one that is not counted.

    Raises:
        LdmError: a process fails.
    """
    found = []
    more = ["--device", device, *([] if quantize is None else ["--quantize", quantize])]
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder, "image.png"))
        command = ["generate", PROMPT, "--model", str(path), "--steps", "20", "--out", image, *more]
        for _ in range(rounds + 1):
            said = last_line(OURS, ["-m", "ldm.bench.phases", str(time.monotonic()), *command])
            end = time.monotonic()
            told = json.loads(said)
            found.append({**told["phases"], "exit": end - told["ended"]})
    return found[1:]


def printed(name: str, command: Sequence[str]) -> list[float]:
    """Run a Python program in a new process; returns the numbers in its last line of output.

    Raises:
        LdmError: the process fails.
    """
    return [float(number) for number in last_line(name, ["-c", *command]).split()]


def last_line(name: str, arguments: Sequence[str]) -> str:
    """Run Python with these arguments in a new process; returns its last line of output.

    Raises:
        LdmError: the process fails.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = first_line(RuntimeError("\n".join(done.stderr.strip().splitlines()[-1:])))
        raise LdmError(f"a new process of {name} failed: {last}")
    return done.stdout.split("\n")[-2]
