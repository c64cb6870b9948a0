"""Evaluation as a whole: images and features are kept, and figures worsen with the defects that they measure."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run
from drawings import SIDE, Toy, caption, drawing, drawings, tinted
from PIL import Image, ImageFilter
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.evaluation import EvaluationPlan, Model, Workspace, evaluate, features
from ldm.evaluation.checks import OF_COPIES, OF_FEATURES
from ldm.evaluation.chunks import CHUNK, ChunkValues, extract, in_chunks
from ldm.evaluation.images import images_of
from ldm.evaluation.metrics.intervals import mean_interval
from ldm.evaluation.metrics.table import INCEPTION, METRICS, Metric, on_images
from ldm.evaluation.report import Report, Row, save_report
from ldm.evaluation.workspace import file_lock


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_extractor", "open_text_extractor"):
        monkeypatch.setattr(features, name, lambda spec, device: Toy())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawings(tmp_path_factory.mktemp("data") / "reference", 240, 1)


def rows(report: Report | None) -> dict[str, Row]:
    assert report is not None
    return {row.metric: row for table in report.tables for row in table.rows}


def values(folder: Path, reference: Path, work: Path, *metrics: str) -> dict[str, float]:
    plan = EvaluationPlan(metrics, data=str(reference), clip="toy")
    return {name: row.estimates[0].value for name, row in rows(evaluate([folder], plan, Workspace(work))).items()}


# --- known directions -------------------------------------------------------------------------------------------------


def noisy(amount: int) -> Callable[[Image.Image], Image.Image]:
    draw = random.Random(0)

    def change(image: Image.Image) -> Image.Image:
        noise = Image.frombytes("RGB", image.size, draw.randbytes(3 * image.width * image.height))
        return Image.blend(image, noise, amount / 10)

    return change


def blurred(amount: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.filter(ImageFilter.GaussianBlur(amount))


def recoloured(amount: int) -> Callable[[Image.Image], Image.Image]:
    """Colours change places in so many tenths of the images."""
    draw = random.Random(0)

    return lambda image: tinted(image, 1.0) if draw.random() < amount / 10 else image


@pytest.mark.parametrize(
    ("damage", "amounts"), [(noisy, (0, 1, 3, 6)), (blurred, (0, 1, 2, 4)), (recoloured, (0, 3, 6, 10))]
)
def test_damage_is_seen_more_the_more_there_is(
    damage: Callable[[int], Callable[[Image.Image], Image.Image]],
    amounts: Sequence[int],
    reference: Path,
    tmp_path: Path,
) -> None:
    found = [
        values(
            drawings(tmp_path / str(amount), 240, 2, damage(amount)), reference, tmp_path / "w",
            "fid", "sfid", "kid", "cmmd", "fd-clip", *(["clip-score"] if damage is recoloured else []),
        )
        for amount in amounts
    ]  # fmt: skip
    for name in found[0]:
        course = [row[name] for row in found]
        assert course == sorted(course, reverse=METRICS[name].better == "higher"), (name, course)


def test_missing_kinds_are_seen_in_recall_and_coverage_not_in_precision(reference: Path, tmp_path: Path) -> None:
    found = []
    for kinds in (12, 8, 4, 2):  # of the twelve kinds of drawings
        folder = drawings(tmp_path / "all" / str(kinds), 720, 2)
        for path in folder.glob("*.png"):
            if int(path.stem) % 12 >= kinds:
                path.unlink()
                path.with_suffix(".txt").unlink()
        found.append(values(folder, reference, tmp_path / "w", "fid", "recall", "coverage", "precision"))
    for name in ("recall", "coverage"):
        course = [row[name] for row in found]
        assert course == sorted(course, reverse=True), (name, course)
    assert [row["fid"] for row in found] == sorted(row["fid"] for row in found)
    assert found[-1]["precision"] > found[0]["precision"] - 0.1


# --- sides ------------------------------------------------------------------------------------------------------------


def artist(strength: float, calls: list[int] | None = None) -> Model:
    """A model that draws what it is asked for, in wrong colours."""

    def make(prompts: list[str], seeds: list[int], changes: Mapping[str, float]) -> list[Image.Image]:
        if calls is not None:
            calls.append(len(prompts))
        drawn = [
            drawing(*prompt.split()[1:3], random.Random(seed)) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [tinted(one, changes.get("tint", strength)) for one in drawn]

    def back(images: list[Image.Image]) -> list[Image.Image]:
        return [tinted(image, 0.1 + strength) for image in images]

    return Model(f"artist {strength}", f"{strength}", SIDE, make, back, {"tint": strength})


EVERYTHING = tuple(METRICS)


@pytest.fixture
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(nn.Module):
        backbone = "toy"

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean(dim=(1, 2, 3))

    monkeypatch.setattr(features, "load_lpips", lambda path, device: Distance())
    monkeypatch.setattr(features, "lpips_path", Path)
    monkeypatch.setattr(features, "file_digest", lambda path: "1" * 64)


@pytest.mark.usefixtures("no_lpips")
def test_two_models_and_all_metrics(reference: Path, tmp_path: Path) -> None:
    training = drawings(tmp_path / "training", 100, 5)
    plan = EvaluationPlan(
        EVERYTHING, data=str(reference), n=60, clip="toy", training=str(training), sweeps={"tint": (0, 0.5)}, batch=7
    )
    calls: list[int] = []
    sides = [artist(0.0, calls), artist(0.5, calls)]
    report = evaluate(sides, plan, Workspace(tmp_path / "work"))
    assert report is not None
    found = rows(report)
    assert set(found) == set(EVERYTHING)
    for name in ("fid", "sfid", "kid", "fd-clip", "cmmd", "clip-score", "psnr", "lpips", "rfid"):
        assert found[name].verdict.startswith("A better"), (name, found[name])
    assert found["fid"].label == "FD"  # these features are not Inception's
    assert report.sweeps[0].values == (0, 0.5)
    at_zero = {row.metric: row.estimates for row in report.sweeps[0].rows[0]}
    assert at_zero["fid"][0] == at_zero["fid"][1]  # both models without it are one
    assert at_zero["fid"][0] == found["fid"].estimates[0]
    for shown in (row for gallery in report.galleries for row in gallery.rows):
        for path in shown.images:
            assert (tmp_path / "work" / path).exists()
    made = len(calls)
    again = evaluate(sides, plan, Workspace(tmp_path / "work"))
    assert again == report
    assert len(calls) == made  # nothing is made twice
    save_report(report, tmp_path / "report.json")


def test_the_same_model_is_not_called_different(reference: Path, tmp_path: Path) -> None:
    plan = EvaluationPlan(("fid", "clip-score"), data=str(reference), n=60, clip="toy")
    found = rows(evaluate([artist(0.5), artist(0.5)], plan, Workspace(tmp_path)))
    assert {row.verdict for row in found.values()} == {"no difference"}


def test_autoencoders_for_other_sizes_are_not_compared(reference: Path, tmp_path: Path) -> None:
    sides = [artist(0.5), replace(artist(0.5), size=2 * SIDE)]
    report = evaluate(sides, EvaluationPlan(("psnr",), data=str(reference), n=4), Workspace(tmp_path))
    assert rows(report)["psnr"].comparison is None
    assert report is not None
    assert any("different sizes" in note for note in report.notes)


def test_an_interrupted_evaluation_goes_on(reference: Path, tmp_path: Path) -> None:
    plan = EvaluationPlan(("fid", "clip-score"), data=str(reference), n=90, clip="toy", batch=4)
    whole = evaluate([artist(0.5)], plan, Workspace(tmp_path / "whole"))
    model = artist(0.5)
    for allowed in (3, 9):
        left = [allowed]

        def failing(
            prompts: list[str], seeds: list[int], changes: Mapping[str, float], left: list[int] = left
        ) -> list[Image.Image]:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return model.make(prompts, seeds, changes)

        broken = Model(model.source, model.digest, SIDE, failing, None, model.settings)
        with pytest.raises(KeyboardInterrupt):
            evaluate([broken], plan, Workspace(tmp_path / "again"))
    assert evaluate([model], plan, Workspace(tmp_path / "again")) == whole


def test_folders_are_compared_where_their_images_belong_together(reference: Path, tmp_path: Path) -> None:
    a = drawings(tmp_path / "a", 60, 7)
    b = drawings(tmp_path / "b", 60, 8, lambda image: tinted(image, 0.5))
    plan = EvaluationPlan(("fid", "clip-score"), data=str(reference), clip="toy")
    report = evaluate([a, b], plan, Workspace(tmp_path / "work"))
    assert rows(report)["fid"].verdict.startswith("A better")
    (b / "0003.png").rename(b / "z.png")
    (b / "0003.txt").rename(b / "z.txt")
    report = evaluate([a, b], plan, Workspace(tmp_path / "work"))
    assert report is not None
    assert rows(report)["fid"].comparison.count == 59  # type: ignore[union-attr]
    assert any("the 59 images that both" in note for note in report.notes)
    samples = report.galleries[0]
    assert (samples.rows[3].text, samples.rows[3].images) == (
        caption(4),
        ("shown/a-000004.png", "shown/b-000003.png"),
    )
    for number in range(10, 20):
        (b / f"{number:04}.png").rename(b / f"y{number}.png")
        (b / f"{number:04}.txt").rename(b / f"y{number}.txt")
    report = evaluate([a, b], plan, Workspace(tmp_path / "work"))
    assert report is not None
    assert rows(report)["fid"].comparison is None
    assert any("not compared" in note for note in report.notes)
    assert [(one.title, one.columns) for one in report.galleries[:3]] == [
        ("Samples, A", ("A",)), ("Samples, B", ("B",)), ("Best by CLIP score, A", ("A",)),
    ]  # fmt: skip


def test_images_of_the_same_name_in_several_folders_keep_apart(tmp_path: Path, reference: Path) -> None:
    for side in "ab":
        for part in ("x", "y"):
            drawings(tmp_path / side / part, 6, ord(part))
    report = evaluate(
        [tmp_path / "a", tmp_path / "b"], EvaluationPlan(("kid",), data=str(reference)), Workspace(tmp_path / "work")
    )
    assert rows(report)["kid"].comparison.count == 12  # type: ignore[union-attr]
    assert rows(report)["kid"].verdict == "no difference"


def test_images_of_the_reference_are_noticed(reference: Path, tmp_path: Path) -> None:
    folder = drawings(tmp_path / "a", 6, 7)
    Image.open(reference / "0009.png").save(folder / "0000.bmp")
    report = evaluate([folder], EvaluationPlan(("kid",), data=str(reference)), Workspace(tmp_path / "work"))
    assert report is not None
    assert report.notes == ("1 of 7 images of A are in the reference too, so that distances from it are too small",)


def test_copies_are_more_than_expected(reference: Path, tmp_path: Path) -> None:
    training = drawings(tmp_path / "training", 40, 5)
    plan = EvaluationPlan(("memorisation",), data=str(reference), training=str(training), n=40)
    report = evaluate([training, drawings(tmp_path / "new", 40, 6)], plan, Workspace(tmp_path / "work"))
    assert report is not None
    (note,) = (note for note in report.notes if note.startswith("near copies"))
    assert "0.050 is to be expected" in note
    assert "A p < 0.001, B p = 0." in note


def test_mixed_sizes_and_damaged_images(reference: Path, tmp_path: Path) -> None:
    a, b = (drawings(tmp_path / name, 60, 7) for name in "ab")
    Image.open(a / "0003.png").resize((90, 64)).save(a / "0003.png")
    data = (a / "0005.png").read_bytes()
    (a / "0005.png").write_bytes(data[: len(data) // 2])
    (b / "0007.png").write_bytes(b"no image")
    plan = EvaluationPlan(("fid", "clip-score"), data=str(reference), clip="toy")
    report = evaluate([a, b], plan, Workspace(tmp_path / "work"))
    assert report is not None
    assert report.sides[0].count == report.sides[1].count == 59
    assert rows(report)["clip-score"].comparison.count == 58  # type: ignore[union-attr]
    assert any("1 of 60 images cannot be read" in note and "0005.png" in note for note in report.notes)
    assert any("1 of 60 images cannot be used" in note and "0007.png" in note for note in report.notes)
    for number in range(10, 20):
        (a / f"{number:04d}.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(LdmError, match="11 of 60 images cannot be read"):
        evaluate([a], plan, Workspace(tmp_path / "work"))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (EvaluationPlan((), clip="toy"), "no metric is asked for"),
        (EvaluationPlan(("fid", "clip-scroe"), data="R"), "did you mean clip-score"),
        (EvaluationPlan(("fid",)), "compares with other images"),
        (EvaluationPlan(("clip-score",)), "--clip"),
        (EvaluationPlan(("psnr",), data="R"), "about a model's autoencoder"),
        (EvaluationPlan(("memorisation",), data="R"), "--training"),
        (EvaluationPlan(("fid",), data="R", sweeps={"steps": (1,)}), "--sweep"),
        (EvaluationPlan(("fid",), data="R", n=1), "n is 1"),
        (EvaluationPlan(("precision",), data="R", n=20), "at least 40"),
        (EvaluationPlan(("precision",), data="R"), "at least 40"),
        (EvaluationPlan(("fid",), data="R", n=1000), "holds 12 images, but 1000 are asked for"),
        (EvaluationPlan(("fid",), data="nowhere"), "nowhere does not exist"),
    ],
)
def test_what_cannot_be_done_is_said(plan: EvaluationPlan, message: str, tmp_path: Path, reference: Path) -> None:
    folder = drawings(tmp_path / "a", 12, 0)
    data = str(reference) if plan.data == "R" else plan.data
    with pytest.raises(LdmError, match=message):
        evaluate([folder], EvaluationPlan(**{**vars(plan), "data": data}), Workspace(tmp_path / "work"))


def test_missing_captions_and_empty_folders(reference: Path, tmp_path: Path) -> None:
    bare = drawings(tmp_path / "bare", 12, 0)
    (bare / "0004.txt").unlink()
    with pytest.raises(LdmError, match=r"0004\.png has no caption"):
        evaluate([bare], EvaluationPlan(("clip-score",), clip="toy"), Workspace(tmp_path / "work"))
    for path in bare.glob("*.png"):
        path.with_suffix(".txt").write_text("a red circle")
    with pytest.raises(LdmError, match="R-precision needs different captions"):
        evaluate([bare], EvaluationPlan(("r-precision",), clip="toy"), Workspace(tmp_path / "work"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmError, match="holds no image"):
        evaluate([tmp_path / "empty"], EvaluationPlan(("fid",), data=str(reference)), Workspace(tmp_path / "work"))
    single = drawings(tmp_path / "single", 1, 0)
    with pytest.raises(LdmError, match="1 images; at least 2"):
        evaluate([single], EvaluationPlan(("fid",), data=str(reference)), Workspace(tmp_path / "work"))


def test_metrics_whose_published_weights_are_looked_for_early() -> None:
    for network, early in (("features", OF_FEATURES), ("copies", OF_COPIES)):
        assert {name for name, row in METRICS.items() if row.network == network} == early


def test_a_new_metric_is_one_row(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ldm eval` has its figures, its interval and its comparison, in the terminal and in the report."""
    functions = on_images(lambda images: INCEPTION(images)[:, 0], mean_interval)
    monkeypatch.setitem(METRICS, "made-up", Metric("Made up", "higher", "features", *functions, reference=False))
    a = drawings(tmp_path / "a", 12, 7)
    b = drawings(tmp_path / "b", 12, 7, lambda image: tinted(image, 1.0))
    asked = "--metrics", "made-up", "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--device", "cpu"
    code, out, err = run(capsys, monkeypatch, "eval", a, b, *asked)
    assert (code, err) == (0, "")
    assert "Made up ↑" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = (row for table in report["tables"] for row in table["rows"])
    figures, difference = row["estimates"], row["comparison"]
    assert figures[0]["low"] < figures[0]["value"] < figures[0]["high"]
    assert difference["difference"] == pytest.approx(figures[0]["value"] - figures[1]["value"])
    assert row["verdict"]
    assert "Made up" in (tmp_path / "out" / "report.html").read_text()


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_chunks_are_found_again_and_mended(tmp_path: Path) -> None:
    computed: list[range] = []

    def find(numbers: range) -> ChunkValues:
        computed.append(numbers)
        if len(computed) == 3:
            raise KeyboardInterrupt
        kept = [number for number in numbers if number != 7]
        return ChunkValues(
            {"x": torch.tensor(kept).float()[:, None]}, kept, str(numbers), {"7": "bad"} if 7 in numbers else {}
        )

    count = 3 * CHUNK + 5
    with pytest.raises(KeyboardInterrupt):
        in_chunks("x", "name", count, find, Workspace(tmp_path))
    chunk = tmp_path / "found" / "name" / "000001.safetensors"
    content = bytearray(chunk.read_bytes())
    content[-3] ^= 1
    chunk.write_bytes(content)
    found = in_chunks("x", "name", count, find, Workspace(tmp_path))
    assert computed[3:] == [range(CHUNK, 2 * CHUNK), range(2 * CHUNK, 3 * CHUNK), range(3 * CHUNK, count)]
    assert found.values["x"][:, 0].tolist() == found.index.tolist() == [n for n in range(count) if n != 7]
    assert found.skipped == {"7": "bad"}
    assert [path.name for path in (tmp_path / "found" / "name").glob("[!.]*")] == ["all.safetensors"]
    assert in_chunks("x", "name", count, find, Workspace(tmp_path)).digest == found.digest
    assert len(computed) == 6


def test_one_process_at_a_time(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from ldm.errors import LdmError
from ldm.evaluation.workspace import file_lock
try:
    with file_lock(Path(sys.argv[1]), "in use"):
        print("free")
except LdmError as error:
    print(error)
"""

    def other() -> str:
        return subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True).stdout

    with file_lock(tmp_path / "x"):
        assert other() == "in use\n"
    assert other() == "free\n"
    with pytest.raises(LdmError, match="cannot be written"), file_lock(tmp_path):
        pass


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    def read(number: int) -> tuple[str, Image.Image]:
        raise LdmError(f"{number} is broken")

    with pytest.raises(LdmError, match="no image can be read: 0 is broken"):
        in_chunks("x", "n", 3, lambda numbers: extract(numbers, read, Toy().prepare, Toy()), Workspace(tmp_path))


def test_a_changed_image_is_measured_again(tmp_path: Path) -> None:
    folder = drawings(tmp_path / "a", 3, 0)
    before = images_of(folder, Workspace(tmp_path / "w")).stamp
    assert images_of(folder, Workspace(tmp_path / "w")).stamp == before
    Image.new("RGB", (9, 9)).save(folder / "0001.png")
    assert images_of(folder, Workspace(tmp_path / "w")).stamp != before
