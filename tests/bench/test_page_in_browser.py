"""The report in a real browser: no error, nothing cut off at 400 and 1600 pixels, readable in light, in dark and on paper."""

from __future__ import annotations

import os
import shutil

import pytest
from bench_models import made_drift, made_perplexity
from test_bench_report import made_bench

from mxcompile.bench.results import write_json
from mxcompile.comparing import report
from mxcompile.report.comparison_page import page
from mxcompile.report.files import write_text
from mxcompile.validation import ValidationOptions, validate

pytestmark = pytest.mark.machine  # no Python package brings a browser with the libraries it needs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (400, 1600)
LIMIT_MS = 300_000  # a hang, on however slow a machine
LEGIBLE = 4.5  # contrast that WCAG 2.2 asks of text (AA)

OVERFLOW = """() => {
    const wide = document.documentElement.clientWidth;
    const scrolls = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return true; return false; };
    return [...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > wide + 1 && !scrolls(e) && e.checkVisibility())
        .slice(0, 5).map(e => e.tagName + '.' + e.className + ' ' + (e.textContent || '').slice(0, 40));
}"""

SCROLLING = """() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.slice(0, 60))"""

FIGURES = """() => [...document.querySelectorAll('figure')].map(f => {
    const box = f.querySelector('svg')?.getBoundingClientRect();
    return { text: f.textContent.slice(0, 60), width: box?.width ?? 0, height: box?.height ?? 0,
             marks: f.querySelectorAll('svg path, svg rect, svg circle, svg line, svg polyline').length };
})"""

# Colour of every visible text against the first opaque background around it, by WCAG's formula.
CONTRAST = """() => {
    const parse = c => c.match(/[\\d.]+/g).map(Number);
    const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => { for (let p = e; p; p = p.parentElement) {
        const c = parse(getComputedStyle(p).backgroundColor); if (c.length === 3 || c[3] === 1) return c; }
        return [255, 255, 255]; };
    const found = [];
    for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.checkVisibility() || e.closest('title, style, script')) continue;
        const svg = e instanceof SVGElement, style = getComputedStyle(e);
        const a = light(parse(svg ? style.fill : style.color)), b = light(behind(svg ? e.ownerSVGElement : e));
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
            e.tagName + '.' + (e.getAttribute('class') || '') + ' ' + e.textContent.slice(0, 40)]);
    }
    return found.sort((x, y) => x[0] - y[0]).slice(0, 5);
}"""


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("MXCOMPILE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome here; MXCOMPILE_BROWSER may name one")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            timeout=LIMIT_MS,
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(engine, checkpoint, tmp_path_factory):
    """A page with every kind of section."""
    folder = tmp_path_factory.mktemp("browser")
    write_json(made_bench(engine).to_dict(), folder / "new.json")
    write_json(made_bench(engine).to_dict(), folder / "old.json")
    write_json(made_perplexity(engine).to_dict(), folder / "text.json")
    write_json(made_drift(engine).to_dict(), folder / "drift.json")
    found = validate(engine, checkpoint, ValidationOptions(quick=True, lengths=(20,), threads=2))
    write_json(found.to_dict(), folder / "validation.json")
    values = report(
        [engine],
        against=checkpoint,
        bench=[folder / "new.json"],
        validation=[folder / "validation.json"],
        perplexity=[folder / "text.json"],
        state_drift=[folder / "drift.json"],
        baseline=folder / "old.json",
        price_per_hour=3.6,
    )
    write_text(folder / "report.html", page(values))
    return (folder / "report.html").as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page in a context of its own and collects what it complains about and asks of a network."""
    contexts = []

    def open_page(width, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(LIMIT_MS)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: request.url == address or page.complaints.append(request.url))
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate(SCROLLING) == []  # a table may scroll in between, where it is neither stacked nor has room
    assert page.complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn(opened, width):
    figures = opened(width).evaluate(FIGURES)
    assert len(figures) >= 10
    empty = [figure["text"] for figure in figures if min(figure["width"], figure["height"]) < 50 or not figure["marks"]]
    assert empty == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(opened, scheme):
    faint = [(round(ratio, 2), text) for ratio, text in opened(1600, scheme).evaluate(CONTRAST) if ratio < LEGIBLE]
    assert faint == []


def test_on_paper(opened):
    """Dark ink on white whatever the screen's scheme is, no figure cut by the edge of a page, everything unfolded."""
    page = opened(1600, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    assert [text for ratio, text in page.evaluate(CONTRAST) if ratio < LEGIBLE] == []
    breaks = "[...document.querySelectorAll('figure')].map(f => getComputedStyle(f).breakInside)"
    assert set(page.evaluate(breaks)) == {"avoid"}
    assert page.pdf(format="A4").startswith(b"%PDF")
