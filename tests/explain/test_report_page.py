"""The report in a browser: it draws, fits a phone, fetches nothing, and axe finds nothing against it."""

import builders
import pytest

from spin_hf.explain.evaluation import Evaluated
from spin_hf.explain.report import Report

pytest.importorskip("playwright.sync_api", reason="pages are tested with the extra browser")


@pytest.fixture(scope="module")
def file(sentiment, tmp_path_factory):
    source = builders.make_sentiment_rows(30, seed=7)
    source["text"][0] += " </script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    evaluated = Evaluated.of(sentiment.model, sentiment.tokenizer, source, "<b>films</b>")
    return Report("films", sentiment.result, (evaluated,)).save(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def open_page(chromium, file):
    """``open_page(width, scheme)``: the report, every chart drawn, with what went wrong in ``page.wrong``."""
    contexts = []

    def opened(width, scheme):
        context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.wrong, page.fetched = [], []
        page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.fetched.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        for chart in page.locator(".chart").all():
            chart.scroll_into_view_if_needed()
            chart.locator(".main-svg").first.wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_passes_axe_fits_and_fetches_nothing(open_page, file, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with the extra browser")
    page = open_page(width, scheme)
    assert page.wrong == []
    assert page.fetched == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("window.hacked") is None
    for details in page.locator("main details").all():
        details.evaluate("element => { element.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = axe.Axe().run(page).response
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found["violations"]] == []
    assert len(found["passes"]) > 20


def test_axe_would_find_something(open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with the extra browser")
    page = open_page(390, "light")
    page.evaluate("document.querySelector('h1').style.color = '#eeeeee'")
    assert [v["id"] for v in axe.Axe().run(page).response["violations"]] == ["color-contrast"]


def test_a_click_on_a_cell_opens_its_texts_and_a_point_tells_its_values(open_page):
    page = open_page(1280, "light")
    cell = page.locator("[id^=cell-]").first
    assert cell.get_attribute("open") is None
    row, column = map(int, cell.get_attribute("id").split("-")[1:])
    page.evaluate("window.scrollTo(0, document.querySelector('[data-chart=confusion]').offsetTop - 100)")
    place = page.evaluate(  # of the cell, by the chart's own axes
        """([row, column]) => {
            const chart = document.querySelector('[data-chart=confusion]'), box = chart.getBoundingClientRect();
            const { xaxis, yaxis } = chart._fullLayout;
            return [box.left + xaxis._offset + xaxis.c2p(column), box.top + yaxis._offset + yaxis.c2p(row)];
        }""",
        [row, column],
    )
    page.mouse.move(*place)
    page.wait_for_selector("[data-chart=confusion] .hovertext")
    assert "texts" in page.locator("[data-chart=confusion] .hovertext").text_content()
    page.mouse.click(*place)
    page.wait_for_function("id => document.getElementById(id).open", arg=cell.get_attribute("id"))
    assert cell.locator("li").first.is_visible()
