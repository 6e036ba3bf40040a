"""The page in a real browser: Chromium without a window, if it is installed."""

import contextlib
import re
import shutil

import numpy as np
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def served(serve):
    with serve() as running:
        yield running


@contextlib.contextmanager
def _page(browser, served, **settings):
    """The page, which must load nothing from elsewhere and log no error."""
    context = browser.new_context(**settings)
    page = context.new_page()
    problems, asked = [], []
    # An answer of 400 is an error to the console, and no mistake of the page.
    page.on("console", lambda told: problems.append(told.text) if "violates" in told.text else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert not problems and all(url.startswith((served.url, "data:")) for url in asked)


def _write(page, **fields) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#detail")).to_have_text(re.compile("^The text"), timeout=60_000)


def _number(page, name: str) -> float:
    return float(page.text_content(f"#{name}"))


def test_a_text_appears_with_its_numbers(browser, served):
    """Tokens, calls and probabilities on the page are those of the library and of the API."""
    lm = served.lm
    known = [*b"the ", *[-1] * 5, *b" old", *[-1] * 6]
    made = lm.generate(evidence_BN=[known], seed=[11], streams=2, temperature=0.8)
    with _page(browser, served) as page:
        _write(page, prompt="the [[5]] old", max_tokens=6, streams=2, seed=11, temperature=0.8)
        shown = page.eval_on_selector_all(
            "#text span", "spans => spans.map(s => [s.textContent, s.title, s.style.backgroundColor, s.className])"
        )
        numbers = {name: _number(page, name) for name in ("calls", "tokens", "seconds", "rate", "used")}
    name = lm.tokenizer.token_text
    assert [text for text, *_ in shown] == [name(token) for token in made.tokens_BN[0].tolist()]
    colors = {}
    for at, (_, title, color, _) in enumerate(shown):
        call = int(made.call_BN[0, at])
        if call == 0:
            assert title.endswith(": given") and not color
            continue
        found = re.search(r": call (\d+) of (\d+), probability (\S+)$", title.partition(", behind")[0])
        assert (int(found[1]), int(found[2])) == (call, made.num_calls)
        assert float(found[3]) == pytest.approx(np.exp(made.log_prob_BN[0, at]), rel=1e-2)
        colors.setdefault(call, set()).add(color)
    assert all(len(each) == 1 for each in colors.values()) and len(set().union(*colors.values())) == made.num_calls
    assert (numbers["calls"], numbers["tokens"], numbers["used"]) == (made.num_calls, 11, 11)
    assert numbers["seconds"] > 0 and numbers["rate"] > 0


def test_the_page_works_by_keyboard(browser, served):
    """Arrows move from token to token, each of which is described; every control has a name."""
    with _page(browser, served) as page:
        _write(page, prompt="ab", max_tokens=4, streams=2, seed=1)
        page.focus("#text")
        told = []
        for key in ("Home", "ArrowRight", "ArrowRight", "End"):
            page.keyboard.press(key)
            told.append(page.text_content("#detail"))
        assert told[:2] == ['"a": given', '"b": given'] and ": call 1 of" in told[2] and ": call 3 of" in told[3]
        unnamed = page.eval_on_selector_all(
            "input, select, textarea, button", "all => all.filter(e => !e.labels.length && !e.textContent).length"
        )
        assert unnamed == 0


def test_a_mistake_is_told_and_a_text_can_be_stopped(browser, served):
    """The server's message is shown, and Escape frees the place in the server."""
    with _page(browser, served) as page:
        page.fill("#prompt", "a" * 70)
        page.click("#write")
        expect(page.locator("#error")).to_have_text(re.compile("max_length"))
        page.fill("#prompt", "a")
        page.fill("#max_tokens", "24")
        page.fill("#streams", "2")
        page.click("#write")
        page.keyboard.press("Escape")
        expect(page.locator("#write")).to_be_enabled()
        assert page.text_content("#detail").startswith(("Stopped.", "The text"))


def test_the_page_is_dark_where_pages_are_dark(browser, served):
    """Ground and ink change places, and contrast stays above 7."""
    for scheme, dark in (("light", False), ("dark", True)):
        with _page(browser, served, color_scheme=scheme) as page:
            script = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
            ground, ink = (_luminance(color) for color in page.eval_on_selector("body", script))
        assert (ground < ink) == dark
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 7


def _luminance(color: str) -> float:
    """Relative luminance of the WCAG."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
