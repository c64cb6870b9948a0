"""The command that compares speeds: that both sides make the same images, and what it prints and writes."""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from commands import run
from launched import Program, warm

from ldm.bench import cold, measuring, phases, processes
from ldm.bench.cold import TIMED, Cold, cold_starts, printed
from ldm.bench.measuring import Seconds, timed
from ldm.bench.options import BenchOptions, Call
from ldm.bench.processes import SideProcess
from ldm.bench.sides import ours, theirs
from ldm.bench.tables import phases_table, ratios
from ldm.errors import LdmError


@pytest.mark.parametrize("name", ["sd15", "sd2-v", "sdxl"])
def test_both_sides_do_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same latents come out, given the same noise, and each step is told of once."""
    model, call = tiny.model(name, shallow=True), Call(64, 72, 2, 5.0)
    decoded: list[torch.Tensor] = []
    for kind in (type(model.autoencoder), diffusers.AutoencoderKL):
        monkeypatch.setattr(kind, "decode", recording(kind.decode, decoded))
    steps: list[str] = []
    ours(model, call, rng="diffusers")(3, lambda: steps.append("ours"))
    theirs(model, call, torch.float32)(3, lambda: steps.append("theirs"))
    assert steps.count("ours") == steps.count("theirs") >= 3  # PNDM calls more often
    torch.testing.assert_close(decoded[0], decoded[1], atol=1e-3, rtol=1e-4)


def recording(decode: Any, seen: list[torch.Tensor]) -> Any:
    def recorded(self: Any, z: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(z)
        return decode(self, z, *arguments, **options)

    return recorded


def test_a_call_by_its_stages() -> None:
    def side(steps: int, tell: Any) -> None:
        for _ in range(steps):
            tell()

    seconds = timed(side, 3, torch.device("cpu"))
    assert seconds.image >= seconds.step > 0
    assert ratios([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]) == "3.00 (2.50–3.50)"
    assert ratios([2.0], [1.0]) == "2.00 (2.00–2.00)"


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides' processes that need not import PyTorch and diffusers first."""
    context = warm()
    monkeypatch.setattr("ldm.bench.processes.multiprocessing.get_context", lambda kind: context)


