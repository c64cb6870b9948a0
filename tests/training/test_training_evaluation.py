"""Evaluation while training: its figures in the log, reports, the best weights as the result, after any stop too."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from drawings import SIDE, Toy, drawing, drawings, tinted
from launched import on_two
from PIL import Image
from runs import TINY, Pulled, lines, losses, weights
from safetensors.torch import load_file

from ldm.cli.train import make_images
from ldm.errors import LdmError
from ldm.evaluation import features
from ldm.evaluation.networks import extractors
from ldm.evaluation.plan import EvaluationPlan
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import Config, load
from ldm.training.evaluator import check_evaluation, weights_digest
from ldm.training.run import train
from ldm.training.stages.table import KINDS, kind_named
from ldm.weights.tensors import LINEAGE, read_header

BASE = {**TINY["base"], "optimizer": {"learning_rate": 2e-3}, "save_every": 3, "validate_every": 100}
CHOOSING = ["base.evaluation.every=2", "base.evaluation.metrics=[fid]", "base.evaluation.choose=fid"]
WIDTHS = "base.ema.widths=[0.1]"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each run is a process's first, and images are looked at with random convolutions."""
    for name in ("open_extractor", "open_text_extractor"):
        monkeypatch.setattr(features, name, lambda spec, device: Toy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawings(tmp_path_factory.mktemp("data") / "images", 60, 1)


def config(images: Path, output: Path, *overrides: str) -> Config:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**TINY, "base": BASE, "data": {**TINY["data"], "holdout": 6}}))
    return load(path, [f"data.source={images}", f"output={output}", *overrides])


class Painter:
    """Draws what it is asked for, in colours that are more or less wrong: it depends on the model's weights."""

    def __init__(self, *wrong: float) -> None:
        self.wrong = wrong or (0.5, 0.7, 0.4, 0.1, 0.3, 0.6)  # of the weights in the order in which they are met
        self.met: dict[str, int] = {}
        self.calls = 0
        self.stop_at = 0  # the call in which the plug is pulled

    def __call__(
        self, model: LatentDiffusion, prompts: list[str], size: tuple[int, int], seeds: Sequence[int],
        settings: Mapping[str, Any],
    ) -> list[Image.Image]:  # fmt: skip
        assert size == (SIDE, SIDE)
        self.calls += 1
        if self.calls == self.stop_at:
            raise Pulled
        wrong = self.wrong[self.met.setdefault(weights_digest(model), len(self.met))]
        return [
            tinted(drawing(*prompt.split()[1:3], random.Random(seed)), wrong)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def done(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "base" / "done.json").read_text()))


def kept(output: Path) -> list[str]:
    """The evaluations whose weights are there."""
    folder = output / "base" / "evaluation"
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob("**/unet.safetensors"))


def evaluations(output: Path) -> list[dict[str, float]]:
    rows = [{k: v for k, v in row.items() if k == "step" or k.startswith("evaluation/")} for row in lines(output)]
    return [row for row in rows if len(row) > 1]


