"""The page in a browser: a visitor makes images, cancels, paints, varies, drops a file, finds images again, compares.

No console has an error, and no request leaves the host.
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapter_files
import pytest
import tiny
import torch
from browsers import PATIENCE_MS, browser, needed, visit
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from servers import noting

from ldm.server.engine import NotTakenError
from ldm.server.history import History
from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline

__all__ = ["browser"]  # a fixture
pytestmark = needed


@dataclass
class Site:
    """A server, and what the browser has asked for."""

    address: str
    service: Service
    problems: list[str] = field(default_factory=list)  # lines of the console, requests to elsewhere


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("loras")
    model = tiny.model("sd15", shallow=True)
    adapter_files.saved(adapter_files.adapter(model, "kohya"), folder / "style.safetensors")
    return Pipeline(model, lora_dir=folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def site(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    history = History(tmp_path_factory.mktemp("history"))
    service = Service(pipeline, {}, Limits(steps=900), history=history)
    with noting(), in_thread(service) as address:
        yield Site(address, service)
    history.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    found = visit(browser, site.address, site.problems)
    found.get_by_label("Prompt", exact=True).wait_for()
    yield found
    found.close()
    assert site.problems == []


def fill(page: Page, **values: str) -> None:
    for name, value in {"Width": "64", "Height": "64", "Steps": "2", **values}.items():
        page.get_by_label(name, exact=True).fill(value)


def finished(page: Page, count: int) -> None:
    expect(page.locator("#panel-generate .card figcaption .prompt")).to_have_count(count, timeout=PATIENCE_MS)


def drop(page: Page, name: str, data: bytes, on: str) -> None:
    """Drop a file on an element."""
    script = """([name, text]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, {type: "image/png"}));
        return data;
    }"""
    transfer = page.evaluate_handle(script, [name, base64.b64encode(data).decode()])
    page.dispatch_event(on, "drop", {"dataTransfer": transfer})


def test_a_visitor_makes_images_and_finds_them_again(page: Page, site: Site) -> None:
    fill(page, Prompt="a fox (red:1.2)", Images="2", Seed="41")
    page.get_by_label("Adapters").select_option("style")
    page.get_by_label("style", exact=True).fill("0.5")
    page.keyboard.press("Control+Enter")
    finished(page, 2)
    assert page.locator(".card .seed").all_inner_texts() == ["seed 41", "seed 42"]
    expect(page.locator("#said")).to_have_text("The image is done.")
    page.reload()
    finished(page, 2)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox (red:1.2)")
    page.get_by_role("button", name="Show large: a fox").first.click()
    about = page.locator("dialog dl").inner_text()
    assert re.search(r"adapters\s+style 0.5", about) and re.search(r"seed\s+41", about) and "rescale" not in about
    page.keyboard.press("Escape")
    for name in ("Generate", "Compare"):
        page.get_by_role("tab", name=name).press("ArrowRight")
    expect(page.locator("#panel-history .card")).to_have_count(2, timeout=PATIENCE_MS)
    page.get_by_label("Search").fill("42 FOX")
    expect(page.locator("#panel-history .card")).to_have_count(1, timeout=PATIENCE_MS)
    page.locator("#panel-history").get_by_role("button", name="Delete").click()
    expect(page.locator("#panel-history .card")).to_have_count(0)
    page.get_by_label("Search").fill("")
    expect(page.locator("#panel-history .card")).to_have_count(1, timeout=PATIENCE_MS)
    assert [kept.record["seed"] for kept in site.service.history.find()[0]] == [41]  # type: ignore[union-attr]


@pytest.fixture
def paced(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take a while: a job of many is not over before a visitor has seen it and cancels."""
    step = site.service.engine._step

    def slow() -> None:
        time.sleep(0.05)
        step()

    monkeypatch.setattr(site.service.engine, "_step", slow)