def test_the_command(
    forked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(measuring.SIZES, "cpu", 64)
    out = tmp_path / "bench.json"
    code, said, _ = run(
        capsys, monkeypatch, "bench", tmp_path / "model", "--rounds", 2, "--steps", 2, "--dtype", "fp32", "--out", out
    )
    assert code == 0
    assert "times ours" in said
    found = json.loads(out.read_text())
    assert found["size"] == [64, 64]
    for name in ("ldm", "diffusers"):
        rows = [Seconds(**row) for row in found["seconds"][name]]
        assert len(rows) == 2
        assert all(np.isclose(row.before + 2 * row.step + row.decode, row.image, rtol=0.5) for row in rows)


def test_new_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they print of themselves; and that both sides are asked in turns, once more than is counted."""
    code = TIMED.format(imports="import json", loads="json.loads(sys.argv[1])")
    imports, load = printed("ours", [code, "[1]"])
    assert 0 < imports < 10 > load > 0
    with pytest.raises(LdmError, match="a new process of ours failed: ModuleNotFoundError: No module named 'nothing'"):
        printed("ours", ["import nothing"])
    asked: list[str] = []

    def fake(name: str, command: list[str]) -> list[float]:
        asked.append(name)
        for argument in command:
            if argument.endswith(".png"):
                Path(argument).touch()
        return [3.0, 1e6] if command[0] == cold.WATCHED else [1.0, 0.5]

    monkeypatch.setattr(cold, "printed", fake)
    found = cold_starts(tmp_path, 2, "cpu")
    assert asked == (["ldm"] * 2 + ["diffusers"] * 2) * 3
    assert found == {name: [Cold(3.0, 1.024, 1.0, 0.5)] * 2 for name in ("ldm", "diffusers")}


def test_the_phases_of_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is missing, and together they take the time that has passed."""

    def forked(name: str, arguments: list[str]) -> str:
        program = Program(*arguments)
        out, err = program.communicate()
        assert program.returncode == 0, err
        return out.splitlines()[-1]

    monkeypatch.setattr(cold, "last_line", forked)
    tiny.model("sd15").save_pretrained(tmp_path / "model")
    began = time.monotonic()
    (found,) = cold.phase_seconds(tmp_path / "model", 1, "cpu")
    seconds = time.monotonic() - began
    named = {name for name, _, _ in phases.CALLS}
    assert named | {"Python", "importing PyTorch", "first step", "further steps", "exit"} <= found.keys()
    assert all(found[name] > 0 for name in named)
    assert 0 < sum(found.values()) < seconds
    assert [*phases_table([found]).columns[0].cells] == [*found, "together"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "comfy"], "--against 'comfy' is not known; choose from diffusers, channels-last, compiled"),
        (["--steps", 1], "--steps must be at least 2"),
        (["--rounds", 0], "--rounds and --batch at least 1"),
        (["--dtype", "int3"], "int3"),
        (["--size", "big"], "big"),
        (["--device", "abacus"], "abacus"),
        (["nonsense"], "nonsense does not exist"),
    ],
)
def test_bad_input(
    arguments: list[object], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, "bench", *arguments)
    assert code != 0
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_side_that_cannot_be_had(
    forked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its process says comes out as one line; so does its death."""
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "model")
    code, _, err = run(capsys, monkeypatch, "bench", tmp_path / "model", "--quantize", "int9")
    assert code == 1
    assert err.startswith("ldm: quantize 'int9' is not known") and len(err.splitlines()) == 1
    options, call = BenchOptions(str(tmp_path / "model")), Call(64, 64, 1, 5.0)
    side = SideProcess("plain", options, call, torch.device("cpu"), torch.float32)
    side.wait()
    seconds, memory = side.image(2)
    assert seconds.image > 0 and 0.1 < memory < 100
    side.process.kill()
    with pytest.raises(LdmError, match="the process of plain has died; does memory suffice"):
        side.image(2)


def test_packages_of_a_rival_are_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Any] = []

    def noisy(*_: Any) -> None:
        warnings.warn("this will be removed", FutureWarning, stacklevel=1)
        logging.getLogger("diffusers").warning("that will be removed")
        raise LdmError("it cannot be had")

    monkeypatch.setattr(processes, "make_side", noisy)
    pipe = SimpleNamespace(send=answers.append)
    options, call = BenchOptions("emoji"), Call(64, 64, 1, 5.0)
    with warnings.catch_warnings():
        try:
            processes._serve(pipe, "diffusers", options, call, torch.device("cpu"), torch.float32)
        finally:
            logging.disable(logging.NOTSET)
    assert answers == [("it cannot be had", None)]
    assert capsys.readouterr() == ("", "")


def test_a_rival_that_fails_is_left_out(
    forked: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(measuring.SIZES, "cpu", 64)
    image = SideProcess.image

    def fails(self: SideProcess, steps: int) -> Any:
        if self.name == "plain":
            self.process.kill()
        return image(self, steps)

    monkeypatch.setattr(SideProcess, "image", fails)
    out = tmp_path / "bench.json"
    arguments = ["--rounds", 1, "--steps", 2, "--dtype", "fp32", "--against", "plain", "--out", out]
    assert run(capsys, monkeypatch, "bench", tmp_path / "model", *arguments)[0] == 0
    said = [record.getMessage() for record in caplog.records]  # perhaps of other processes, too
    assert [line for line in said if "plain" in line] == [
        "without plain: the process of plain has died; does memory suffice for all sides?"
    ]
    assert list(json.loads(out.read_text())["seconds"]) == ["ldm"]
