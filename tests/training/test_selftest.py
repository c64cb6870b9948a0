"""`ldm selftest`: it passes on one process and on two, and each of its checks finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from commands import run
from launched import on_two
from runs import _fresh_accelerator  # noqa: F401

from ldm.data.keyed import uniform
from ldm.training import selftest
from ldm.training.loop import Training
from ldm.training.optimizers import learning_rate
from ldm.training.selftest import Ground, lay_out
from ldm.training.stages.text import ContrastiveStage


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    Accelerator()
    lay_out(tmp_path)
    return Ground(tmp_path, "no", 4)


def test_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code, out, err = run(capsys, monkeypatch, "selftest", "--folder", tmp_path / "new")
    assert (code, err) == (0, "")
    where, *checked = out.splitlines()
    assert where.startswith("cpu, ") and " thread" in where
    assert [line.split()[0] for line in checked] == ["ok"] * 6 + ["all"]
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").write_text("something")
    code, out, err = run(capsys, monkeypatch, "selftest", "--folder", tmp_path / "old")
    assert (code, out) == (1, "")
    assert "exists already; name one that does not" in err
    code, _, err = run(capsys, monkeypatch, "selftest", "--precision", "int4")
    assert code == 1
    assert "--precision 'int4': choose auto, no, fp16, bf16" in err


def test_all_is_well_on_two_processes(tmp_path: Path) -> None:
    done = on_two("-m", "ldm", "selftest", "--folder", tmp_path / "new")
    assert done.stdout.count("ok ") == 6
    assert "all is well" in done.stdout


def test_a_failure_is_said_and_ends_in_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(ground: Ground) -> Iterator[str]:
        """All is as it should be."""
        yield "it is not"

    monkeypatch.setattr(selftest, "CHECKS", (wrong, selftest.drop_out))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code, out, err = run(capsys, monkeypatch, "selftest", "--folder", tmp_path / "new")
    assert code == 1
    _, first, second = out.splitlines()
    assert first == "FAILED  All is as it should be: it is not"
    assert second.startswith("ok ")
    assert err == f"ldm: training does not work as it should here; the trained networks are in {tmp_path / 'new'}\n"


def _half(original: Callable[..., float]) -> Callable[..., float]:
    return lambda *arguments: original(*arguments) / 2


def _unseen(self: Training, figures: dict[str, torch.Tensor], bad: object) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("check", "place", "fault", "problem"),
    [
        ("all_stages", "ldm.training.loop.learning_rate", _half(learning_rate), "the learning rate of autoencoder is"),
        ("gradients", "ldm.training.stages.autoencoder.kl_loss", lambda p, x: p.mean.sum().detach(), "the KL term"),
        ("drop_out", "ldm.training.conditioning.uniform", _half(uniform), "captions are dropped, not 10 %"),
        ("not_a_number", "ldm.training.loop.Training.agree", _unseen, "went unnoticed"),
        (
            "crops",
            "ldm.data.framing.Frame.numbers",
            property(lambda frame: (40, 48, 0, 0, 32, 32)),
            "of the crop in their time ids",
        ),
        ("resuming", "ldm.training.ema.Averages.load_state_dict", lambda self, state: None, "after a stop"),
    ],
)
def test_faults_are_found(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, check: str, place: str, fault: Any, problem: str
) -> None:
    monkeypatch.setattr(place, fault)
    found = []
    for line in getattr(selftest, check)(ground):
        found.append(line)
        if problem in line:
            return  # what comes after it is not checked: it takes long
    raise AssertionError(found)


def test_the_text_stage_is_watched(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that gets no gradient is named."""
    original = ContrastiveStage.losses

    def deaf(self: Any, batch: Any, step: int) -> Any:
        for loss in original(self, batch, step):
            yield type(loss)(loss.player, loss.values.detach().requires_grad_(), loss.report)

    monkeypatch.setattr(ContrastiveStage, "losses", deaf)
    assert any("text: no gradient" in line for line in selftest.gradients(ground))
