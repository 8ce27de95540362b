"""The page in a browser: typed, clicked, moved and read back."""

import re
import sys

import pytest
from typer.testing import CliRunner

from spin_hf.cli import app as cli
from spin_hf.explain.answers import Answerer, step_at
from spin_hf.explain.app import app_of, make_app
from spin_hf.explain.page import MissingExtraError

TEXT = "a lovely film <img src=x onerror='window.hacked = 1'> ${1 + 1} {{value}} but dull"


@pytest.fixture(scope="module")
def serve():
    """``serve(made)``: the address of the page of a classifier."""
    pytest.importorskip("gradio", reason="the page needs the extra app")
    apps = []

    def serving(made):
        app = app_of(Answerer(made.model, made.tokenizer), title="films <b>")
        _, address, _ = app.launch(prevent_thread_lock=True, quiet=True)
        apps.append(app)
        return address

    yield serving
    for app in apps:
        app.close()


@pytest.fixture
def open_page(chromium):
    contexts = []

    def opened(address, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.elsewhere = []
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or page.elsewhere.append(r.url))
        page.goto(address)
        page.wait_for_selector("#classify")
        return page

    yield opened
    for context in contexts:
        context.close()


def classify(page, text):
    page.fill("#text textarea", text)
    page.click("#classify")
    page.wait_for_selector("#words .word")
    page.wait_for_selector("#layers table")