def test_the_best_weights_become_the_result(images: Path, tmp_path: Path) -> None:
    plain = ["data.holdout=20", WIDTHS]
    extra = ["base.evaluation.every=3", "base.evaluation.metrics=[fid,clip-score,memorisation]",
             "base.evaluation.clip=clip:toy", "base.evaluation.choose=fid"]  # fmt: skip
    train(config(images, tmp_path / "plain", *plain))
    painter = Painter(0.5, 0.1, 0.4, 0.3)
    train(config(images, tmp_path / "r", *plain, *extra), painter)
    found = evaluations(tmp_path / "r")
    assert [row["step"] for row in found] == [3, 6]
    averages, metrics = ("ema", "width-0.1"), ("clip-score", "fid", "memorisation")
    names = [f"evaluation/{average}/{metric}" for average in averages for metric in metrics]
    assert sorted(found[0]) == [*names, "step"]
    figures = [row[f"evaluation/{average}/fid"] for row in found for average in averages]
    assert min(figures) == figures[1]
    chosen = done(tmp_path / "r")["chosen"]
    assert (chosen["step"], chosen["average"], chosen["value"]) == (3, "width-0.1", figures[1])
    header = read_header(tmp_path / "r" / "base" / "model" / "unet" / "diffusion_pytorch_model.safetensors")[1]
    assert json.loads(header[LINEAGE])["chosen"] == chosen
    assert kept(tmp_path / "r") == ["step-00000003/width-0.1"]
    best = load_file(tmp_path / "r" / "base" / "evaluation" / "step-00000003" / "width-0.1" / "unet.safetensors")
    result = LatentDiffusion.from_pretrained(tmp_path / "r" / "base" / "model").unet.state_dict()
    assert all(torch.equal(best[name], result[name]) for name in result)
    folder = tmp_path / "r" / "base" / "evaluation" / "step-00000006" / "ema"
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "report.html", "report.json", "shown"]
    report = json.loads((folder / "report.json").read_text())
    assert report["sides"][0]["source"] == "base after 6 updates, ema"
    assert report["sides"][0]["settings"]["steps"] == 30
    assert (report["sides"][0]["count"], report["reference"]["source"]) == (20, f"20 of {images}")
    # training knows nothing of it: the same losses, weights and state of the random numbers
    assert losses(tmp_path / "r") == losses(tmp_path / "plain")
    for name in ("random_states_0.pkl", "model.safetensors"):
        states = [tmp_path / run / "base" / "checkpoints" / "step-00000006" / name for run in ("r", "plain")]
        assert states[0].read_bytes() == states[1].read_bytes()
    assert weights(tmp_path / "r") != weights(tmp_path / "plain")
    assert "chosen" not in done(tmp_path / "plain")


def test_the_best_adapter_becomes_the_result(images: Path, tmp_path: Path) -> None:
    few = [
        "steps=4", "batch=8", "rank=2", "dtype=fp32", "sizes=[{size: 32}]", "log_every=1", "save_every=2",
        "optimizer.learning_rate=1e-2", "evaluation.every=2", "evaluation.metrics=[fid]", "evaluation.choose=fid",
    ]  # fmt: skip
    output = tmp_path / "r"
    train(config(images, output, "stages=[adapter]", *(f"adapter.{one}" for one in few)), Painter(0.1, 0.5))
    assert json.loads((output / "adapter" / "done.json").read_text())["chosen"]["step"] == 2
    (best,) = (output / "adapter" / "evaluation").glob("step-00000002/*/unet.safetensors")
    kept, result = load_file(best), load_file(output / "adapter" / "adapter.safetensors")
    ends = (".down", ".lora_down.weight")
    downs = [
        sorted(float(tensor.sum()) for name, tensor in found.items() if name.endswith(ends)) for found in (kept, result)
    ]
    assert downs[0] == downs[1] != []


ADAPTED = {
    "adapter": [],
    "adapter in 8 bits": ["quantize=int8-weights"],
    "textual-inversion": ["words={red: {vectors: 2}}"],
    "textual-inversion, pivotal": ["words={red: {vectors: 2}}", "pivotal=true", "rank=2"],
}


@pytest.mark.parametrize("name", ADAPTED)
def test_each_stage_whose_model_makes_images_is_evaluated(images: Path, tmp_path: Path, name: str) -> None:
    """With its weights at the time: the painter knows only as many colours as there are evaluations."""
    stage = name.partition(",")[0].partition(" ")[0]
    few = ["steps=2", "batch=8", "sizes=[{size: 32}]", "log_every=1", "optimizer.learning_rate=1e-2",
           "evaluation.every=1", "evaluation.metrics=[fid]", *ADAPTED[name]]  # fmt: skip
    painter = Painter(0.1, 0.5)
    train(config(images, tmp_path / "r", f"stages=[{stage}]", *(f"{stage}.{one}" for one in few)), painter)
    rows = [row["evaluation/fid"] for row in lines(tmp_path / "r", stage) if "evaluation/fid" in row]
    assert len(rows) == len(painter.met) == 2
    assert rows[0] < rows[1]


