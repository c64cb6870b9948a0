"""`ldm convert`: read any layout, write another."""

from __future__ import annotations

from pathlib import Path

from ldm.cli.common import SourceOptions, progress, to_bytes
from ldm.errors import LdmError
from ldm.files import check_destination
from ldm.latent_diffusion import LatentDiffusion
from pipelines.tuning import dtype_named


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
    with progress() as report:
        model = LatentDiffusion.of(options.open(source, verify=True, report=report).load(progress=report))
        model.save_pretrained(
            path, dtype=wanted, variant=as_variant, max_shard_size=shard, overwrite=force, progress=report
        )
    print(dest)
