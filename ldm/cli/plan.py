"""`ldm plan`: forecasts the memory, operations and time of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import NUMBERS, load

if TYPE_CHECKING:
    from ldm.training.forecast import Forecast


def print_forecast(config: str, overrides: Sequence[str], processes: int, measured: int, as_json: bool) -> None:
    """Print the forecast of each stage and, after `measured` real steps of the first one, the time it will take."""
    settings = load(config, overrides)
    check_bounds(settings)
    if measured:
        check_paths(settings)
    from ldm.training.forecast import forecast  # PyTorch, only now that there is something to forecast
    from ldm.training.precision import resolved, run_device

    device = run_device()
    wanted, settings = settings.precision, resolved(settings, device)
    rows = forecast(settings, processes)
    found = None
    if measured:
        from ldm.training.measure import measure

        found = measure(settings, measured)
    if as_json:
        print(json.dumps({"precision": settings.precision,
                          "forecast": [asdict(row) | {"memory": row.memory} for row in rows],
                          "measured": found and asdict(found)}, indent=2))  # fmt: skip
        return
    for row in rows:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        work = row.flops_per_step * row.steps / 1e15
        for name, text in {
            "stage": f"{row.stage} at {row.size} pixels, {row.steps} steps",
            "batch": f"{row.batch}, {row.micro_batch} at a time on {processes} devices",
            "precision": _precision(wanted, settings.precision, device.type),
            "parameters": f"{_number(row.trained)} trained, {_number(row.frozen)} frozen",
            "memory": f"{row.memory / 1e9:.1f} GB on each device, predicted: {_memory(row)}",
            "work": f"{row.flops_per_image / 1e12:.3g} TFLOP an image, {work:.3g} PFLOP in all",
        }.items():
            table.add_row(name, text)
        Console(soft_wrap=True).print(table)
    if found:
        use = f", {100 * found.use:.0f} % of what the device can do" if found.use else ""
        peak = f", {found.peak_bytes / 1e9:.1f} GB of GPU memory" if found.peak_bytes else ""
        print(
            f"measured, {rows[0].stage}: {found.seconds_per_step:.3g} s a step, "
            f"{found.images_per_second:.3g} images/s, "
            f"{100 * found.waiting:.0f} % waiting for data, {found.tflops:.3g} TFLOP/s{use}{peak}: "
            f"{found.hours:.3g} hours for all its steps"
        )


def _precision(wanted: str, precision: str, device: str) -> str:
    """The precision, and for `auto` why."""
    if wanted != "auto":
        return NUMBERS[precision]
    other = "; for one that computes in bf16, add precision=bf16" if precision == "no" else ""
    return f"{NUMBERS[precision]} on this machine's {device} (auto{other})"


def _number(parameters: int) -> str:
    """A number of parameters, in millions if there are so many."""
    return f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters:,}"


def _memory(row: Forecast) -> str:
    names = ("weights", "gradients", "optimizer", "averages", "activations")
    told = ", ".join(f"{name} {getattr(row, name) / 1e9:.1f}" for name in names)
    instead = f"; for previews {row.previews / 1e9:.1f} in place of gradients and activations" if row.previews else ""
    return told + instead