@pytest.mark.parametrize("stage", [kind.name for kind in KINDS if not kind.makes_images])
def test_what_makes_no_images_alone_is_not_evaluated(stage: str) -> None:
    with pytest.raises(LdmError, match=rf"{stage}.evaluation.every: the stage {stage} trains what makes no images alo"):
        check_evaluation(kind_named(stage), EvaluationPlan(("fid",)))


def test_a_run_killed_anywhere_ends_in_the_same_result(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations after 2, 4 and 6 updates; the best is between two checkpoints."""
    extra = [WIDTHS, *CHOOSING, "base.evaluation.batch=4"]
    painter = Painter()
    train(config(images, tmp_path / "whole", *extra), painter)
    assert painter.calls == 6 * 2 + 1  # six sets of weights, two batches each; a preview
    assert done(tmp_path / "whole")["chosen"]["step"] == 4
    settings = config(images, tmp_path / "parts", *extra)
    painter.calls, painter.stop_at = 0, 4  # within the second evaluation, half of whose images are there

    def killed_when_told(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 4 and "evaluation/ema/fid" in figures:
            raise Pulled

    for report in (lambda *_: None, killed_when_told):
        with pytest.raises(Pulled):
            train(settings, painter, report)
    assert kept(tmp_path / "parts") == ["step-00000002/ema", "step-00000004/ema", "step-00000004/width-0.1"]
    assert painter.calls == 4 + 5  # what was there was not made again: one call for the half, four after it

    def killed(*_: object) -> None:
        raise Pulled

    with monkeypatch.context() as patch, pytest.raises(Pulled):
        patch.setattr("ldm.training.run.write_result", killed)
        train(settings, painter)
    train(settings, painter)
    assert painter.calls == 4 + 5 + 5 + 1  # those of the last step alone, and its preview once more
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert done(tmp_path / "parts") == done(tmp_path / "whole")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole") == ["step-00000002/ema", "step-00000004/width-0.1"]
    reports = [sorted(run.glob("base/evaluation/*/*/report.*")) for run in (tmp_path / "parts", tmp_path / "whole")]
    assert len(reports[0]) == 12
    for one, other in zip(*reports, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_another_way_to_choose_begins_anew(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights after 2 updates are the best; once they are damaged, or another metric counts, others are needed.

    No averages are kept here, so that it is about the weights themselves.
    """
    painter = Painter(0.1, 0.5, 0.3)

    def killed(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 5:
            raise Pulled

    plain = [*CHOOSING, "base.ema.decay=0"]
    settings = config(images, tmp_path / "r", *plain)
    with pytest.raises(Pulled):
        train(settings, painter, killed)
    path = tmp_path / "r" / "base" / "evaluation" / "step-00000002" / "weights" / "unet.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        LdmError, match=r"the best weights so far: .* has changed .*, or set base\.evaluation\.choose=null"
    ):
        train(settings, painter)
    path.unlink()
    with pytest.raises(LdmError, match=r"unet\.safetensors is missing; put it back, or set base"):
        train(settings, painter)
    kid = ["base.evaluation.metrics=[kid]", "base.evaluation.choose=kid"]
    train(config(images, tmp_path / "r", *plain, *kid), painter)
    assert "base.evaluation has changed: the best weights are chosen anew" in caplog.text
    chosen = done(tmp_path / "r")["chosen"]
    assert (chosen["step"], chosen["metric"]) == (6, "kid")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.evaluation.metrics=[fdi]"], "base.evaluation: metric 'fdi' is not known; did you mean fid?"),
        (
            ["base.evaluation.metrics=[clip-score]"],
            "base.evaluation: clip-score needs a network for images and texts",
        ),
        (["base.evaluation.metrics=[psnr]"], "base.evaluation: psnr is about the autoencoder"),
        (["base.evaluation.metrics=[precision]", "base.evaluation.n=20"], "precision needs at least 40 images"),
        (["base.evaluation.metrics=[precision]"], "precision needs at least 40 images, and there are 6 prompts"),
        (["base.evaluation.data=nowhere"], "base.evaluation.data: nowhere does not exist"),
        (["data.holdout=0.0001"], "base.evaluation: no images are held out (data.holdout)"),
        (["base.evaluation.features=inception:nowhere"], "base.evaluation: nowhere"),
        (
            ["base.evaluation.choose=kid"],
            "base.evaluation.choose is 'kid': value error, this metric is not among evaluation.metrics",
        ),
        (["base.evaluation.choose=fid", "base.evaluation.every=0"], "no evaluation is made to choose by; set every"),
        (
            ["stages=[base,refiner]", "refiner.evaluation.every=2"],
            "refiner.evaluation.every: the stage refiner trains what makes no images alone; set it to 0",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(
    images: Path, tmp_path: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "inception" in str(overrides):
        monkeypatch.setattr(features, "open_extractor", extractors.open_extractor)
    painter, told = Painter(), []
    with pytest.raises(LdmError) as caught:
        every = ["base.evaluation.every=2", "base.evaluation.metrics=[fid]"]
        train(config(images, tmp_path / "r", *every, *overrides), painter, lambda *line: told.append(line))
    assert message in str(caught.value)
    assert not told
    assert not painter.calls


def test_nothing_to_make_images_with(images: Path, tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"base\.evaluation\.every: no function that makes images is given"):
        train(config(images, tmp_path / "r", *CHOOSING))
    with pytest.raises(LdmError, match=r"base\.evaluation: a stream holds no images out"):
        check_evaluation(kind_named("base"), EvaluationPlan(("fid",)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("CUDA out of memory. Tried"),
            "out of memory with 8 images at a time; set base.evaluation.batch to 4",
        ),
        (LdmError("the image is black"), "(set base.evaluation.every=0 to train without): the image is black"),
    ],
)
def test_images_that_cannot_be_made(images: Path, tmp_path: Path, error: Exception, message: str) -> None:
    def broken(*_: object) -> list[Image.Image]:
        raise error

    with pytest.raises(LdmError) as caught:
        train(config(images, tmp_path / "r", *CHOOSING), broken)
    assert str(caught.value).startswith("evaluation after 2 updates")
    assert message in str(caught.value)


def test_every_weight_counts_in_the_digest() -> None:
    model = tiny.model("sd15", shallow=True)
    before = weights_digest(model)
    with torch.no_grad():
        model.unet.mid_block.resnets[0].conv1.weight[3, 2, 1, 0] += 1e-6
    assert weights_digest(model) != before


SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from drawings import Toy
from ldm.evaluation.networks import extractors
from ldm.evaluation import features
from ldm.evaluation.plan import EvaluationPlan
features.open_extractor = lambda spec, device: Toy()
from ldm.cli.train import train_models
train_models(sys.argv[1], sys.argv[2:])
"""


def test_two_processes_find_the_same(images: Path, tmp_path: Path) -> None:
    """With weights that do not move, so that both make the same images."""
    still = [*CHOOSING, "base.steps=1", "base.optimizer.learning_rate=1e-60", "base.evaluation.steps=2",
             "base.evaluation.batch=2"]  # fmt: skip
    train(config(images, tmp_path / "one", *still), make_images)
    config(images, tmp_path / "two", *still)
    (tmp_path / "script.py").write_text(SCRIPT)
    on_two(tmp_path / "script.py", Path(__file__).parents[1], tmp_path / "two.yaml", f"data.source={images}",
           f"output={tmp_path / 'two'}", *still)  # fmt: skip
    assert evaluations(tmp_path / "two") == evaluations(tmp_path / "one")
    assert done(tmp_path / "two")["chosen"] == done(tmp_path / "one")["chosen"]
    one, two = (tmp_path / run / "base" / "evaluation" / "step-00000001" / "ema" for run in ("one", "two"))
    for name in ("report.json", "report.html"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
