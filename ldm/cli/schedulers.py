"""`ldm schedulers`: lists the schedulers and their spacings."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from ldm.sampling.scheduler_names import OTHER_SPACINGS, other_names
from ldm.sampling.schedulers import SCHEDULERS, spacings


def print_schedulers(as_json: bool) -> None:
    """Print each scheduler with its class in diffusers, its other names and its spacings, and the spacings' names."""
    rows = {
        name: {"class": kind, "names": other_names(name), "spacings": spacings(name)}
        for name, (kind, _) in SCHEDULERS.items()
    }
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("scheduler", "diffusers' class", "other names", "spacings", box=None, padding=(0, 2, 0, 0))
    for name, row in rows.items():
        others = [other for other in row["names"] if other != row["class"]]
        table.add_row(name, str(row["class"]), ", ".join(others), " ".join(row["spacings"]))
    spaced = Table("spacing", "other names", box=None, padding=(0, 2, 0, 0))
    for name, names in OTHER_SPACINGS.items():
        spaced.add_row(name, ", ".join(other for other in names if other.lower() != name))
    Console().print(table)
    print()
    Console().print(spaced)
    print('\nA spacing may stand at the end of a name: --scheduler "DPM++ 2M Karras".')
