"""The pictures of report and page in the docs, taken from a classifier by a headless Chromium.

    pip install "spin_hf[app,report,browser]"    # and Chromium itself, from the system
    python examples/screenshots.py

The classifier is the demo's, calibrated on the way, with exits.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import backbone_folder, load_split
from spin_hf.explain.answers import Answerer
from spin_hf.explain.app import app_of
from spin_hf.explain.evaluation import Evaluated
from spin_hf.explain.report import Report

TEXT = "Thank you for nothing: two weeks without an answer, and now you want me to pay for the return."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "screenshots")
    parser.add_argument("--rows", type=int, help="most test messages in the report")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    model = SpinForSequenceClassification.from_backbone(backbone_folder())
    result = spin_calibrate(model, tokenizer, load_split("train"), load_split("validation"), exits=True)
    evaluated = Evaluated.of(model, tokenizer, load_split("test")[: options.rows], "test messages")
    report = Report("Customer messages", result, (evaluated,)).save(options.out / "report.html")
    app = app_of(Answerer(model, tokenizer), title="Customer messages")
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True)
    with chromium() as browser:
        page = opened(browser, report.resolve().as_uri(), "html[data-ready]", width=1100, scheme="light")
        draw_all(page)
        keep(page.screenshot(clip=part(page, "h1", 1500), full_page=True), options.out / "report.webp")
        page = opened(browser, report.resolve().as_uri(), "html[data-ready]", width=390, scheme="dark")
        draw_all(page)
        tops = ("h1", "#kept-neurons", "#examples")
        parts = [page.screenshot(clip=part(page, top, 900), full_page=True) for top in tops]
        keep(beside(parts), options.out / "report-phone.webp")
        page = opened(browser, address, "#classify", width=1100, scheme="light")
        ask(page, model)
        keep(page.screenshot(full_page=True), options.out / "app.webp")
        page = opened(browser, address, "#classify", width=390, scheme="dark")
        ask(page, model)
        tops = ("h1", "#words", "#less" if model.config.exits else "#layers")
        parts = [page.screenshot(clip=part(page, top, 900), full_page=True) for top in tops]
        keep(beside(parts), options.out / "app-phone.webp")
    app.close()
    report.unlink()
    for path in sorted(options.out.glob("*.webp")):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@contextmanager
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise SystemExit("There is no Chromium. Install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, ready: str, *, width: int, scheme: str) -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector(ready)
    return page


def ask(page: Any, model: Any) -> None:
    """Classify the text, and look at a shallower exit where there is one."""
    page.fill("#text textarea", TEXT)
    page.click("#classify")
    page.wait_for_selector("#layers table")
    if model.config.exits:
        page.wait_for_selector("#less table")
        depths = sorted({entry["depth"] for entry in model.config.exits})
        depth = depths[len(depths) // 2 - 1]
        page.fill("#depth input[type=number]", str(depth))
        page.press("#depth input[type=number]", "Enter")
        page.wait_for_selector(f"#less [data-depth='{depth}']")
        page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(1000)  # the bars of the probabilities grow


def draw_all(page: Any) -> None:
    """Charts are drawn when they come into view."""
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()


def part(page: Any, top: str, height: int) -> dict[str, float]:
    """So much of the page, from an element on."""
    y, width, whole = page.evaluate(
        """top => [document.querySelector(top).getBoundingClientRect().top + scrollY, innerWidth,
                   document.documentElement.scrollHeight]""",
        top,
    )
    y = max(0, min(y - 20, whole - height))
    return {"x": 0, "y": y, "width": width, "height": height}


def beside(parts: list[bytes]) -> bytes:
    """Pictures of one height in a row."""
    images = [Image.open(io.BytesIO(each)) for each in parts]
    gap = 16
    row = Image.new("RGB", (sum(i.width + gap for i in images) - gap, images[0].height), "#808080")
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + gap
    out = io.BytesIO()
    row.save(out, "PNG")
    return out.getvalue()


def keep(picture: bytes, path: Path) -> None:
    Image.open(io.BytesIO(picture)).convert("RGB").save(path, quality=80)


if __name__ == "__main__":
    main()
