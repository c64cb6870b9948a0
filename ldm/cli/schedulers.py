"""`ldm schedulers`: lists the schedulers and their spacings."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Column, Table

from ldm.sampling.scheduler_names import OTHER_SPACINGS, other_names
from ldm.sampling.schedulers import LEVELS, SCHEDULERS, SPACINGS, spacings


def print_schedulers(as_json: bool) -> None:
    """Print each scheduler with its class in diffusers, its other names and its spacings, and the spacings' names."""
    rows = {
        name: {"class": kind, "names": other_names(name), "spacings": spacings(name)}
        for name, (kind, _) in SCHEDULERS.items()
    }
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    every = [*SPACINGS, *LEVELS]
    names = Column("other names, diffusers' class first", min_width=35)
    table = Table("scheduler", names, "spacings", box=None, padding=(0, 2, 0, 0))
    for name, row in rows.items():
        found = dict.fromkeys([str(row["class"]), *row["names"]])
        table.add_row(name, ", ".join(found), "all" if row["spacings"] == every else " ".join(row["spacings"]))
    spaced = Table("spacing", "other names", box=None, padding=(0, 2, 0, 0))
    for name in every:
        spaced.add_row(
            name, ", ".join(OTHER_SPACINGS.get(name, ("your own noise levels, as --spacing 14.6,7,3,1,0.1",)))
        )
    Console().print(table)
    print()
    Console().print(spaced)
    print('\nA spacing may stand at the end of a name: --scheduler "DPM++ 2M Karras".')
