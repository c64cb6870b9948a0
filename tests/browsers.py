"""The page in a browser: chromium, if it is there, and pages that note what must not be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 60_000
needed = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def visit(browser: Browser, address: str, problems: list[str], path: str = "") -> Page:
    """A page of its own; errors of its console, and requests to elsewhere than the address, become problems."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda said: problems.append(f"{said.text} {said.location.get('url')}")
            if said.type in ("error", "warning") else None)  # fmt: skip
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "blob:", "data:")) else
            problems.append(asked.url))  # fmt: skip
    page.goto(address + path)
    return page
