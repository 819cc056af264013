"""The viewer in a browser, as a person uses it. One browser for all tests of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from megatron_sr1.report.viewer import write
from tests.browser import MISSING, Browser, addresses, find_browser
from tests.test_report import EVIL
from tests.viewer_cases import GROUPS, SAMPLES, TOKENS, a_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason=MISSING)
RUN = quote("first <run>")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser(find_browser() or "")
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file."""
    return a_page(tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a folder beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "INSIDE_BYTES", 0)
        return a_page(tmp_path_factory.mktemp("beside"))


def go(browser: Browser, page: Path, scheme: str = "light", **fields: str) -> None:
    """To a sample of the first run, unless another one is named."""
    browser.open(addresses(page, **({"run": RUN, "step": "1"} | fields)), scheme)
    browser.wait("document.querySelector('.heading')")


def test_every_sample_is_text_and_nothing_of_it_runs(browser: Browser, page: Path) -> None:
    """Script tags, handlers and links of model output, of questions, answers, keys, notes."""
    go(browser, page, sample="1.1")
    assert browser.texts("#detail .problem") == [f"What of 1? {EVIL}"]
    assert EVIL in browser.texts(".later .pass pre.text") and any(EVIL in note for note in browser.texts("#notes p"))
    assert browser.value("document.querySelectorAll('script:not([type])').length") == 1
    assert browser.value("document.querySelectorAll('svg, iframe, [onerror], [onload], [onmouseover]').length") == 0
    assert browser.texts("#detail b") == ["<b>1</b>", "Which?", "<i>7</i>"]
    assert browser.told == []
    browser.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    browser.value("new Promise((done) => setTimeout(done, 50))")
    assert browser.value("window.ran") is None, "its policy lets no other script run"


def test_a_sample_has_its_blocks_its_passes_and_its_numbers(browser: Browser, page: Path) -> None:
    go(browser, page, sample="2.1")
    assert browser.texts(".beside .pass h4") == ["description", "answer"]
    assert browser.texts(".beside .pass pre") == ["".join(TOKENS[:4]), *TOKENS[4:]]
    titles = browser.texts(".pass h3")
    assert titles[0].startswith("First pass, with the image ✗ wrong7 tokensseconds 1.5")
    assert titles[1].startswith("Second pass, from the description alone ✓ right")
    assert titles[2].startswith("Pass reader, answer 2") and "The response is empty." in browser.texts(".pass .note")
    assert "Given in place of the image: another text" in browser.texts(".pass .note")
    assert browser.texts("#detail .numbers tr")[:3] == [
        "answer right0",
        "right from the description1",
        "mine.py:long, reader0.5, NaN",
    ]
    assert "answer−0.5first pass, response, 1 acc, loss weight 0.5" in browser.texts("#detail .numbers tr")
    assert any("told–not known: kl_in=reward was not saved" in row for row in browser.texts("#detail .numbers tr"))
    assert browser.value("[...document.querySelectorAll('img.sample')].map((image) => image.naturalWidth)") == [40, 40]
    go(browser, page, sample="0.2")
    assert "No image: the prompt has no image." in browser.texts("#detail .note")
    assert "No second pass: there is no description to reason from." in browser.texts("#detail .note")
    assert "cut by the token limit" in browser.texts(".pass .mark")


def kinds(browser: Browser) -> list[str]:
    return browser.value("[...document.querySelectorAll('.beside .pass .token')].map((node) => node.className)")


