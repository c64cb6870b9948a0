"""The page's tab of training in a browser: curves, previews and evaluations of runs, while they go on and afterwards.

No console has an error, and no request leaves the host.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from browsers import PATIENCE_MS, browser, needed, visit
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.pages.page import write_page
from ldm.evaluation.report import Report, Row, Side, Table, save_report
from ldm.server.limits import Limits
from ldm.server.runs import Runs
from ldm.server.service import Service
from ldm.server.serving import in_thread
from ldm.server.trainings import Trainer, TrainingOrder
from pipelines import Pipeline

__all__ = ["browser"]  # a fixture
USUAL_MS = 5_000  # playwright's own patience
pytestmark = needed
ODD = "<b>odd</b>"  # must be shown as text


def run(folder: Path, steps: int, step: int, preview: int) -> None:
    """A run's folder, with a log of each tenth step."""
    stage = folder / "base"
    (stage / "previews").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"stages: [base]\nbase: {{steps: {steps}, batch: 8, log_every: 10}}\n")
    for number in range(10, step + 1, 10):
        write(folder, number)
    for number in range(preview, step + 1, preview):
        Image.new("RGB", (64, 32), (number % 255, 0, 99)).save(stage / "previews" / f"step-{number:08d}.png")


def write(folder: Path, step: int) -> None:
    """Two lines of a run's log."""
    figures = {"loss/unet": 1 / step, "gradient/unet": 2.0, "images_per_s": 16.0, "waiting": 0.1}
    with (folder / "base" / "metrics.jsonl").open("a") as file:
        for line in (figures, {"validation/loss": 2 / step}):
            file.write(json.dumps({"step": step, **line}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    run(found / "going", 1000, 400, 100)
    run(found / "over", 100, 100, 50)
    (found / "over" / "base" / "done.json").write_text('{"steps": 100}')
    run(found / "left", 1000, 50, 1000)
    for path in (found / "left", *(found / "left").rglob("*")):
        os.utime(path, (time.time() - 7200,) * 2)
    rows = (Row("psnr", "PSNR", "higher", (Estimate(29.03, 29.03, 0.5, 28.0, 30.0, 20),)),)
    report = Report((Side("A", f"models/{ODD}", "abc", 20),), None, (Table(None, rows),), notes=(ODD,))
    place = found / "over" / "base" / "evaluation" / "step-00000100" / "ema"
    place.mkdir(parents=True)
    save_report(report, place / "report.json")
    page = write_page(report, place)
    page.write_text(page.read_text().replace("</main>", "<script>document.title = 'run'</script></main>"))
    return found


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    pipeline = Pipeline(tiny.model("sd15", shallow=True), dtype=torch.float32)
    return Service(pipeline, {}, Limits(), runs=Runs.at(folder))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with in_thread(service) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    expect.set_options(timeout=PATIENCE_MS)
    yield
    expect.set_options(timeout=USUAL_MS)


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The tab, which notes what must not be."""
    problems: list[str] = []
    found = visit(browser, address, problems, "/#train")
    found.locator(".run h2").wait_for()
    yield found
    found.close()
    assert problems == []


def item(page: Page, name: str) -> Locator:
    return page.locator(".run-list button").filter(has=page.locator(".name", has_text=re.compile(f"^{name}$")))


def choose(page: Page, name: str) -> None:
    item(page, name).click()
    expect(page.locator(".run h2")).to_have_text(name)
    page.locator(".chart polyline:visible").first.wait_for()


def test_a_run_that_goes_on(page: Page, folder: Path) -> None:
    os.utime(folder / "going")
    expect(item(page, "going")).to_contain_text("running, step 400 of 1,000, 5 min left")
    expect(item(page, "left")).to_contain_text("stopped")
    choose(page, "going")
    stage = page.locator(".stage")
    expect(stage).to_contain_text("step 400 of 1,000 · 16 images a second · about 5 min left")
    loss = page.locator(".chart-box", has_text="Loss")
    expect(loss.locator("polyline")).to_have_count(2)
    expect(loss.locator("output")).to_contain_text("step 400: unet 0.0025 validation 0.005")
    preview = page.get_by_label("Preview", exact=True)
    expect(page.locator(".previews output")).to_have_text("step 400")
    write(folder / "going", 410)
    Image.new("RGB", (64, 32)).save(folder / "going" / "base" / "previews" / "step-00000410.png")
    expect(stage).to_contain_text("step 410 of 1,000")
    expect(loss.locator("output")).to_contain_text("step 410")
    expect(page.locator(".previews output")).to_have_text("step 410")  # who looks at the last one sees the new
    preview.press("Home")
    expect(page.locator(".previews output")).to_have_text("step 100")
    image = page.locator(".large-preview")
    expect(image).to_have_attribute("alt", "Preview: step 100")
    page.get_by_role("button", name="Later preview").click()
    expect(image).to_have_attribute("alt", "Preview: step 200")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64


def test_a_run_that_stopped(page: Page) -> None:
    choose(page, "left")
    expect(page.locator(".run > .quiet")).to_contain_text("no file has changed for 2 h")
    expect(page.locator(".stage")).not_to_contain_text("left,")


def test_curves_are_read_by_key_pointer_and_table(page: Page) -> None:
    choose(page, "over")
    loss = page.locator(".chart-box", has_text="Loss")
    svg = loss.locator("svg")
    said = svg.get_attribute("aria-label") or ""
    assert "unet: 0.1 at step 10, 0.01 at step 100, between 0.01 and 0.1" in said
    svg.focus()
    for key, step in (("Home", 10), ("ArrowRight", 20), ("End", 100), ("ArrowLeft", 90)):
        svg.press(key)
        expect(loss.locator("output")).to_contain_text(f"step {step}: ")
    box = svg.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    expect(loss.locator("output")).to_contain_text("step 10: unet 0.1 validation 0.2")
    page.mouse.move(5, 5)
    loss.locator("summary").click()
    rows = loss.locator("tbody tr")
    expect(rows).to_have_count(10)
    assert rows.first.inner_text().split() == ["10", "0.1", "0.2"]
    before = loss.locator("polyline").first.get_attribute("points")
    page.get_by_label("Logarithmic").check()
    assert loss.locator("polyline").first.get_attribute("points") != before
    page.locator("summary", has_text="Speed, learning rate").click()
    expect(page.locator(".chart-box", has_text="Images a second").locator("svg")).to_be_visible()


def test_an_evaluation_opens(page: Page) -> None:
    choose(page, "over")
    report = page.locator(".reports details")
    if not report.get_attribute("open"):
        expect(report).to_have_attribute("open", "")
    expect(report.locator("summary")).to_have_text("base, step 100, ema")
    assert report.locator("tbody tr").first.inner_text().split()[:2] == ["PSNR", "higher"]
    expect(report).to_contain_text("28.00 to 30.00")
    expect(report).to_contain_text(ODD)
    assert page.locator(".run b").count() == 0
    with page.context.expect_page() as opened:
        report.get_by_role("link", name="Open the whole report").click()
    whole = opened.value
    whole.wait_for_load_state()
    expect(whole.locator("h1")).to_contain_text("Evaluation of")
    assert whole.title() != "run"  # its scripts do not run
    assert whole.locator("table.figures").evaluate("table => getComputedStyle(table).borderCollapse") == "collapse"
    assert whole.evaluate("self.origin") == "null"
    whole.close()


def test_keys_and_narrow_screens(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, "over")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("tab", name="Train").focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.run-list') !== null")
    page.keyboard.press("Enter")
    expect(page.locator(".run-list button[aria-pressed=true]")).to_have_count(1)
    name = page.locator(".run-list button[aria-pressed=true] .name").inner_text()
    page.reload()
    expect(page.locator(".run h2")).to_have_text(name)
    expect(item(page, name)).to_have_attribute("aria-pressed", "true")


def test_an_adapter_of_own_images(page: Page, service: Service, folder: Path, tmp_path: Path) -> None:
    service.trainer = Trainer(Runs.at(folder), Slow(), tmp_path)
    try:
        page.reload()
        page.get_by_role("button", name="New adapter").click()
        page.get_by_role("button", name="Start to train").click()
        expect(page.get_by_role("alert").filter(has_text="there are no images yet")).to_be_visible()
        Image.effect_noise((3000, 1000), 90).save(tmp_path / "large.png")
        Image.new("RGB", (64, 64), "red").save(tmp_path / "small.png")
        page.locator(".train-form input[type=file]").set_input_files([tmp_path / "large.png", tmp_path / "small.png"])
        expect(page.locator(".thumbs li")).to_have_count(2)
        page.get_by_label("Remove small.png").click()
        page.get_by_label("Caption of large.png").fill("a gray noise")
        form = page.locator(".train-form")
        form.get_by_label("Trigger").fill("sks")
        form.get_by_label("Steps").fill("7")
        form.get_by_label("Kind").select_option("textual-inversion")
        expect(form.get_by_label("Rank")).to_be_hidden()
        form.get_by_label("Kind").select_option("lora")
        page.get_by_role("button", name="Start to train").click()
        expect(page.locator(".run h2")).to_have_text(re.compile(r"\d{8}-\d{6}-"))
        (place,) = folder.glob("2*")
        with Image.open(place / "images" / "001.png") as written:
            assert written.size == (1897, 632)
        assert (place / "images" / "001.txt").read_text() == "a gray noise"
        expect(page.locator(".said")).to_contain_text("begins with 7")
        page.get_by_role("button", name="Stop", exact=True).click()
        expect(page.locator(".run > .quiet")).to_contain_text("Stopped")
        expect(page.get_by_title("It saves a checkpoint first")).to_be_hidden()
    finally:
        service.trainer.close()
        service.trainer = None


class Slow:
    """In place of `ldm train-adapter`: a program that does not end."""

    def __call__(self, order: TrainingOrder, images: Path, output: Path) -> list[str]:
        assert (order.trigger, order.rank) == ("sks", None)
        code = f"import time; print('begins with {order.steps}', flush=True); time.sleep(600)"
        return [sys.executable, "-c", code]


def test_a_server_without_runs(
    browser: Browser, service: Service, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "runs", None)
    page = browser.new_page()
    page.goto(f"{address}/#train")
    expect(page.get_by_text("ldm serve --runs FOLDER")).to_be_visible()
    page.close()
