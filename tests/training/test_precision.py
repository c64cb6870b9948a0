"""The precision of a run on processors that compute in bf16, and on those that emulate it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from commands import run
from runs import _fresh_accelerator, config  # noqa: F401  (a fixture)

from ldm.runtime import bf16
from ldm.training import precision
from ldm.training.run import train
from pipelines.tuning import default_dtype

CPU = torch.device("cpu")


def able(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A processor that has these instruction sets."""
    monkeypatch.setattr(bf16, "can", lambda *asked: bool({*asked} & {*names}))


@pytest.mark.parametrize(
    ("names", "there"),
    [
        (["avx512_bf16"], True),
        (["amx_bf16"], True),
        (["bf16", "neon"], True),  # Arm
        (["avx2", "avx512_f", "avx512_vnni"], False),
        ([], False),
    ],
)
def test_sampling_and_training_ask_the_same_question(
    monkeypatch: pytest.MonkeyPatch, names: list[str], there: bool
) -> None:
    able(monkeypatch, *names)
    assert default_dtype(CPU) == (torch.bfloat16 if there else torch.float32)
    assert precision.precision_on(CPU, "auto") == ("bf16" if there else "no")
    assert (precision.costs(CPU, "bf16") is None) == there
    assert precision.precision_on(CPU, "bf16") == "bf16"  # what is asked for is done
    assert precision.costs(CPU, "no") is precision.costs(CPU, "auto") is None


@pytest.mark.parametrize(("capability", "there"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda")
    assert default_dtype(device) == (torch.bfloat16 if there else torch.float16)
    assert precision.precision_on(device, "auto") == ("bf16" if there else "no")
    assert (precision.costs(device, "bf16") is None) == there


def test_of_other_devices_nothing_is_claimed() -> None:
    device = torch.device("mps")
    assert precision.precision_on(device, "auto") == "no"
    assert precision.costs(device, "bf16") is None


def test_a_run_goes_on_where_auto_means_something_else(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names the precision, and one says that it has changed."""
    caplog.set_level(logging.INFO, "ldm")
    able(monkeypatch, "avx512_bf16")
    train(config(shapes, tmp_path / "run", "precision=auto", "base.steps=3"))
    told = [message for message in caplog.messages if "precision" in message]
    assert told == ["precision auto: computing in bf16 on cpu"]
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["precision"] == "bf16"
    caplog.clear()
    AcceleratorState._reset_state()  # the next run of this process is its first
    PartialState._reset_state()
    able(monkeypatch)
    train(config(shapes, tmp_path / "run", "precision=auto", "base.steps=4"))
    told = [message for message in caplog.messages if "precision" in message]
    assert told == [
        "precision auto: computing in fp32 on cpu",
        "precision was 'bf16' when this run began, and is 'no' now",
    ]


def test_emulation_is_told_and_done(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    able(monkeypatch)
    train(config(shapes, tmp_path / "run", "precision=bf16", "base.steps=1"))
    (line,) = [message for message in caplog.messages if "emulates it" in message]
    assert "14.5 s" in line
    assert "precision=auto" in line


@pytest.mark.parametrize(("names", "name", "shown"), [(["amx_bf16"], "bf16", "bf16 on"), ([], "no", "precision=bf16")])
def test_a_plan_names_the_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: list[str], name: str, shown: str
) -> None:
    able(monkeypatch, *names)
    plan = ["plan", "configs/tiny.yaml", "stages=[base]", "precision=auto"]
    code, out, _ = run(capsys, monkeypatch, *plan, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["precision"] == name
    code, out, _ = run(capsys, monkeypatch, *plan)
    assert code == 0
    assert shown in " ".join(out.split())
    code, out, _ = run(capsys, monkeypatch, *plan[:-1], f"precision={name}", "--json")
    assert json.loads(out)["forecast"] == found["forecast"]


def test_configurations_are_for_any_machine() -> None:
    for path in Path("configs").glob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")).get("precision", "no") in ("auto", "no"), path
