"""`ldm bench`: the speed of generation compared with diffusers, for equal weights, prompts, steps and noise schedule.

Each side runs in its own process, as it does for its users. The sides alternate, one image each, so that other load on
the machine slows all sides equally.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ldm.bench.cold import cold_starts, phase_seconds
from ldm.bench.comparison import (
    Measurement,
    changes,
    check_same_work,
    measured,
    other_conditions,
    read_measured,
    slower,
)
from ldm.bench.measuring import Seconds, device_name, others_busy, products, speed
from ldm.bench.options import OURS, RIVALS, BenchOptions, Call
from ldm.bench.processes import SideProcess
from ldm.bench.sides import named_family
from ldm.bench.tables import change_table, cold_table, phases_table, speed_tables
from ldm.errors import LdmError
from ldm.files import replacing, write_json
from ldm.weights.builtin import builtin
from ldm.weights.sources import open_source
from pipelines.settings import find
from pipelines.tuning import default_device, default_dtype, device_named, dtype_named

log = logging.getLogger(__name__)
BUSY = 0.2  # cores that other processes keep busy, above which a warning is given


def measure(options: BenchOptions) -> None:
    """Measure all sides and print tables; all numbers are written as JSON to `options.out`, if it is given.

    Raises:
        LdmError: an option is not valid, or a call fails (if a rival's first call fails, the rival is only left out);
            or ours is slower than in the measurement `options.compare`.
    """
    rivals = _rivals(options)
    before = read_measured(Path(options.compare)) if options.compare else None
    path = builtin(options.source) or Path(options.source)
    if options.cold and not path.is_dir():
        raise LdmError(f"--cold needs a model folder, and {options.source} is not one")
    device = device_named(options.device or default_device())
    dtype = dtype_named(options.dtype) or default_dtype(device)
    family = named_family(options.source) or open_source(options.source, verify=False).family
    width, height = find("size", "shell").parse(options.size, "--size") if options.size else (family.size,) * 2
    call = Call(width, height, options.batch, family.guidance)
    result: dict[str, Any] = {
        "options": asdict(options), "device": device_name(device), "dtype": str(dtype), "size": [width, height],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }  # fmt: skip
    if before:
        check_same_work(before, measured(result), str(options.compare))
    console, busy = Console(), others_busy()
    console.print(device_name(device), highlight=False, soft_wrap=True)
    if busy is not None and busy > BUSY:
        log.warning("other processes keep %.1f cores busy: these are not the figures of a quiet machine", busy)
    result["others busy"] = busy
    factor = family.autoencoder.factor
    work = 2 * call.batch * products(family, call.height // factor, call.width // factor)
    sides = _started([OURS, *rivals], options, call, device, dtype)
    console.print(*_in_turns(sides, options, device, dtype, work, result))
    if options.cold:
        cold = cold_starts(path, options.rounds, str(device), options.quantize)
        result["cold"] = {name: [asdict(one) for one in rows] for name, rows in cold.items()}
        result["phases"] = phase_seconds(path, options.rounds, str(device), options.quantize)
        console.print(cold_table(cold), phases_table(result["phases"]))
        _write(options.out, result)
    if before:
        _compare(before, measured(result), console)


def _rivals(options: BenchOptions) -> list[str]:
    """The other sides, after a check of the options that need no model."""
    rivals = [name.strip() for name in options.against.split(",") if name.strip()]
    if unknown := [name for name in rivals if name not in RIVALS]:
        raise LdmError(f"--against {unknown[0]!r} is not known; choose from {', '.join(RIVALS)}")
    if min(options.steps - 1, options.rounds, options.batch) < 1:
        raise LdmError("--steps must be at least 2, --rounds and --batch at least 1")
    return rivals


def _in_turns(
    sides: dict[str, SideProcess],
    options: BenchOptions,
    device: torch.device,
    dtype: torch.dtype,
    work: int,
    result: dict[str, Any],
) -> tuple[Table, Table]:
    """Let the sides make images in turns, and add the times to the result; returns their tables.

    `work` is the number of floating-point operations of a step.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    fastest = 0.0
    for number in range(options.rounds + 1):
        fastest = max(fastest, speed(device, dtype))
        for name in list(found):
            try:
                seconds, memory[name] = sides[name].image(options.steps)
            except LdmError as error:
                if name == OURS or number:
                    raise
                log.warning("without %s: %s", name, error)  # for example, OpenVINO does not run every model
                del found[name]
                continue
            if number:  # the first round is a warm-up
                found[name].append(seconds)
        if number:
            result["limit of a step"], result["memory"] = work / fastest, memory
            result["seconds"] = {name: [asdict(one) for one in rows] for name, rows in found.items()}
            _write(options.out, result)
    return speed_tables(found, memory, work / fastest)


def _compare(before: Measurement, now: Measurement, console: Console) -> None:
    """Print how the times have changed.

    Raises:
        LdmError: ours is slower, on the same machine.
    """
    found, others = changes(before, now), other_conditions(before, now)
    for line in others:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(change_table(found))
    stages = [f"{one.stage} {one.ratio:.2f} ({one.low:.2f}–{one.high:.2f}) ×" for one in slower(before, now, found)]
    if stages and before.device == now.device:
        raise LdmError(f"slower than before: {', '.join(stages)}")
    if before.device != now.device:
        console.print("the machine or its threads are not the same: this is no test of the program")
    else:
        console.print("not slower than before")


def _started(
    names: list[str], options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype
) -> dict[str, SideProcess]:
    """Start the processes of all sides and wait until their models are loaded.

    On a CPU they are started one after the other, because loading needs the most memory, and the sides share it.
    """
    together = device.type == "cuda"
    sides: dict[str, SideProcess] = {}
    for name in names:
        sides[name] = SideProcess(name, options, call, device, dtype)
        if not together:
            sides[name].wait()
    if together:
        for side in sides.values():
            side.wait()
    return sides


def _write(out: str | None, result: dict[str, Any]) -> None:
    """Write all numbers so far as JSON to `out`, if it is given."""
    if out:
        with replacing(Path(out), folder=False, overwrite=True, need=0) as temporary:
            write_json(temporary, result)
