"""The web page in a real browser: a message is typed, a reply arrives."""

from __future__ import annotations

import pytest

from chattrain.serving.speaker import Speaker
from tests.serving.browser import Page, browser, found
from tests.serving.common import CONTEXT, Passes, reply_of, running, speaker_of

pytestmark = pytest.mark.skipif(found() is None, reason="needs a browser: chromium or google-chrome")

REPLY = "document.querySelector('article.assistant:last-of-type p')?.textContent"
IS_DONE = "document.querySelectorAll('article.assistant:not(.busy)').length === {} && !document.getElementById('send').hidden"


@pytest.fixture(scope="module")
def speaker(tokenizer) -> Speaker:
    return speaker_of(tokenizer)


@pytest.fixture(scope="module")
def url(speaker):
    with running(speaker, max_tokens=40) as url:
        yield url


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chrome, url) -> Page:
    chrome.errors, chrome.requested = [], []
    chrome.open(url)
    return chrome


def coldest(page: Page) -> None:
    """Temperature 0, so that the reply is known."""
    page.run("document.getElementById('temperature').value = 0; document.getElementById('temperature').oninput()")


def say(page: Page, text: str) -> None:
    page.run("document.getElementById('text').focus()")
    page.type(text)
    page.press("Enter", 13)


def test_a_message_is_typed_and_its_reply_arrives_in_portions(page, speaker, url):
    coldest(page)
    page.run(
        "window.lengths = new Set(); new MutationObserver(() => lengths.add("
        "document.querySelector('article.assistant p')?.textContent.length)).observe("
        "document.getElementById('talk'), {childList: true, subtree: true, characterData: true})"
    )
    say(page, "Hello <b>you</b>")
    page.wait_for(IS_DONE.format(1))
    first = [{"role": "user", "content": "Hello <b>you</b>"}]
    reply = reply_of(speaker, first, 40)
    assert page.run(REPLY) == reply and page.run("lengths.size") > 3
    assert page.run("document.querySelector('article.user p').innerHTML") == "Hello &lt;b&gt;you&lt;/b&gt;"
    say(page, "And then?")
    page.wait_for(IS_DONE.format(2))
    talk = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "And then?"}]
    assert page.run(REPLY) == reply_of(speaker, talk, 40)
    assert page.errors == [] and all(request.startswith((url, "data:")) for request in page.requested)


def test_a_new_chat_forgets_what_was_said(page, speaker):
    coldest(page)
    say(page, "One")
    page.wait_for(IS_DONE.format(1))
    page.click("#new")
    assert page.run("document.querySelectorAll('article').length") == 0
    say(page, "Two")
    page.wait_for(IS_DONE.format(1))
    assert page.run(REPLY) == reply_of(speaker, [{"role": "user", "content": "Two"}], 40)


def test_shift_and_enter_begin_a_line(page):
    page.run("document.getElementById('text').focus()")
    page.type("a")
    page.press("Enter", 13, modifiers=8)
    page.type("b")
    assert page.run("document.getElementById('text').value") == "a\nb"
    assert page.run("document.querySelectorAll('article').length") == 0


def test_the_stop_button_keeps_what_has_arrived_and_frees_the_row(chrome, tokenizer):
    speaker = speaker_of(tokenizer)
    passes = Passes(speaker.model)
    with running(speaker, batch_size=1) as url:
        chrome.open(url)
        coldest(chrome)  # this reply goes on and on
        say(chrome, "Hello")
        chrome.wait_for(f"({REPLY})?.length > 20")
        chrome.click("#stop")
        chrome.wait_for(IS_DONE.format(1))
        assert len(chrome.run(REPLY)) > 20 and chrome.run("document.getElementById('problem').textContent") == ""
        chrome.wait_for(
            "fetch('/health').then(answer => answer.json()).then(health => window.free = health.requests === 0), window.free"
        )
        assert passes.count < CONTEXT / 2
    passes.close()


def test_a_mistake_is_shown_and_the_message_can_be_sent_again(page):
    say(page, "word " * 9000)
    page.wait_for("document.getElementById('problem').textContent.includes('tokens')")
    assert page.run("document.getElementById('text').value").startswith("word word")
    assert page.run("document.querySelectorAll('article').length") == 0


def test_a_key_is_asked_for_where_the_server_has_one(chrome, speaker):
    with running(speaker, api_key="right-key", max_tokens=5) as url:
        chrome.open(url)
        say(chrome, "Hello")
        chrome.wait_for("document.getElementById('problem').textContent.includes('key')")
        chrome.click("#key")
        chrome.type("right-key")
        chrome.click("#send")
        chrome.wait_for(IS_DONE.format(1))
        assert chrome.run(f"({REPLY}).length") > 0
    with running(speaker) as url:
        chrome.open(url)
        assert chrome.run("document.getElementById('key').offsetParent") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_legible_in_light_and_dark_on_narrow_and_wide_screens(page, scheme, width):
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=False)
    say(page, "W" * 300)
    page.wait_for(IS_DONE.format(1))
    assert page.run("document.documentElement.scrollWidth") <= width
    for selector in ("article.user p", "article.assistant p", "article h2", "header label", "#send", "#new", "#text"):
        assert page.run(CONTRAST.format(selector)) >= 4.5, selector
    page.send("Emulation.clearDeviceMetricsOverride")


# WCAG's contrast of an element's text to what is behind it.
CONTRAST = """(() => {{
  const light = color => {{
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255);
    const [r, g, b] = parts.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }};
  let element = document.querySelector("{}"), behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}})()"""


def test_all_controls_have_names_and_are_reached_by_the_keyboard(page):
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = {
        node["role"]["value"]: node["name"]["value"]
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("button", "textbox", "slider", "log", "heading")
    }
    assert controls.keys() == {"button", "textbox", "slider", "log", "heading"} and all(controls.values())
    reached = set()
    for _ in range(8):
        page.press("Tab", 9)
        reached.add(page.run("document.activeElement.id"))
    assert reached >= {"temperature", "new", "talk", "text", "send"}
