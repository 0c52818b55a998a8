"""The page in a browser: text in, streamed text out, the experts of both, at a phone's width and a desk's, light and dark."""

import os
import sys
from pathlib import Path

import pytest
from client import LIMITS, TEXT, Running, small_model

sys.path.insert(0, str(Path(__file__).parents[1] / "pages"))
from browser import Browser  # noqa: E402

TYPED = "the <extra_id_0> sat on a dog"


@pytest.fixture(scope="module")
def models():
    return {"small": small_model(), "dense": small_model(1, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)}


@pytest.fixture(scope="module")
def running(models):
    with Running(models, LIMITS.replace(slots=2, max_source_length=32)) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def wait_for(browser, condition):
    waiting = f"new Promise((done) => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look(); }})"
    assert browser.value(f"Promise.race([{waiting}, new Promise((done) => setTimeout(() => done(false), 20000))])"), condition


def press(browser, key, **options):
    for kind in ("keyDown", "keyUp"):
        browser.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, **options)


def generate(browser, **values):
    """Types the text, sets controls and presses Ctrl and Enter."""
    wait_for(browser, "document.querySelectorAll('#model option').length === 2")
    for name, value in {"max_tokens": 12, "seed": 3, **values}.items():
        browser.value(f"document.getElementById('{name}').value = '{value}'")
    browser.value("document.getElementById('model').dispatchEvent(new Event('change'))")
    browser.value("document.getElementById('prompt').focus()")
    browser.ask("Input.insertText", text=TYPED)
    press(browser, "Enter", modifiers=2, windowsVirtualKeyCode=13)
    wait_for(browser, "document.getElementById('said').textContent.includes('tokens in')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_text_goes_in_and_out_by_keyboard_and_every_token_shows_its_expert(width, dark, running, browser, models):
    address = f"http://127.0.0.1:{running.client.port}/"
    browser.show(address, width, dark)
    generate(browser)
    said = models["small"].generate(TYPED, max_new_tokens=12).texts[0]
    assert browser.value("document.querySelector('#outputs .output').textContent") == said
    wait_for(browser, "!document.getElementById('routing').hidden")
    tokens = len(models["small"].vocabulary.encode(TYPED)) + 1
    assert browser.value("document.querySelector('#stacks .tokens').children.length") == tokens
    assert browser.value("document.querySelectorAll('#stacks h3').length") == 2
    browser.value("document.querySelector('#stacks .token').focus()")
    assert browser.value("[...document.querySelectorAll('#stacks .token')].some((e) => e.style.opacity === '0.2')")
    browser.value("document.activeElement.blur()")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"serve_{width}_{'dark' if dark else 'light'}.png")


def test_samples_have_texts_of_their_own_and_a_model_without_experts_shows_none(running, browser):
    browser.show(f"http://127.0.0.1:{running.client.port}/", 800)
    generate(browser, model="dense", temperature=2, top_k=0, n=2)
    texts = browser.value("[...document.querySelectorAll('#outputs .output')].map((e) => e.textContent)")
    assert texts == running.client.texts(model="dense", prompt=TYPED, max_tokens=12, temperature=2, top_k=0, n=2, seed=3)
    assert browser.value("document.getElementById('routing').hidden")


def test_what_the_server_refuses_is_said_on_the_page(running, browser):
    browser.show(f"http://127.0.0.1:{running.client.port}/", 800)
    wait_for(browser, "document.querySelectorAll('#model option').length === 2")
    browser.value(f"document.getElementById('prompt').value = '{TEXT * 3}'")
    browser.value("document.getElementById('form').requestSubmit()")
    wait_for(browser, "document.getElementById('said').textContent.includes('this server takes 32')")
