"""The images of `ldm generate`: made batch by batch, saved as PNG files, and shared among processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.cli.common import counter, log_warnings
from ldm.cli.generate import Options, Work
from ldm.cli.saving import Saver
from ldm.conditions.table import check_kind
from ldm.images import load_image, save_file
from ldm.launch import processes, rank
from ldm.sheets import grid
from ldm.weights.components import Opened
from pipelines import Pipeline
from pipelines.axes import sheet_labels
from pipelines.comparison import Sheet, check_sheet
from pipelines.control_images import control_images
from pipelines.finishing import Finishing
from pipelines.groups import Group, images_by_model, planned_groups
from pipelines.jobs import IMAGES
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
    plans = planned_groups(work.jobs, options.common, options.loading) if options.xy or options.dry_run else []
    sheet = Sheet(*sheet_labels(options.xy)) if options.xy else None
    if sheet:
        check_sheet(sheet, [group for _, groups in plans for group in groups])
    if options.dry_run:
        print(json.dumps(_described(options, work, *plans[0]), indent=2, default=str))
        return
    made: list[Image.Image] = []
    finishing = Finishing(options.loading.get("watermark"), c2pa=work.signer)  # of files
    loading = {name: value for name, value in options.loading.items() if name != "c2pa"}  # pipelines sign nothing
    images = images_by_model(_pipeline, options.common, loading, work.jobs, work.left, rank(), processes())
    try:
        with counter("images", -(-len(work.left) // processes())) as advance, Saver() as saver:
            for job, image, record in images:
                if sheet:
                    sheet.images[job.index], sheet.settings[job.index] = image, record
                if options.sheet:
                    made.append(image)
                if work.targets:
                    _save(saver, finishing, options, work.targets[job.index], image, record, advance)
                else:
                    advance()
    finally:
        if sheet and work.sheet and sheet.images:
            _save_sheet(finishing, options, work.sheet, sheet)
    if made:
        path = work.targets[work.jobs[0].index].with_name("grid.png")
        save_file(finishing.encoded(finishing.marked(grid(made))), path)
        print(path)


def _save(
    saver: Saver, finishing: Finishing, options: Options, target: Path, image: Image.Image, record: dict[str, Any],
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Save an image in a thread, and tell of it."""
    path = target if options.prompts_file else _free(target, options.out)

    def tell() -> None:
        _tell(options, path, record)
        advance()

    saver.save(image.width * image.height, lambda: save_file(finishing.encoded(image, record), path), tell)


def _save_sheet(finishing: Finishing, options: Options, target: Path, sheet: Sheet) -> None:
    """Save the sheet of a comparison with the cells that are made; say on stderr how many, if some are not."""
    path, record = _free(target, options.out), sheet.record()
    save_file(finishing.encoded(sheet.image(), record), path)
    _tell(options, path, record)
    if len(sheet.images) < sheet.count:
        print(f"ldm: the sheet has {len(sheet.images)} of {sheet.count} images", file=sys.stderr)


def _tell(options: Options, path: Path, record: dict[str, Any]) -> None:
    """Print where an image is, or a line of JSON with its record, too."""
    print(json.dumps({"path": str(path), **record}) if options.as_json else path, flush=True)


def _pipeline(loading: dict[str, Any]) -> Pipeline:
    """The pipeline of the settings of loading; each of several processes has a GPU of its own."""
    own = {"device": f"cuda:{os.environ.get('LOCAL_RANK', 0)}"} if processes() > 1 and torch.cuda.is_available() else {}
    return Pipeline(**typed({**own, **loading}))


# --- output files -----------------------------------------------------------------------------------------------------


def _free(target: Path, out: str) -> Path:
    """The target, or the next free number if another run has written it; a file named by --out is replaced."""
    while target != Path(out) and target.exists():
        number, _, rest = target.name.partition("-")
        target = target.with_name(f"{int(number) + 1:05d}-{rest}")
    return target


def _described(options: Options, work: Work, opened: Opened, groups: list[Group]) -> dict[str, Any]:
    """The plan that `--dry-run` prints, of the first model and its first images."""
    from ldm.cli.info import describe

    group, family = groups[0], opened.family
    request = group.request
    (record,) = records(request.part(slice(1)), family)
    files = {name: group.settings[name] for name, _ in IMAGES if name in group.settings}
    columns, rows = sheet_labels(options.xy) if options.xy else ((), ())
    return {
        "model": describe(opened),
        "settings": {name: value for name, value in record.items() if name not in ("prompt", "seed")} | files,
        "timesteps": [round(float(t), 2) for t in request.plan(family.schedule, family.xl).timesteps],
        "images": len(work.jobs),
        "left_to_make": len(work.left),
        **({"columns": columns, "rows": rows} if columns else {}),
        "first": {"prompt": work.jobs[0].prompt, "seed": work.jobs[0].seed},
    }
