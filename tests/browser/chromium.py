"""A real browser, headless and without network: Debian's Chromium (or $CHROMIUM), driven by Playwright."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


# once a module: the driver allows one of its kind at a time
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set CHROMIUM to its path")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with sync_api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS, timeout=120_000)
        yield launched
        launched.close()


class Opened:
    """A page that is open, with everything that went wrong on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def assert_clean(self) -> None:
        outside = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:", "about:"))]
        assert (self.errors, outside) == ([], [])


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open HTML text as a file, with the network off; at the end the page must be clean."""
    contexts, pages = [], []

    def opened(text: str, *, width: int = 1280, height: int = 900, **options: Any) -> Opened:
        path = tmp_path / f"page{len(pages)}.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(offline=True, viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(
            120_000
        )  # a report has 6 MB of scripts, and machines are busy; speed has its own test
        contexts.append(context)
        one = Opened(context.new_page())
        pages.append(one)
        one.page.goto(path.as_uri())
        return one

    yield opened
    for one in pages:
        one.assert_clean()
    for context in contexts:
        context.close()