def test_type_click_move_and_read(serve, open_page, with_exits):
    answerer = Answerer(with_exits.model, with_exits.tokenizer)
    wanted = answerer.answer(TEXT)
    page = open_page(serve(with_exits), viewport={"width": 390, "height": 844})
    assert page.locator("h1").text_content().strip() == "films <b>"
    classify(page, TEXT)
    assert page.input_value("#answer textarea") == wanted.headline
    assert page.locator("#words .text").text_content().strip() == TEXT
    assert page.evaluate("window.hacked") is None
    rows = page.locator("#layers .steps tbody tr").all()
    assert [int(row.locator("th").text_content()) for row in rows] == answerer.depths

    page.wait_for_selector("#less [data-depth]")
    assert page.locator("#less [data-depth]").get_attribute("data-depth") == str(answerer.depths[-1])
    first = answerer.depths[0]
    page.fill("#depth input[type=number]", str(first))
    page.press("#depth input[type=number]", "Enter")
    page.wait_for_selector(f"#less [data-depth='{first}']")
    step = step_at(wanted.steps, first, answerer.etas[-1])
    assert f"{step.neurons:,} neurons" in page.locator("#less").text_content()
    assert page.locator("#less .text").text_content().strip() == TEXT
    heat = answerer.heat_at(wanted, first, answerer.etas[-1], wanted.label)
    titles = [part.told for part in heat.texts[0] if part.told]
    assert [word.get_attribute("title") for word in page.locator("#less .word").all()] == titles
    numbers = re.findall(r"\d\.\d\d", page.locator("#less tbody tr td:nth-child(2)").first.text_content())
    assert float(numbers[0]) == pytest.approx(max(step.values[wanted.values.index(max(wanted.values))], 0), abs=0.006)
    assert page.elsewhere == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_passes_axe(serve, open_page, with_exits, width, scheme):
    """With a text typed, answered, and at another depth: ours and what Gradio makes of it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with the extra browser")
    page = open_page(serve(with_exits), viewport={"width": width, "height": 844}, color_scheme=scheme)
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")

    def violations():
        page.wait_for_timeout(500)  # what moves in and fades in has come
        found = axe.Axe().run(page).response
        assert len(found["passes"]) > 20
        return [(v["id"], [node["html"] for node in v["nodes"]]) for v in found["violations"]]

    page.fill("#text textarea", TEXT)
    assert violations() == []
    classify(page, TEXT)
    page.wait_for_selector("#less [data-depth]")
    assert violations() == []
    first = Answerer(with_exits.model, with_exits.tokenizer).depths[0]
    page.fill("#depth input[type=number]", str(first))
    page.press("#depth input[type=number]", "Enter")
    page.wait_for_selector(f"#less [data-depth='{first}']")
    assert violations() == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_axe_would_find_something(serve, open_page, sentiment):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with the extra browser")
    page = open_page(serve(sentiment), color_scheme="light")
    page.wait_for_timeout(500)
    page.evaluate("document.querySelector('h1').style.color = '#eeeeee'")
    assert [v["id"] for v in axe.Axe().run(page).response["violations"]] == ["color-contrast"]


def test_the_depths_decide_one_after_another_and_eta_moves(serve, open_page, with_exits):
    answerer = Answerer(with_exits.model, with_exits.tokenizer)
    wanted = answerer.answer(TEXT)
    page = open_page(serve(with_exits))
    classify(page, TEXT)
    heads = [head.text_content() for head in page.locator("#layers .steps thead th").all()][1:]
    assert sorted(heads) == sorted(answerer.names)
    deepest = {depth: step_at(wanted.steps, depth, 1.0) for depth in answerer.depths}
    for row in page.locator("#layers .steps tbody tr").all():
        step = deepest[int(row.locator("th").text_content())]
        values = [step.values[answerer.names.index(name)] for name in heads]
        assert [cell.text_content() for cell in row.locator(".n").all()] == [f"{value:.2f}" for value in values]
        best = row.locator(".best").all()
        assert [cell.text_content() for cell in best][:1] == [f"{max(values):.2f}"]
    so_far = [row.locator("td").last.text_content() for row in page.locator("#layers .blocks tbody tr").all()]
    number = answerer.names.index(wanted.label)
    assert float(so_far[0]) == pytest.approx(wanted.explanation.base[number], abs=0.006)
    assert float(so_far[-1]) == pytest.approx(wanted.explanation.logits[number], abs=0.006)

    page.wait_for_selector("#less [data-eta]")
    least, most = answerer.etas[0], answerer.etas[-1]
    assert page.locator("#less [data-eta]").get_attribute("data-eta") == f"{most}"
    page.fill("#eta input[type=number]", str(least))
    page.press("#eta input[type=number]", "Enter")
    page.wait_for_selector(f"#less [data-eta='{least}']")
    step = step_at(wanted.steps, answerer.depths[-1], least)
    assert f"{step.neurons:,} neurons" in page.locator("#less").text_content()
    heat = answerer.heat_at(wanted, answerer.depths[-1], least, wanted.label)
    titles = [part.told for part in heat.texts[0] if part.told]
    assert [word.get_attribute("title") for word in page.locator("#less .word").all()] == titles
    assert f"the logit {heat.logit:+.2f}" in page.locator("#less").text_content()


def test_another_label_shows_its_own_words(serve, open_page, with_exits):
    page = open_page(serve(with_exits))
    classify(page, TEXT)
    before = page.input_value("#label input")
    other = ({"bad", "good"} - {before}).pop()
    page.click("#label input")
    page.get_by_role("option", name=other).click()
    page.wait_for_function("label => document.querySelector('#words .muted').textContent.includes(label)", arg=other)
    assert f"What each block adds to {other}" in page.locator("#layers").text_content()


def test_without_exits_the_page_says_how_to_make_them(serve, open_page, sentiment):
    page = open_page(serve(sentiment))
    assert "--exits" in page.locator("#no-exits").text_content()
    assert page.locator("#depth").count() == 0
    page.click("#classify")
    page.get_by_text("Write something first.").wait_for()
    classify(page, "a dull film")
    assert page.locator("#layers .blocks").is_visible()


def test_without_gradio_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'spin_hf\[app\]'"):
        make_app(folder)
    result = CliRunner().invoke(cli, ["app", str(folder)])
    assert result.exit_code == 2
    assert "pip install 'spin_hf[app]'" in result.stderr


def test_a_port_that_is_taken(folder, serve, sentiment):
    port = serve(sentiment).rstrip("/").rpartition(":")[2]
    result = CliRunner().invoke(cli, ["app", str(folder), "--port", port])
    assert result.exit_code == 2, result.output
    assert f"port {port}" in result.stderr
