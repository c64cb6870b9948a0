"""`ldm info`: describes a model by names, shapes and configurations; weights are read only with --verify."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldm.cli.common import SourceOptions, is_family, progress
from ldm.errors import LdmError
from ldm.families import FAMILIES, Family
from ldm.models.unfilled import unfilled
from ldm.weights.components import Opened, build
from ldm.weights.sources import verify_source


def print_description(source: str, as_json: bool, verify: bool, options: SourceOptions) -> None:
    """Print the description of a source or of a family."""
    if is_family(source):
        if verify or replace(options, allow_pickle=False) != SourceOptions():
            raise LdmError(f"{source} is a family, not a model: leave the other options out")
        report = describe_family(FAMILIES[source])
    else:
        with progress() as bar:
            opened = options.open(source, verify=False, report=bar)
            report = describe(opened)
            if verify:
                report["verified"] = verify_source(opened, bar)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def describe(opened: Opened) -> dict[str, Any]:
    """The description of a model on disk, as `ldm info --json` prints it."""
    components = {}
    for name, module in opened.components.modules().items():
        infos = opened.infos(name).values()
        types = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
        components[name] = {
            "class": type(module).__name__,
            "parameters": sum(info.numel for info in infos),
            "dtype": " and ".join(sorted(types)),
            "bytes": sum(info.nbytes for info in infos),
        }
    return {
        "source": opened.source,
        "layout": opened.layout,
        **_family(opened.family),
        "components": components,
        "unused": opened.ignored,
    }


def describe_family(family: Family) -> dict[str, Any]:
    """The description of the released models of a family, as far as it is known without weights."""
    with unfilled():
        modules = build(family).modules()
    components = {
        name: {"class": type(module).__name__, "parameters": sum(p.numel() for p in module.parameters())}
        for name, module in modules.items()
    }
    return {"source": family.name, "layout": "family", **_family(family), "components": components, "unused": []}


def _family(family: Family) -> dict[str, Any]:
    return {
        "family": family.name,
        "task": family.task,
        "image_size": family.size,
        "prediction_type": family.schedule.prediction_type,
        "scheduler": family.schedule.scheduler,
        "zero_terminal_snr": family.schedule.zero_terminal_snr,
        "latent_channels": family.autoencoder.latent_channels,
        "scaling_factor": family.autoencoder.scaling_factor,
        **({"few_steps": str(family.few_step)} if family.few_step else {}),
    }


def _print(report: dict[str, Any]) -> None:
    console = Console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in ("source", "layout", "family", "task", "image_size", "prediction_type", "scheduler", "few_steps"):
        if name in report:
            facts.add_row(name.replace("_", " "), Text(str(report[name])))
    for name in ("unused", "verified"):
        for number, line in enumerate(report.get(name, [])):
            facts.add_row("" if number else name, Text(line))
    console.print(facts)
    table = Table("component", "class", "parameters", "dtype", "MB", box=None, padding=(0, 2, 0, 0))
    for name, part in report["components"].items():
        size = f"{part['bytes'] / 1e6:,.1f}" if "bytes" in part else ""
        table.add_row(name, part["class"], f"{part['parameters']:,}", part.get("dtype", ""), size)
    total = sum(part["parameters"] for part in report["components"].values())
    table.add_row("total", "", f"{total:,}", "", "")
    console.print(table)
