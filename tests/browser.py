"""The system's Chromium, driven by Playwright; run as a module it takes a picture of a gallery that is served.

`python -m tests.browser http://127.0.0.1:8000 page.png "two wine glasses below a christmas tree"` writes the picture of
the README; `--width 390`, `--dark` and `--why` give others.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    """Where the browser is; None where there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), headless=True, args=list(_QUIET)
        )
        yield browser
        browser.close()


def searched(page: Page, text: str) -> None:
    """Type a query, and wait for the results and their images."""
    page.get_by_label("Search text").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#orders .card[data-id]").first).to_be_visible()
    page.wait_for_load_state("networkidle")


def _main() -> None:
    arguments = argparse.ArgumentParser(description="Take a picture of a gallery.")
    arguments.add_argument("url")
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("query")
    arguments.add_argument("--width", type=int, default=1280)
    arguments.add_argument("--height", type=int, default=900)
    arguments.add_argument("--dark", action="store_true")
    arguments.add_argument("--maps", action="store_true", help="heat maps over the results")
    arguments.add_argument("--why", action="store_true", help="the best result in full")
    given = arguments.parse_args()
    with launched() as browser:
        page = browser.new_page(
            viewport={"width": given.width, "height": given.height},
            color_scheme="dark" if given.dark else "light",
        )
        page.goto(given.url)
        searched(page, given.query)
        if given.maps:
            page.get_by_label("Show where it looks").check()
            fine = page.get_by_role("region", name="Fine order")
            maps = fine.get_by_role("img", name="Heat map")
            expect(maps).to_have_count(fine.locator(".view > img").count(), timeout=60_000)
        if given.why:
            best = page.get_by_role("region", name="Fine order").get_by_role("article").first
            best.get_by_role("button", name="Why").click()
            page.get_by_role("img", name="Heat map").wait_for()
        page.screenshot(path=given.picture)


if __name__ == "__main__":
    _main()