def test_cancel(page: Page, site: Site, paced: None) -> None:
    """By the key and by the button, of two jobs that run together."""
    fill(page, Prompt="a fox", Steps="800")
    for _ in range(2):
        page.get_by_role("button", name="Make images").click()
    page.locator(".card.waiting img.preview:visible").first.wait_for()  # a preview
    page.keyboard.press("Escape")
    expect(page.locator(".card figcaption", has_text="cancelled")).to_have_count(1, timeout=PATIENCE_MS)
    page.locator(".card.waiting").get_by_role("button", name="Cancel").click()
    expect(page.locator(".card figcaption", has_text="cancelled")).to_have_count(2, timeout=PATIENCE_MS)
    assert {job.state for job in site.service.jobs.values()} <= {"done", "cancelled"}
    page.get_by_role("button", name="Put away").first.click()
    assert page.locator(".card").count() == 1


def test_mask_and_variation(page: Page, site: Site) -> None:
    fill(page, Prompt="a fox", Seed="3")
    page.get_by_role("button", name="Make images").click()
    finished(page, 1)
    page.get_by_role("button", name="As start").click()
    page.get_by_role("button", name="Paint a mask").click()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert").filter(has_text="paint what is to be made anew")).to_be_visible()
    canvas = page.locator("canvas.mask")
    size = page.get_by_label("Size", exact=True)
    before = int(size.input_value())
    canvas.press("]")
    assert int(size.input_value()) > before
    box = canvas.bounding_box()
    assert box is not None
    for _ in range(2):
        page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.25)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.25, steps=3)
        page.mouse.up()
    canvas.press("Control+z")
    with page.expect_request("**/v1/jobs") as asked:
        page.keyboard.press("Control+Enter")
    finished(page, 2)
    body = asked.value.post_data_json
    assert body["strength"] == 1 and body["image"].startswith("data:image/png;base64,")
    painted, given = (page.evaluate(PIXELS, body[name]) for name in ("mask", "image"))
    assert painted[16 * 64 + 32] == 255 and painted[60 * 64 + 32] == 0
    made = page.evaluate(PIXELS, page.locator("#panel-generate .card .view img").first.get_attribute("src"))
    kept = [place for place in range(64 * 64) if not painted[place]]
    assert kept and all(made[place] == given[place] for place in kept)
    page.locator(".card").last.get_by_role("button", name="Vary").click()
    finished(page, 3)
    job = list(site.service.jobs.values())[-1]
    assert job.made[0] is not None and job.made[0].record["strength"] == 0.5  # a step of two
    page.locator(".card").last.get_by_role("button", name="Again").click()
    finished(page, 4)
    assert list(site.service.jobs.values())[-1].request.seeds != (3,)


