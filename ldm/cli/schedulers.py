"""`ldm schedulers`: lists the schedulers and their spacings."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from ldm.sampling.schedulers import SCHEDULERS, spacings


def print_schedulers(as_json: bool) -> None:
    """Print each scheduler with its class in diffusers and its spacings."""
    rows = {name: {"class": kind, "spacings": spacings(name)} for name, (kind, _) in SCHEDULERS.items()}
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("scheduler", "diffusers' class", "spacings", box=None, padding=(0, 2, 0, 0))
    for name, row in rows.items():
        table.add_row(name, str(row["class"]), " ".join(row["spacings"]))
    Console().print(table)
