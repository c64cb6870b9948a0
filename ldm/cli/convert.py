"""`ldm convert`: read any layout, write another."""

from __future__ import annotations

from pathlib import Path

from ldm.cli.common import progress, to_bytes, to_components, to_dtype
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion


def run(
    source: str,
    dest: str,
    dtype: str | None,
    as_variant: str | None,
    shard_size: str,
    force: bool,
    family: str | None,
    variant: str | None,
    revision: str | None,
    components: list[str],
    allow_pickle: bool,
) -> None:
    """Load memory-mapped, as stored; convert and write tensor by tensor."""
    wanted, shard = to_dtype(dtype), to_bytes(shard_size)
    path = Path(dest)
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise LdmError(f"{dest}: pickles are not written; name a .safetensors file or a folder")
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise LdmError(f"{dest} exists; choose another name, or --force to replace it")
    with progress() as report:
        model = LatentDiffusion.from_pretrained(
            source,
            family=family,
            variant=variant,
            revision=revision,
            components=to_components(components),
            allow_pickle=allow_pickle,
            progress=report,
        )
        model.save_pretrained(
            path, dtype=wanted, variant=as_variant, max_shard_size=shard, overwrite=force, progress=report
        )
    print(dest)