def test_margins_beside_a_mask(page: Page, site: Site, tmp_path: Path) -> None:
    """The canvas in its proportions, the mask painted on the image alone; an image as start begins without margins."""
    Image.effect_noise((96, 64), 90).convert("RGB").save(tmp_path / "start.png")
    fill(page, Prompt="a fox", Width="", Height="", Seed="3")
    page.locator("summary", has_text="Start from an image").click()
    drop(page, "start.png", (tmp_path / "start.png").read_bytes(), ".section[data-name=image] .drop")
    strength = page.locator(".slider output")
    expect(strength).to_have_text("0.80")
    for side, value in (("Left", "32"), ("Bottom", "1.5")):
        page.get_by_label(side, exact=True).fill(value)
    expect(strength).to_have_text("1.00")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert").filter(has_text="Bottom: a whole number of pixels is needed")).to_be_visible()
    page.get_by_label("Bottom", exact=True).fill("16")
    page.get_by_role("button", name="Paint a mask").click()
    canvas, surface = (page.locator(name).bounding_box() for name in (".canvas", "canvas.mask"))
    assert canvas is not None and surface is not None
    assert [canvas["width"] / canvas["height"], surface["width"] / canvas["width"]] == pytest.approx(
        [1.6, 0.75], abs=0.02
    )
    assert surface["x"] - canvas["x"] == pytest.approx(canvas["width"] / 4, abs=2)
    with page.expect_request("**/v1/jobs") as asked:
        page.keyboard.press("Control+Enter")
    finished(page, 1)
    body = asked.value.post_data_json
    assert body["margins"] == [32, 0, 0, 16] and body["strength"] == 1 and "mask" not in body  # nothing is painted
    page.locator("canvas.mask").click(position={"x": surface["width"] * 0.75, "y": surface["height"] * 0.25})
    with page.expect_request("**/v1/jobs") as asked:
        page.keyboard.press("Control+Enter")
    finished(page, 2)
    painted = page.evaluate(PIXELS, asked.value.post_data_json["mask"])
    assert len(painted) == 96 * 64 and painted[16 * 96 + 72] == 255 and painted[16 * 96 + 24] == 0
    page.get_by_role("button", name="Vary").first.click()
    finished(page, 3)
    made = [job.made[0] for job in list(site.service.jobs.values())[-3:]]
    assert [one.image.size for one in made if one] == [(128, 80)] * 3 and made[2] and "margins" not in made[2].record
    page.get_by_role("button", name="Use settings").nth(1).click()
    expect(page.get_by_label("Left", exact=True)).to_have_value("32")
    page.get_by_role("button", name="As start").first.click()
    expect(page.get_by_label("Left", exact=True)).to_have_value("")
    expect(page.get_by_alt_text("The image to start from")).to_be_visible()


PIXELS = """async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, place) => place % 4 === 0);
}"""


def test_a_dropped_image_fills_the_form(page: Page, site: Site, tmp_path: Path) -> None:
    job = site.service.accept({"prompt": "a dog", "size": "64x72", "steps": 3, "seed": 2**63 - 1, "eta": 0.5})
    job.result(60)
    fill(page, Prompt="a fox", Images="3")
    data = site.service.png(job, 0)
    assert data is not None
    drop(page, "dog.png", data, "body")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a dog")
    values = {name: page.get_by_label(name, exact=True).input_value() for name in ("Width", "Height", "Seed", "Images")}
    assert values == {"Width": "64", "Height": "72", "Seed": str(2**63 - 1), "Images": ""}
    with page.expect_request("**/v1/jobs") as asked:
        page.keyboard.press("Control+Enter")
    assert f'"seed":{2**63 - 1}' in (asked.value.post_data or "") and '"eta":0.5' in (asked.value.post_data or "")
    finished(page, 1)
    Image.new("L", (8, 8)).save(tmp_path / "none.png")
    drop(page, "none.png", (tmp_path / "none.png").read_bytes(), "body")
    expect(page.get_by_role("alert").filter(has_text="does not say how it was made")).to_be_visible()
    site.problems[:] = [line for line in site.problems if "400 (Bad Request)" not in line]  # the browser's own line


def test_problems_stand_where_they_belong(page: Page, site: Site) -> None:
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("a prompt is needed")).to_be_visible()
    fill(page, Prompt="a fox", Width="65")
    page.keyboard.press("Control+Enter")
    problem = page.locator(".field", has=page.get_by_label("Width", exact=True)).locator(".problem")
    expect(problem).to_contain_text("a multiple of 8")
    expect(page.get_by_label("Width", exact=True)).to_be_focused()
    site.problems[:] = [line for line in site.problems if "400 (Bad Request)" not in line]
    page.locator("summary", has_text="All settings").click()
    page.get_by_label("Find a setting").fill("token merging")
    expect(page.locator(".section[data-name=others] .field:visible")).to_have_count(1)
    page.get_by_label("Merge", exact=True).fill("3")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("at most 0.75")).to_be_visible()


