"""Headless Chromium for tests of HTML pages; a test skips, with the reason, where it is missing.

A test file says `pytest_plugins = ["tests.browser"]`; it must not import this module.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")  # no longer: an event loop of its own runs as long, and other tests may want theirs
def browser() -> Iterator["Browser"]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: "Browser") -> Iterator["Opened"]:
    found = Opened(browser)
    yield found
    found.close()


class Opened:
    """Files opened in the browser, each in a tab of its own, with what went wrong and what was asked for."""

    def __init__(self, browser: "Browser") -> None:
        self._browser = browser
        self._pages: list[Page] = []
        self.errors: list[str] = []
        self.requests: list[str] = []

    def __call__(self, path: Path, width: int = 1280, scheme: str = "light") -> "Page":
        page = self._browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # pyright: ignore
        page.on("console", lambda message: self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri())
        self._pages.append(page)
        return page

    def close(self) -> None:
        for page in self._pages:
            page.close()
