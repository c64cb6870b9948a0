"""A measurement of `ldm bench` compared with an earlier one of the same work, which `--out` wrote.

The ratio of two sets of times is the median over all pairs of a later and an earlier one (Hodges and Lehmann 1963), and
its interval the one of 95 % that belongs to the test of Mann and Whitney (with fewer than four rounds, all pairs').
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ldm.bench.measuring import STAGES, Seconds
from ldm.bench.options import OURS
from ldm.errors import LdmError
from ldm.files import read_json

NOISE = 0.05  # by which two measurements of the same code may differ
WORK = ("source", "steps", "batch", "compile", "quantize")  # options that say what is measured


@dataclass(frozen=True)
class Measurement:
    """What was measured, where and with what, and the times of each side."""

    work: Mapping[str, Any]  # the options `WORK`, and dtype and size
    device: str
    versions: Mapping[str, str]
    seconds: Mapping[str, Sequence[Seconds]]


@dataclass(frozen=True)
class TimeChange:
    """The time of a stage of a side, earlier and now: medians, and their ratio with its interval."""

    side: str
    stage: str
    before: float
    now: float
    ratio: float
    low: float
    high: float


def measured(result: Mapping[str, Any]) -> Measurement:
    """A measurement from its JSON form."""
    work = {name: result["options"][name] for name in WORK} | {name: result[name] for name in ("dtype", "size")}
    seconds = {side: [Seconds(**row) for row in rows] for side, rows in result.get("seconds", {}).items()}
    return Measurement(work, result["device"], result["versions"], seconds)


def read_measured(path: Path) -> Measurement:
    """The measurement in a file that `ldm bench --out` wrote.

    Raises:
        LdmError: the file cannot be read, or is another one.
    """
    result = read_json(path)
    if problem := _problem(result):
        raise LdmError(f"--compare {path}: no measurement of `ldm bench --out`: {problem}")
    return measured(result)


def _problem(result: Mapping[str, Any]) -> str | None:
    """What keeps JSON from being a measurement with times of ours."""
    kinds = {"options": dict, "device": str, "versions": dict, "seconds": dict, "dtype": str, "size": list}
    for name, kind in kinds.items():
        if not isinstance(result.get(name), kind):
            return f"it has no {name}"
    if missing := [name for name in WORK if name not in result["options"]]:
        return f"its options have no {missing[0]}"
    if not result["seconds"].get(OURS):
        return f"it has no times of {OURS}"
    for side, rows in result["seconds"].items():
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            return f"the times of {side} are none"
    return None


def _is_row(row: Any) -> bool:
    """Whether JSON is the times of a call."""
    return (
        isinstance(row, dict)
        and row.keys() == set(STAGES)
        and all(isinstance(time, float | int) and math.isfinite(time) and time > 0 for time in row.values())
    )


def check_same_work(before: Measurement, now: Measurement, path: str) -> None:
    """Raises LdmError if two measurements are of different work."""
    for name, value in now.work.items():
        if before.work[name] != value:
            raise LdmError(f"--compare {path}: measured with {name} {before.work[name]}, and this is {value}")


def other_conditions(before: Measurement, now: Measurement) -> list[str]:
    """What else differs, a line each: the machine, its threads and how they wait, and versions of packages."""
    lines = [f"then on {before.device}, now on {now.device}"] if before.device != now.device else []
    for name in sorted({*before.versions, *now.versions}):
        then, here = before.versions.get(name, "none"), now.versions.get(name, "none")
        if then != here:
            lines.append(f"then with {name} {then}, now with {here}")
    return lines


def changes(before: Measurement, now: Measurement) -> list[TimeChange]:
    """The changes of all sides that both measurements have, stage by stage."""
    found = []
    for side in (side for side in now.seconds if before.seconds.get(side)):
        for stage in STAGES:
            then, here = ([getattr(row, stage) for row in one.seconds[side]] for one in (before, now))
            found.append(TimeChange(side, stage, median(then), median(here), *ratio(then, here)))
    return found


def ratio(before: Sequence[float], now: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of later to earlier times, and the two ends of its interval."""
    pairs = sorted(later / earlier for earlier in before for later in now)
    spread = math.sqrt(len(pairs) * (len(before) + len(now) + 1) / 12)
    cut = max(int(len(pairs) / 2 - 1.96 * spread) - 1, 0)
    return median(pairs), pairs[cut], pairs[-1 - cut]


def slower(before: Measurement, now: Measurement, found: Sequence[TimeChange]) -> list[TimeChange]:
    """The stages of ours that are slower beyond noise, and beyond what another side with the same packages lost.

    Such a side does the same as before, so that it is the machine that has become slower.
    """
    own = [one for one in found if one.side == OURS]
    others = [one for one in found if one.side != OURS and before.versions == now.versions]
    lost = {stage: min((one.ratio for one in others if one.stage == stage), default=1.0) for stage in STAGES}
    return [one for one in own if one.low > (1 + NOISE) * max(1.0, lost[one.stage])]
