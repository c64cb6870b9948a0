"""`ldm convert`: read any layout, write another."""

from __future__ import annotations

import logging
from pathlib import Path

from ldm.cli.common import SourceOptions, log_warnings, progress, to_bytes
from ldm.errors import LdmError, listing
from ldm.files import check_destination
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.components import Opened
from ldm.weights.layouts import original_extras
from pipelines.tuning import dtype_named

REPLACED = ("sai_model_spec", "architecture", "implementation", "prediction_type", "resolution", "date", "hash_sha256")
log = logging.getLogger(__name__)


def convert_model(
    source: str,
    dest: str,
    dtype: str | None,
    as_variant: str | None,
    shard_size: str | None,
    force: bool,
    options: SourceOptions,
) -> None:
    """Map the weights of the source into memory, and convert and write them tensor by tensor."""
    path = Path(dest)
    single = path.suffix.lower() == ".safetensors"
    wanted, shard = dtype_named(dtype), to_bytes(shard_size or "10GB")
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise LdmError(f"{dest}: pickles are not written; name a .safetensors file or a folder")
    if single and (as_variant or shard_size):
        raise LdmError(f"{dest} is a single file; --as-variant and --shard-size are for folders")
    check_destination(path, folder=not single, overwrite=force)
    log_warnings()
    with progress() as report:
        opened = options.open(source, verify=True, report=report)
        schedule = original_extras(opened.family)  # constants that follow from the configuration
        if ignored := [name for name in opened.ignored if name not in schedule]:
            log.warning("not part of the model, and not written: %s", listing(ignored, 8))
        if metadata := _metadata(opened):
            log.warning("metadata of the files are not written: %s", listing(metadata, 8))
        model = LatentDiffusion.of(opened.load(progress=report))
        model.save_pretrained(
            path, dtype=wanted, variant=as_variant, max_shard_size=shard, overwrite=force, progress=report
        )
    print(dest)


def _metadata(opened: Opened) -> list[str]:
    """What the headers of a model's files say and ours do not."""
    names = {name for part in opened.parts.values() for name in part.store.metadata}
    ours = {"format", *(f"modelspec.{name}" for name in REPLACED)}
    return sorted(name for name in names - ours if not name.startswith("ldm."))