def test_tokens_have_colours_and_what_is_not_known_says_why(browser: Browser, page: Path) -> None:
    go(browser, page, sample="1.0")
    assert kinds(browser) == []
    browser.choose("colour", "advantage:answer")
    assert kinds(browser) == ["token gain"] * 6 + ["token uncredited"]
    browser.choose("colour", "surprise")
    assert kinds(browser) == ["token heat"] * 7
    tokens = "[...document.querySelectorAll('.beside .pass .token')]"
    tokens = "[...document.querySelectorAll('.beside .pass .token')]"
    strengths = browser.value(f"{tokens}.map((node) => node.style.getPropertyValue('--strength'))")
    assert strengths[:2] == ["", "58%"] and strengths[4] == "70%"
    assert "9 nats" in browser.value("document.querySelectorAll('.beside .pass .token')[4].title")
    choices = browser.value("[...document.getElementById('colour').options].map((one) => [one.text, one.disabled])")
    assert ["entropy – not known", True] in choices and ["advantage, visual", False] in choices
    assert ["advantage, told – not known", True] in choices
    why = browser.texts("#unknown-list li")
    assert "entropy: entropy is not saved" in why and "advantage, told: kl_in=reward was not saved" in why
    browser.choose("colour", "gap")
    assert kinds(browser) == ["token zero", "token loss", "token gain", *["token zero"] * 3, "token gain"]
    assert browser.value(f"{tokens}.map((node) => node.style.getPropertyValue('--strength'))")[1:3] == ["70%", "40%"]
    assert browser.texts(".legend .token") == ["−1 nats", "0", "+1 nats", "it was not measured"]
    title = browser.value("document.querySelectorAll('.beside .pass .token')[1].title")
    assert "log-prob gap, trainer − generator −1 nats" in title and "visual dependency, blind −1 nats" in title
    browser.choose("colour", "dependency/blind")
    assert kinds(browser) == ["token loss"] * 7
    browser.choose("colour", "advantage:answer")
    browser.press("k")
    go(browser, page, sample="1.1", colour="advantage:answer")
    assert kinds(browser) == ["token loss"] * 6 + ["token uncredited"]
    go(browser, page, sample="3.2", colour="surprise")
    assert "token broken" in kinds(browser), "what is not finite is no colour"


def test_filters_search_and_order(browser: Browser, page: Path) -> None:
    go(browser, page)
    assert browser.texts("#count") == [f"{GROUPS * SAMPLES} of {GROUPS * SAMPLES} samples"]
    browser.press("1")
    assert browser.texts("#count") == [f"{GROUPS} of {GROUPS * SAMPLES} samples"]
    assert all(name.endswith("#0") for name in browser.texts(".row-name"))
    browser.press("4")
    assert browser.texts("#count")[0].startswith("0 of") and "No sample passes the filters." in browser.texts(
        "#detail .note"
    )
    browser.press("1")
    assert all(name.endswith("#2") for name in browser.texts(".row-name"))
    browser.press("4")
    browser.choose("search", "WHAT of 2")
    assert browser.texts("#count")[0].startswith(f"{SAMPLES} of")
    browser.choose("search", "")
    browser.value("document.getElementById('filter-gap').click()")
    assert browser.texts("#count")[0].startswith(f"{GROUPS} of")
    browser.value("document.getElementById('filter-gap').click()")
    browser.choose("sort", "measure:dependency/blind")
    assert [name[-1] for name in browser.texts(".row-name")] == ["0"] * GROUPS + ["1"] * GROUPS + ["2"] * GROUPS
    browser.choose("sort", "advantage:answer")
    assert [name[-1] for name in browser.texts(".row-name")] == ["1"] * GROUPS + ["2"] * GROUPS + ["0"] * GROUPS
    browser.value("document.getElementById('order').click()")
    assert browser.texts(".row-name")[0].endswith("#0")
    browser.choose("sort", "surprise")
    assert browser.texts(".row .value")[-1] == "Infinity", "what is no number comes last"
    browser.choose("step", "all")
    browser.wait(f"document.getElementById('count').textContent.includes('of {3 * GROUPS * SAMPLES}')")
    browser.press("k")
    go(browser, page, step="all", sample="2/1.2")
    assert browser.texts(".heading")[0].startswith("own-2/1 #2step 2")


def test_keys_and_addresses(browser: Browser, beside: Path) -> None:
    """Of a page whose data lie beside it, in a folder whose name has a # in it."""
    go(browser, beside)
    assert browser.value("location.hash") == "#run=first+%3Crun%3E&step=1&sample=0.0"
    browser.press("j")
    browser.wait("document.querySelector('.heading').textContent.startsWith('same/0 #1step 1')")
    browser.press("n", "ArrowDown")
    browser.wait("location.hash.endsWith('sample=1.1')")
    browser.press("p")
    browser.wait("location.hash.endsWith('sample=0.2')")
    browser.press("]")
    browser.wait("document.querySelector('.heading')?.textContent.includes('step 2')")
    assert "step=2&sample=0.0" in browser.value("location.hash")
    browser.press("]")  # the one that cannot be read
    notes = "document.getElementById('notes').textContent"
    browser.wait(f"{notes}.includes('step 9 cannot be read: part 1 of 2 is missing')")
    assert "There is no sample here." in browser.texts("#detail .note")
    browser.press("[", "c")
    browser.wait("location.hash.includes('colour=')")
    browser.press("/")
    assert browser.value("document.activeElement.id") == "search"
    browser.press("j")
    assert browser.value("document.getElementById('search').value") == "j", "where one types, a key is a letter"
    browser.press("Escape", "?")
    assert not browser.value("document.getElementById('help').hidden")
    browser.press("Escape", "o")
    browser.wait("document.getElementById('viewer').hidden")
    browser.press("o")
    browser.wait("!document.getElementById('viewer').hidden")
    assert browser.told == []


