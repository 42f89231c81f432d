"""The page in a real browser: the race runs, both sides agree, the tree shows, and it fits phone and desktop."""

import os
import shutil
from pathlib import Path

import pytest

from tests.serve_support import make_engine, post, server, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = os.environ.get("GORGON_SCREENSHOTS")  # a directory to keep screenshots in
LIVE = """() => {
    window.live = false;
    const rate = (side) => Number(document.querySelector(`#${side}-facts b`).textContent);
    new MutationObserver(() => {
        const racing = document.getElementById("verdict").textContent.startsWith("Racing");
        window.live = window.live || racing && rate("plain") > 0 && rate("medusa") > 0;
    }).observe(document.getElementById("lanes"), { subtree: true, childList: true });
}"""  # the page's policy lets nothing be evaluated later, so this watches from the beginning
VIEWS = [(1280, 900, "light"), (1280, 900, "dark"), (360, 740, "light"), (360, 740, "dark")]

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=2) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def _open(browser, served, width, height, scheme):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.faults = []
    page.on("console", lambda m: page.faults.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.faults.append(str(e)))
    page.on("request", lambda r: page.faults.append(r.url) if not r.url.startswith(served.url) else None)
    page.goto(served.url)
    return page


@needs_browser
@pytest.mark.parametrize(("width", "height", "scheme"), VIEWS)
def test_the_race(browser, served, width, height, scheme):
    page = _open(browser, served, width, height, scheme)
    page.evaluate(LIVE)
    page.get_by_role("button", name="Race").click()
    page.get_by_text("Identical output").wait_for(timeout=60_000)
    assert page.evaluate("window.live"), "the rates came only at the end"
    plain, medusa = page.locator("#plain-out").inner_text(), page.locator("#medusa-out").inner_text()
    assert plain == medusa and plain.startswith("SELECT")
    for side in ("plain", "medusa"):  # a block holds what one step added to the text
        blocks = page.locator(f"#{side}-out .block")
        steps = page.evaluate(f"state['{side}'].end.steps")
        assert 1 <= blocks.count() <= steps + 1
        tokens, most = page.evaluate(f"[state['{side}'].tokens, state['{side}'].end.tokens]")
        assert tokens == most >= steps
    assert page.locator("#medusa-out .block").count() < page.locator("#plain-out .block").count()
    assert page.locator(".speed").inner_text().endswith("×")
    accepted = 0
    for i in range(1, page.locator("#medusa-out .block").count()):
        page.locator("#medusa-out .block").nth(i).hover()
        accepted += page.locator("#tree .node.yes").count()
        assert page.locator("#tree .node.root").count() == 1
    assert accepted >= 1
    for side in ("plain", "medusa"):  # a mark for each step, the prompt's before them, up to where the clock stopped
        marks = page.locator(f"#{side}-strip i")
        assert marks.count() >= page.locator(f"#{side}-out .block").count()
        ends = marks.evaluate_all("all => all.map(e => e.offsetLeft + e.offsetWidth)")
        assert ends == sorted(ends) and ends[-1] <= page.locator(f"#{side}-strip").evaluate("e => e.clientWidth") + 1
    page.locator("#medusa-out .block").nth(1).hover()
    assert page.locator("#draft-said").inner_text().startswith("Step 1: ")
    assert page.locator("#medusa-strip i.on").count() == 1
    own = page.locator("#tree .node.own").inner_text().replace("·", " ").strip()
    assert page.locator("#medusa-out .block").nth(1).inner_text().endswith(own)
    overlaps = page.locator("#tree .node").evaluate_all("""all => all.some((a, i) => all.some((b, j) => {
        const [p, q] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
        return i < j && p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom;
    }))""")
    assert not overlaps
    page.locator("#medusa-out").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#medusa-out .block").nth(2).evaluate("e => e.classList.contains('on')")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    page.keyboard.press("End")
    assert page.locator("#medusa-out .block").last.evaluate("e => e.classList.contains('on')")
    page.keyboard.press("Home")
    assert "nothing was drafted" in page.locator("#draft-said").inner_text()
    page.locator("#medusa-out .block").nth(1).hover()
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"playground-{width}-{scheme}.png"), full_page=True)
    assert page.faults == []
    page.close()


@needs_browser
def test_keyboard_alone_and_replay(browser, served):
    page = _open(browser, served, 1280, 900, "light")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    page.get_by_text("Identical output").wait_for(timeout=60_000)
    text = page.locator("#plain-out").inner_text()
    page.get_by_role("button", name="Replay").press("Enter")
    page.get_by_text("Identical output").wait_for(timeout=60_000)
    assert page.locator("#plain-out").inner_text() == text == page.locator("#medusa-out").inner_text()
    page.locator("#prompt").fill("x" * 9000)
    page.keyboard.press("Control+Enter")
    page.get_by_text("does not fit").wait_for(timeout=10_000)
    page.close()


@needs_browser
def test_closing_the_page_frees_both_slots(browser, served):
    page = _open(browser, served, 1280, 900, "light")
    page.evaluate("document.getElementById('tokens').value = 400")
    page.locator("#prompt").fill("List " + "a, b, c, " * 20)
    page.get_by_role("button", name="Race").click()
    page.close()
    wait_for(lambda: served.scheduler.active == served.scheduler.queued == 0, 20)


def test_the_page_asks_nobody_else_and_runs_nothing_foreign(served):
    status, headers, page = post(served, "/", None, method="GET")
    assert status == 200 and b"http://" not in page and b"https://" not in page
    assert "default-src 'none'" in headers["content-security-policy"]


def test_without_playground_there_is_neither_page_nor_race(served):
    with server(served.engine, slots=1, playground=False) as bare:
        assert post(bare, "/", None, method="GET")[0] == 404
        assert post(bare, "/playground/race", {"prompt": "x"})[0] == 404
