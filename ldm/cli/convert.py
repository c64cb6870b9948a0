"""`ldm convert`: read any layout, write another."""

from __future__ import annotations

from pathlib import Path

from ldm.cli.common import progress, to_bytes, to_components, to_dtype
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.files import check_destination
from ldm.weights.sources import open_source


def run(
    source: str,
    dest: str,
    dtype: str | None,
    as_variant: str | None,
    shard_size: str | None,
    force: bool,
    family: str | None,
    variant: str | None,
    revision: str | None,
    components: list[str],
    allow_pickle: bool,
) -> None:
    """Load memory-mapped, as stored; convert and write tensor by tensor."""
    path = Path(dest)
    single = path.suffix.lower() == ".safetensors"
    wanted, shard = to_dtype(dtype), to_bytes(shard_size or "10GB")
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise LdmError(f"{dest}: pickles are not written; name a .safetensors file or a folder")
    if single and (as_variant or shard_size):
        raise LdmError(f"{dest} is a single file; --as-variant and --shard-size are for folders")
    check_destination(path, folder=not single, overwrite=force)
    with progress() as report:
        opened = open_source(
            source,
            family=family,
            variant=variant,
            revision=revision,
            components=to_components(components),
            allow_pickle=allow_pickle,
            progress=report,
        )
        model = LatentDiffusion.of(opened.load(progress=report))
        model.save_pretrained(
            path, dtype=wanted, variant=as_variant, max_shard_size=shard, overwrite=force, progress=report
        )
    print(dest)