def test_a_new_setting_has_a_field(browser: Browser, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = site.service.schema()
    schema["properties"]["sparkle"] = {"type": "number", "minimum": 0, "maximum": 1, "description": "Glitter."}
    monkeypatch.setattr(site.service, "schema", lambda: schema)
    page = visit(browser, site.address, site.problems)
    page.locator("summary", has_text="All settings").click()
    expect(page.get_by_label("Sparkle", exact=True)).to_be_visible()
    page.close()


def test_the_keyboard_reaches_all_and_a_narrow_screen_shows_all(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_label("Prompt", exact=True).focus()
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText"))
    assert order == ["Negative prompt", "Width", "⇄", "Height", "Steps", "Guidance", "Scheduler", "Images", "Seed"]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


# --- the tab that compares --------------------------------------------------------------------------------------------


def axes(page: Page, columns: str, across: str, rows: str = "", down: str = "") -> None:
    """Choose a setting with its values for the columns, and for the rows, of the open tab."""
    for title, name, values in (("Columns", columns, across), ("Rows", rows, down)):
        page.get_by_label(title, exact=True).select_option(name)
        if name:
            page.get_by_label(f"Values of the {title.lower()}").fill(values)


def counted(page: Page, text: str) -> None:
    expect(page.locator("#panel-compare").get_by_role("status")).to_have_text(text, timeout=PATIENCE_MS)


def test_a_visitor_compares(page: Page, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cells, of which one is cancelled; the sheet; a cell's settings; and the same after a reload."""
    cancelled, step = threading.Event(), site.service.engine._step

    def held() -> None:
        cancelled.wait(PATIENCE_MS / 1000)
        step()

    monkeypatch.setattr(site.service.engine, "_step", held)
    fill(page, Prompt="a fox", Seed="5")
    page.get_by_role("tab", name="Compare").click()
    axes(page, "steps", "2, 100", "guidance", "1,3")
    page.keyboard.press("Control+Enter")
    cells = page.locator(".cells tbody td")
    cells.last.get_by_role("button", name="Cancel").click()
    expect(cells.last).to_contain_text("cancelled")
    cancelled.set()
    counted(page, "3 of 4 images")
    expect(page.locator("#said")).to_have_text("The grid is done: 3 of 4 images.")
    assert page.locator(".cells th").all_inner_texts() == ["steps 2", "steps 100", "guidance 1", "guidance 3"]
    made = list(site.service.jobs.values())[-4:]
    images = [job.made[0] for job in made if job.made[0] is not None]
    found = {(one.record["steps"], one.record["guidance"]["scale"]): one.image for one in images}
    assert found.keys() == {(2, 1), (100, 1), (2, 3)}
    assert {one.record["seed"] for one in images} == {5} and sorted(job.state for job in made) == [
        "cancelled",
        *["done"] * 3,
    ]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download sheet").click()
    assert download.value.suggested_filename == "grid-5.png"
    download.value.save_as(tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    whole = {(x, y): sheet.getpixel((x, y)) for x in range(sheet.width) for y in range(sheet.height)}
    right, bottom = sheet.width, sheet.height  # labels are at least 96 pixels wide, and images of 64 in their middle
    assert whole[right - 1, bottom - 1] == whole[right - 96, bottom - 64] == (211, 211, 211)
    box = (right - 2 * 96 - 4 + 16, bottom - 2 * 64 - 4, right - 96 - 4 - 16, bottom - 64 - 4)
    assert sheet.crop(box).tobytes() == found[2, 1].convert("RGB").tobytes()
    page.reload()
    counted(page, "3 of 4 images")
    expect(page.get_by_label("Values of the columns")).to_have_value("2, 100")
    cells.nth(2).get_by_role("button", name="Show large").click()
    assert re.search(r"steps\s+2\s", page.locator("dialog dl").inner_text())
    page.locator("dialog").get_by_role("button", name="As start").click()
    expect(page.get_by_alt_text("The image to start from")).to_be_visible()


def test_words_weights_and_what_the_server_refuses(page: Page, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, asked = site.service.accept, []

    def once_full(given: dict[str, Any], *more: Any) -> Any:
        asked.append(given)
        if len(asked) == 1:
            raise NotTakenError("too many images wait")
        return accept(given, *more)

    monkeypatch.setattr(site.service, "accept", once_full)
    fill(page, Prompt="a fox", Steps="1", Seed="5")
    page.get_by_role("tab", name="Compare").click()
    axes(page, "replace", 'fox, "cat, oil"', "adapter style", "0, 0.5")
    page.get_by_role("button", name="Make grid").click()
    counted(page, "4 of 4 images")
    bodies = {(one["prompt"], one["adapters"]["style"]) for one in asked}
    assert bodies == {("a fox", 0), ("a fox", 0.5), ("a cat, oil", 0), ("a cat, oil", 0.5)} and len(asked) == 5
    axes(page, "width", "64, 65")
    page.get_by_role("button", name="Make grid").click()
    counted(page, "1 of 2 images")
    expect(page.locator(".cells td").last).to_contain_text("a multiple of 8")
    refused = ("400 (Bad Request)", "503 (Service Unavailable)")
    site.problems[:] = [line for line in site.problems if not any(one in line for one in refused)]


def test_what_is_no_grid(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("choose a setting for the columns")).to_be_visible()
    hundred = ", ".join(map(str, range(1, 101)))
    for columns, across, rows, down, message in (
        ("steps", "1, x", "", "", "a whole number is needed"),
        ("steps", "", "", "", "values are needed"),
        ("steps", "1,", "", "", "a value is empty"),
        ("steps", "1, 1", "", "", "each value once"),
        ("steps", "1, 2", "steps", "3", "columns and rows both set steps"),
        ("width", "64", "size", "64, 72", "columns and rows both set width"),
        ("steps", hundred, "guidance", hundred, "10,000 cells; at most 100"),
        ("prompt", '"a fox, oil, a cat', "", "", "a value with commas stands in double quotes"),
        ("weights", "off, maybe", "", "", "on or off is needed"),
        ("prompt", "a fox", "replace", "dog, cat", "do not have “dog”"),
    ):
        axes(page, columns, across, rows, down)
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()
    axes(page, "steps", "1, 2")
    page.keyboard.press("Control+Enter")  # without a prompt
    expect(page.get_by_text("a prompt is needed")).to_be_visible()


def test_a_grid_is_cancelled_together_and_scrolls_on_a_narrow_screen(page: Page, site: Site, paced: None) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    fill(page, Prompt="a fox", Steps="800")
    page.get_by_role("tab", name="Compare").click()
    axes(page, "guidance", "1, 2, 3, 4, 5, 6")
    page.keyboard.press("Control+Enter")
    page.locator(".cells img.preview:visible").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.keyboard.press("Escape")
    expect(page.locator(".cells td", has_text="cancelled")).to_have_count(6, timeout=PATIENCE_MS)
    assert all(job.over.wait(60) for job in site.service.jobs.values())
    page.locator(".cells").get_by_role("button", name="Make").last.click()
    page.locator(".cells img.preview:visible").first.wait_for()
    page.get_by_role("button", name="Cancel all").click()
    expect(page.locator(".cells td", has_text="cancelled")).to_have_count(6, timeout=PATIENCE_MS)


def test_a_key_is_asked_for(browser: Browser, pipeline: Pipeline) -> None:
    service = Service(pipeline, {}, Limits())
    with in_thread(service, "hunter-22") as address:
        page = browser.new_page()
        page.goto(address)
        for key in ("wrong-key", "hunter-22"):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Open").click()
        fill(page, Prompt="a fox", Seed="7")
        page.keyboard.press("Control+Enter")
        finished(page, 1)
        page.reload()
        finished(page, 1)  # with the key of the session
        assert page.evaluate("localStorage.length") == 0
        page.close()
