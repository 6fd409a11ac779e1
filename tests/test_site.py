"""The built site in a browser: `pip install playwright`, and a Chromium on the path or Playwright's own."""

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SITE", ROOT / "docs" / "_build"))  # where Sphinx has written it
PAGES = [path.relative_to(ROOT / "docs").with_suffix("") for path in sorted((ROOT / "docs").rglob("*.md"))]
WIDTHS = (390, 1024, 1280, 1440)
pytestmark = pytest.mark.slow

# Each list has the elements with a fault.
FAULTS = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const box = (e) => e.getBoundingClientRect();
  const scrolls = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const outside = (e) => box(e).width && (box(e).right > innerWidth + 1 || box(e).left < -1);
  const lines = (e) => { const text = document.createRange(); text.selectNodeContents(e);
    return text.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight); };
  const contents = innerWidth < 1312 ? [] : all(".toc-tree *");
  const faults = {
    "cut off": [...all("article *"), ...contents].filter((e) => outside(e) && !scrolls(e.parentElement)),
    "scrolls sideways": all("html, body").filter((e) => e.scrollWidth > innerWidth),
    "image not loaded": all("img").filter((e) => !e.complete || !e.naturalWidth),
    "image not on white": all("article img").filter((e) => getComputedStyle(e).backgroundColor != "rgb(255, 255, 255)"),
    "formula not drawn": all(".math").filter((e) => !e.querySelector("mjx-container") || e.querySelector("mjx-merror")),
    "formula wider than the page": all("div.math").filter((e) => e.scrollWidth > e.clientWidth + 1),
    "number in two lines": all("td.number").filter((e) => lines(e) > 1.9),
  };
  return Object.entries(faults).flatMap(([fault, found]) => found.map((e) => `${fault}: ${e.outerHTML.slice(0, 120)}`));
}"""


class Quiet(SimpleHTTPRequestHandler):
    """A file server without a log."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    if not (SITE / "index.html").exists():
        pytest.skip(f"no site in {SITE}: `python -m sphinx -W docs docs/_build`")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(url):
    """A tab on the dark site, which notes what it could not load and what it asked of other hosts."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    installed = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=next(installed, None))
        except api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        page = browser.new_page(base_url=url, color_scheme="dark")
        page.lost = []
        page.on("response", lambda answer: answer.status >= 400 and page.lost.append(answer.url))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or page.lost.append(request.url))
        yield page
        browser.close()


@pytest.mark.parametrize("name", [*map(str, PAGES), "404", "search", "genindex"])
def test_page(tab, name):
    tab.lost.clear()
    tab.goto(f"/{name}.html")
    tab.wait_for_function("!window.MathJax || (MathJax.startup.promise.then(() => window.drawn = true), window.drawn)")
    faults = []
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        faults += [f"{width}: {fault}" for fault in tab.evaluate(FAULTS)]
    assert faults == []
    assert tab.lost == []
    for card in tab.locator("meta[property='og:image']").all():
        assert tab.request.get(card.get_attribute("content")).ok


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("lambda", "choose"),
        ("λ", "choose"),
        ("bfloat16", "recipes"),
        ("sharding", "recipes"),
        ("checkpoint", "recipes"),
        ("schedule_free", "recipes"),
        ("Flax", "recipes"),
        ("Equinox", "recipes"),
        ("mask", "recipes"),
        ("NaN", "questions"),
        ("PyTorch", "start"),
        ("install", "start"),
        ("grokfast_ema", "api"),
        ("stability_limit", "api"),
        ("Muon", "optimizers"),
        ("momentum", "momentum"),
        ("clock", "circuits"),
        ("memory", "cost"),
        ("cite", "cite"),
        ("seeds", "method"),
        ("QM9", "tasks"),
    ],
)
def test_search_finds(tab, words, page):
    tab.goto(f"/search.html?q={quote(words)}")
    tab.locator(f"#search-results a[href^='{page}.html']").first.wait_for(timeout=10_000)