def test_the_same_prompt_over_the_steps(browser: Browser, beside: Path) -> None:
    go(browser, beside, sample="0.0")
    browser.wait("document.querySelector('.steps')")
    assert [row[:8] for row in browser.texts(".steps tbody tr")] == ["step 030", "step 130", "step 230"]
    assert browser.texts(".steps .here th") == ["step 1"]
    browser.value("document.querySelector('.steps a').click()")
    browser.wait("document.querySelector('.heading')?.textContent.includes('step 0')")
    go(browser, beside, step="2", sample="2.1")
    browser.wait("document.querySelector('.steps')")
    assert browser.texts(".steps tbody th") == ["first <run>, step 2", "second, evaluation after"], "in other runs, too"
    browser.value("document.querySelector('.steps a').click()")
    browser.wait("document.querySelector('.heading')?.textContent.includes('evaluation after')")
    go(browser, beside, step="2", sample="1.1")
    browser.wait("document.querySelector('.steps')")
    assert browser.texts(".steps tbody th") == ["step 2"], "what asks something else is another prompt"
    go(browser, beside, step="0", sample="0.0")
    browser.value("document.querySelectorAll('.sibling')[1].click()")
    browser.wait("location.hash.includes('sample=0.1')")


def test_an_evaluation_is_shown_alike(browser: Browser, page: Path) -> None:
    go(browser, page, run="second", step="after")
    assert browser.texts(".beside .pass pre") == [EVIL]
    assert "No image: they are gone." in browser.texts("#detail .note")
    assert "Not known: an evaluation trains nothing" in browser.texts("#detail .note")


def test_an_address_that_is_not_on_the_page_says_so(browser: Browser, page: Path) -> None:
    """No other sample is shown in its place; the list is there to go on from."""
    named = [{"run": "nowhere", "step": "77"}, {"step": "77", "sample": "1.0"}, {"step": "1", "sample": "99.0"}]
    for fields, what in zip(named, ("run nowhere", "step 77", "sample 99.0"), strict=True):
        browser.open(addresses(page, **({"run": RUN} | fields)))
        browser.wait(f"document.getElementById('detail').textContent.includes('This page has no {what}.')")
        assert browser.value("document.querySelector('.heading')") is None
    browser.press("j")
    browser.wait("document.querySelector('.heading')?.textContent.startsWith('same/0 #0step 1')")
    go(browser, page, sample="0.0", filter="shortcut", search="same")
    browser.wait("document.querySelector('.steps a')")
    hash_of_link = browser.value("document.querySelector('.steps a').hash")
    assert "filter" not in hash_of_link and "search" not in hash_of_link


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes(browser: Browser, page: Path, scheme: str, tmp_path: Path) -> None:
    """Paper and ink differ enough, by the system's choice and by the page's own."""
    go(browser, page, scheme, sample="1.0", colour="advantage:answer")
    assert is_dark(browser, tmp_path) == (scheme == "dark")
    browser.press(*(["t"] * (1 if scheme == "dark" else 2)))
    assert is_dark(browser, tmp_path) == (scheme != "dark")
    browser.value("localStorage.clear()")


def is_dark(browser: Browser, folder: Path) -> bool:
    browser.screenshot(folder / "page.png")
    with Image.open(folder / "page.png") as image:
        grey = image.convert("L")
        darkest, lightest = grey.getextrema()
        assert lightest - darkest > 150, "it can be read"
        return sum(grey.resize((1, 1)).getdata()) < 128


def test_a_page_without_rollouts_is_an_overview(browser: Browser, tmp_path: Path) -> None:
    page, sections = tmp_path / "r.html", ["<section><h2>Curves</h2></section>"]
    write.write_page("nothing yet", sections, [], write.viewed_evaluations, page)
    browser.open(addresses(page, run="gone", step="1"))
    browser.press("o", "j", "?", "1", "t", "Escape")
    assert browser.texts("h2")[0] == "Curves" and browser.told == []
    browser.value("localStorage.clear()")


def test_a_folder_that_is_gone_says_so(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "INSIDE_BYTES", 0)
    page = a_page(tmp_path)
    page.with_name("report_files").rename(tmp_path / "elsewhere")
    browser.open(addresses(page, run=RUN))
    browser.wait("document.getElementById('detail').textContent.includes('reload the page, keep the folder beside it')")
