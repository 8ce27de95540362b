"""The report in a browser: it draws, fits a phone, fetches nothing, and axe finds nothing against it."""

import dataclasses
import re

import builders
import pytest

from spin_hf.explain.cards import neuron_cards
from spin_hf.explain.evaluation import Evaluated
from spin_hf.explain.report import Report

pytest.importorskip("playwright.sync_api", reason="pages are tested with the extra browser")


@pytest.fixture(scope="module")
def report(make):
    """Of three labels and exits, on texts of which one attacks the page."""
    source = builders.make_sentiment_rows(90, seed=7)
    source["label"] = [label if row % 3 else 2 for row, label in enumerate(source["label"])]
    made = make(source, labels=["bad", "good", "<b>odd</b>"], exits=True)
    source["text"][0] += " </script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    evaluated = Evaluated.of(made.model, made.tokenizer, source, "<b>films</b>")
    cards = neuron_cards(made.model, made.tokenizer, source["text"], count=2, threshold=0.3)
    return Report("films", made.result, (dataclasses.replace(evaluated, cards=cards),))


@pytest.fixture(scope="module")
def file(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("page") / "report.html")


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


def test_paper_shows_every_chart(chromium, file):
    context = chromium.new_context(viewport={"width": 800, "height": 600})
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    charts = page.locator(".chart").count()
    assert page.locator(".chart .main-svg").count() < charts  # those in sight
    page.pdf()
    assert page.locator(".chart[data-drawn]").count() == charts
    context.close()


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


def test_groups_overlap_exits_and_intervals_are_drawn(open_page, report):
    page = open_page(1280, "light")
    groups = page.locator("[aria-labelledby=groups] tbody tr")
    wanted = report.first.groups()
    assert groups.count() == len(wanted) > 0
    assert groups.first.locator("td").nth(1).text_content() == f"{100 * wanted[0].share:.1f}%"

    exits = page.locator("[aria-labelledby=exits] tbody tr")
    assert exits.count() == len(report.result.exits) > 0
    assert exits.last.locator("td").nth(0).text_content() == str(report.result.exits[-1].depth)

    shades = page.evaluate(
        """() => {
            const { zmin, zmax, z } = document.querySelector('[data-chart=overlap]')._fullData[0];
            return [zmin, zmax, z.flat().filter((share) => share !== null).length];
        }"""
    )
    assert shades[:2] == [0, 1]
    assert shades[2] == 6  # pairs of three labels, twice
    numbers = page.locator("[data-chart=overlap] .hm text").count() or page.locator("[data-chart=overlap] text").count()
    assert numbers >= 6

    scores = page.locator("[aria-label=Scores] tbody tr")
    intervals = [scores.nth(i).locator("td").nth(3).text_content() for i in range(scores.count())]
    assert all(re.fullmatch(r"\d\.\d{3} to \d\.\d{3}|–", told) for told in intervals)
    assert sum("to" in told for told in intervals) >= 3
    bars = page.locator("[data-chart=reliability] .errorbar path.yerror")
    assert bars.count() >= len(report.result.confidence.before.bins)


def test_a_card_opens_its_texts_and_names_its_words(open_page, report):
    page = open_page(390, "light")
    card, wanted = page.locator("article.card").first, report.first.cards[0]
    assert [mark.text_content() for mark in card.locator("mark").all()][:2] == [w.word for w in wanted.high_words]
    card.locator("summary").click()
    values = [item.text_content() for item in card.locator(".texts .muted").all()]
    assert values == [f"{e.value:+.1f}" for e in (*wanted.high_texts, *wanted.low_texts[::-1])]
    assert card.locator(".texts li").first.is_visible()


def test_another_scheme_redraws_the_charts(open_page):
    page = open_page(1280, "light")
    colour = "() => document.querySelector('[data-chart=by-block]')._fullData[0].marker.color"
    before = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => ({colour})() !== before", arg=before)
