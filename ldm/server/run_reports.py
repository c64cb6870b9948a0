"""The reports of evaluations in a run's folder: found by listing, and their figures as text, as the reports have them.

Reports of `ldm eval` lie in the folder itself, those made while a stage trains in
`STAGE/evaluation/step-…/AVERAGE/`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ldm.errors import LdmError
from ldm.evaluation.checks import SIDES
from ldm.evaluation.metrics.comparison import Comparison
from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.pages.words import lines
from ldm.evaluation.report import PAGE, REPORT, Row
from ldm.server.runs import RunFolder, hidden, listed, opened, opens
from ldm.training.layout import EVALUATION

FOUND = 300  # reports of a run
REPORT_BYTES = 2**24
PAGE_BYTES = 2**26
PARTS = 500  # tables of a report, rows of a table, notes
TEXT = 2000  # characters of a text
T = TypeVar("T")


@dataclass(frozen=True)
class RunReport:
    """A report of a run."""

    root: Path  # as of `RunFolder`
    folder: Path
    name: str  # for readers
    step: int | None = None  # of the stage in training

    @property
    def id(self) -> str:
        """The name that clients use."""
        return hidden(self.folder.relative_to(self.root))

    def described(self) -> dict[str, Any]:
        """Its names as JSON, and whether there is a page."""
        return {"id": self.id, "name": self.name, "step": self.step, "page": opens(self.root, self.folder / PAGE)}

    def figures(self) -> dict[str, Any]:
        """What was evaluated, and the tables of figures, as text.

        Raises:
            LdmError: the report is damaged, too large, or of another version.
        """
        try:
            content = json.loads(self._read(REPORT, REPORT_BYTES))
        except (ValueError, RecursionError):
            raise LdmError("the report is damaged: it is not valid JSON") from None
        try:
            names = [str(one["name"])[:TEXT] for one in content["sides"]][: len(SIDES)]
            return {
                "sides": [_side(one) for one in content["sides"][: len(SIDES)]],
                "reference": None if content.get("reference") is None else _side(content["reference"]),
                "tables": [_table(one, names) for one in content["tables"][:PARTS]],
                "notes": [str(one)[:TEXT] for one in content.get("notes", ())][:PARTS],
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise LdmError("the report is of another version of ldm, or damaged; its page may still open") from None

    def page(self) -> bytes:
        """The report's page, HTML.

        Raises:
            LdmError: there is none, or it is too large.
        """
        return self._read(PAGE, PAGE_BYTES)

    def _read(self, name: str, most: int) -> bytes:
        file = opened(self.root, self.folder / name)
        if file is None:
            raise LdmError(f"the report has no {name} any more")
        with file:
            data = file.read(most + 1)
        if len(data) > most:
            raise LdmError(f"{name} of the report has more than {most:,} bytes; that is no report")
        return data


def reports(run: RunFolder) -> list[RunReport]:
    """The reports of a run: its own, then those of its stages, the latest step first."""
    found = [RunReport(run.root, run.path, "ldm eval")] if opens(run.root, run.path / REPORT) else []
    for stage in run.stages():
        for step, name in sorted(stage.by_step(EVALUATION).items(), reverse=True)[:FOUND]:
            for entry in sorted(listed(stage.path / EVALUATION / name), key=lambda entry: entry.name):
                place = Path(entry.path)
                if opens(run.root, place / REPORT):
                    average = place.name.encode("utf-8", "replace").decode()
                    found.append(RunReport(run.root, place, f"{stage.path.name}, step {step:,}, {average}", step))
    return found[:FOUND]


def _side(content: Mapping[str, Any]) -> dict[str, Any]:
    """What was evaluated, without the place of its files."""
    source = str(content["source"])[-TEXT:]
    settings = {str(name)[:TEXT]: str(value)[:TEXT] for name, value in dict(content.get("settings") or {}).items()}
    return {
        "name": str(content["name"])[:TEXT],
        "source": source.rstrip("/").rpartition("/")[2],
        "count": int(content["count"]),
        "settings": dict(list(settings.items())[:PARTS]),
    }


def _table(content: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    network = content.get("extractor")
    return {
        "heading": str(network["name"])[:TEXT] if network else "Pixels",
        "rows": [_row(one, names) for one in content["rows"][:PARTS]],
    }


def _row(content: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The figures of a metric as lines of text, with as many digits as their intervals justify."""
    compared = content.get("comparison")
    row = Row(
        metric=str(content["metric"])[:TEXT],
        label=str(content["label"])[:TEXT],
        better=str(content["better"])[:TEXT],
        estimates=tuple(_numbers(Estimate, one) for one in content["estimates"][: len(names)]),
        comparison=None if compared is None else _numbers(Comparison, compared),
        verdict=str(content.get("verdict", ""))[:TEXT],
        difference=str(content.get("difference", "A − B"))[:TEXT],
    )
    return {
        "label": row.label,
        "better": row.better,
        "lines": [dataclasses.asdict(line) for line in lines(row, names)],
        "verdict": row.verdict,
        "notes": sorted({one.note for one in row.estimates if one.note}),
    }


def _numbers(kind: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass of numbers, and of notes, from JSON; what this version does not know is left out."""
    given: dict[str, Any] = {}
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]
        if one.name == "note":
            given[one.name] = str(content.get("note", ""))[:TEXT]
            continue
        value = content[one.name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError
        if value is not None and not (math.isfinite(value) and abs(value) < 1e300):
            raise ValueError
        given[one.name] = value
    if given.get("count") is None or given.get("value", 0) is None:
        raise ValueError
    return kind(**given)
