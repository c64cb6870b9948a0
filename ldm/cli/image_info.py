"""`ldm info IMAGE`: by what an image was made, its watermark, and its C2PA manifest. The network is not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.cli.common import SourceOptions
from ldm.errors import LdmError
from ldm.signing import INSTALL, has_packages, read_manifest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def is_image(source: str) -> bool:
    """Whether a source is an image, as far as its name tells."""
    return Path(source).suffix.lower() in SUFFIXES


def print_image(file: str, as_json: bool, verify: bool, options: SourceOptions) -> None:
    """Print what is found in an image; `verify` and `options` are those of models.

    Raises:
        LdmError: it cannot be read, or such options are given.
    """
    if verify or options != SourceOptions():
        raise LdmError(f"{file} is an image, not a model: leave the other options out")
    report = describe_image(Path(file))
    if as_json:
        print(json.dumps(report, indent=2))
        return
    width = max(map(len, report)) + 2
    for name, value in report.items():
        print(f"{name.replace('_', ' '):{width}}{value}")


def describe_image(path: Path) -> dict[str, Any]:
    """What is found in an image, in words.

    Raises:
        LdmError: it cannot be read.
    """
    from ldm.images import load_image  # NumPy and PyTorch, only now that there is something to read

    image = load_image(path)
    return {
        "image": str(path),
        "size": f"{image.width}x{image.height}",
        **_record(path),
        "watermark": _watermark(image),
        "c2pa": _manifest(path),
    }


def _record(path: Path) -> dict[str, str]:
    """What the record in the image says of model and safety checker."""
    from ldm.images import read_settings

    try:
        record, parameters = read_settings(path)
    except LdmError as error:
        return {"record": str(error).removeprefix(f"{path}: ")}
    if record is None:
        return {"record": "AUTOMATIC1111's text" if parameters else "none"}
    made = [str(record[key]) for key in ("version", "model", "model_hash") if record.get(key)]
    return {"record": ", ".join(made)} | ({"safety": str(record["safety"])} if "safety" in record else {})


def _watermark(image: Any) -> str:
    """What the bits of the watermark say."""
    from ldm.watermark import BITS, LEAST, by_chance, fits, matching_bits

    if not fits(*image.size):
        return "none: the image is too small"
    count = matching_bits(image)
    found = f"SDXL's, {count} of {len(BITS)} bits (by chance in one of {1 / by_chance(count):,.0f} images)"
    return found if count >= LEAST else f"none found ({count} of {len(BITS)} bits of SDXL's; {LEAST} are needed)"


def _manifest(path: Path) -> str:
    """What the manifest says, and whether it is right."""
    data = path.read_bytes()
    if not has_packages():
        return f"not read: {INSTALL}" if b"c2pa" in data else "none"
    try:
        report = read_manifest(data)
    except LdmError as error:
        return str(error).removeprefix("c2pa: ")
    if report is None:
        return "none"
    says = f"signed by {report.signer or 'an unknown signer'}, made with {report.program or 'an unknown program'}"
    says += " (says that a model made it)" if report.by_model else ""
    if report.valid:
        return f"valid: {says}; whether the signer is to be trusted is not checked"
    return f"INVALID, {', '.join(report.problems) or 'it cannot be verified'}: {says}"
