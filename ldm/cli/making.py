"""The images of `ldm generate`: made batch by batch, saved as PNG files, and shared among processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.cli.common import counter, log_warnings
from ldm.cli.generate import Options, Work
from ldm.cli.saving import Saver
from ldm.conditions.table import check_kind
from ldm.images import load_image, save_png
from ldm.launch import processes, rank
from ldm.sheets import grid
from ldm.weights.components import Opened
from pipelines import Pipeline
from pipelines.a1111 import to_parameters
from pipelines.axes import sheet_labels
from pipelines.comparison import Comparison, check_sheet
from pipelines.control_images import control_images
from pipelines.groups import Group, checked_groups, images_of
from pipelines.jobs import IMAGES, Job, by_loading
from pipelines.planned import planned
from pipelines.provenance import provenance
from pipelines.request import records
from pipelines.tuning import typed


def make_images(options: Options, work: Work) -> None:
    """Make the images that are not there yet; print a path (or JSON) for each on stdout."""
    log_warnings()
    for name, mode in IMAGES:
        if name in options.settings:
            load_image(options.settings[name], mode)  # errors come before a model is loaded
    for one in control_images(options.settings.get("control")):
        check_kind(one.kind)
    if options.dry_run:
        print(json.dumps(_describe(options, work), indent=2, default=str))
        return
    if len(parts := by_loading(work.jobs)) > 1:
        for part in parts:  # those of the last model are right, too, before the first one's are made
            list(checked_groups(planned({**options.loading, **dict(part[0].loading)})[1], options.common, part))
    sheet = Comparison(*sheet_labels(options.xy)) if options.xy else None
    made: list[Image.Image] = []
    try:
        with counter("images", -(-len(work.left) // processes())) as advance, Saver() as saver:
            for part in parts:
                for job, image, record in _part(options, part, work.left, sheet):
                    if sheet:
                        sheet.images[job.index], sheet.settings[job.index] = image, record
                    if options.sheet:
                        made.append(image)
                    if work.targets:
                        _save(saver, options, work.targets[job.index], image, record, advance)
                    else:
                        advance()
    finally:
        if sheet and sheet.images and work.sheet:
            _save_sheet(options, work.sheet, sheet)
    if made and not sheet:
        path = work.targets[work.jobs[0].index].with_name("grid.png")
        save_png(grid(made), path)
        print(path)


def _part(
    options: Options, jobs: list[Job], left: set[int], sheet: Comparison | None
) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
    """The images of one model that this process makes, each with its whole record."""
    loading = {**options.loading, **dict(jobs[0].loading)}
    pipeline = _pipeline(loading, processes())
    groups = list(checked_groups(pipeline, options.common, jobs))
    if sheet:
        check_sheet(groups, sheet)
    about = provenance(loading, pipeline)
    for job, image, record in images_of(pipeline, groups, left, rank(), processes()):
        yield job, image, {**record, **about}


def _save(
    saver: Saver, options: Options, target: Path, image: Image.Image, record: dict[str, Any],
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Save an image in a thread, and tell of it."""
    path = target if options.prompts_file else _free(target, options.out)

    def tell() -> None:
        print(json.dumps({"path": str(path), **record}) if options.as_json else path, flush=True)
        advance()

    saver.save(image.width * image.height, lambda: save_png(image, path, record, to_parameters(record)), tell)


def _save_sheet(options: Options, target: Path, sheet: Comparison) -> None:
    """Save the sheet of a comparison with the cells that are made; say on stderr how many, if some are not."""
    path, record = _free(target, options.out), sheet.record()
    save_png(sheet.sheet(), path, record)
    print(json.dumps({"path": str(path), **record}) if options.as_json else path, flush=True)
    if len(sheet.images) < sheet.count:
        print(f"ldm: the sheet has {len(sheet.images)} of {sheet.count} images", file=sys.stderr)


def _pipeline(loading: dict[str, Any], world: int) -> Pipeline:
    """The pipeline of the settings of loading; each of several processes has a GPU of its own."""
    own = {"device": f"cuda:{os.environ.get('LOCAL_RANK', 0)}"} if world > 1 and torch.cuda.is_available() else {}
    return Pipeline(**typed({**own, **loading}))


# --- output files -----------------------------------------------------------------------------------------------------


def _free(target: Path, out: str) -> Path:
    """The target, or the next free number if another run has written it; a file named by --out is replaced."""
    while target != Path(out) and target.exists():
        number, _, rest = target.name.partition("-")
        target = target.with_name(f"{int(number) + 1:05d}-{rest}")
    return target


def _describe(options: Options, work: Work) -> dict[str, Any]:
    """The plan that `--dry-run` prints. Everything is checked, but no weights are loaded."""
    described: dict[str, Any] = {}
    for jobs in by_loading(work.jobs):  # the first is described
        opened, pipeline = planned({**options.loading, **dict(jobs[0].loading)})
        groups = list(checked_groups(pipeline, options.common, jobs))
        described = described or _described(options, work, opened, groups[0])
    return described


def _described(options: Options, work: Work, opened: Opened, group: Group) -> dict[str, Any]:
    """The plan of a model's images, of which a group is the first."""
    from ldm.cli.info import describe

    request, family = group.request, opened.family
    (record,) = records(request.part(slice(1)), family)
    files = {name: group.settings[name] for name, _ in IMAGES if name in group.settings}
    return {
        "model": describe(opened),
        "settings": {name: value for name, value in record.items() if name not in ("prompt", "seed")} | files,
        "timesteps": [round(float(t), 2) for t in request.plan(family.schedule, family.xl).timesteps],
        "images": len(work.jobs),
        "left_to_make": len(work.left),
        **(
            {"columns": list(axes[0]), "rows": list(axes[1])}
            if (axes := options.xy and sheet_labels(options.xy))
            else {}
        ),
        "first": {"prompt": work.jobs[0].prompt, "seed": work.jobs[0].seed},
    }
