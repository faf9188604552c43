"""Paths of a person from a file to a served adapter, in a browser, without a word about flags."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.serve.http.browser import CHROMIUM
from tests.serve.http.test_studio import choose, drop, settings
from tests.serve.server import add_adapter, running
from tests.support.tiny import save_tiny
from veneer.api import load
from veneer.library.library import Library
from veneer.serve.studio.wording import FLAG

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is on the path: apt-get install chromium"
)
PICTURES = os.environ.get("VENEER_PICTURES")
"""Folder for pictures of the steps; none are taken without it."""
WAIT = 240.0
PAIRS = [
    {"prompt": f"Is {n} even?", "chosen": "yes" if n % 2 == 0 else "no", "rejected": "maybe"}
    for n in range(20)
]
LABELS = [
    {"text": f"The {thing} is {fault}.", "label": "repairs" if fault == "broken" else "shipping"}
    for thing in ("tap", "door", "lift", "parcel", "lamp", "chair", "desk", "pump", "fan", "box")
    for fault in ("broken", "late")
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    base = load(save_tiny(folder / "base"))
    with running(
        Library(folder / "adapters"), base=base, studio=True, train=settings(folder)
    ) as running_server:
        yield running_server


@pytest.fixture
def tab(server, chromium):
    page = chromium.open(f"{server.url}/")
    page.until("document.querySelector('#tab-teach').ariaSelected === 'true'")
    yield page
    page.check_quiet(server.url)


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def look(tab, name):
    """Checks both widths: nothing is wider than the page, and no visible text names a flag."""
    for width, height, phone in ((390, 844, True), (1280, 900, False)):
        tab.screen(width, height, phone=phone)
        if PICTURES:
            whole = tab.run("document.documentElement.scrollHeight")
            tab.screen(width, min(max(whole, height), 4000), phone=phone)
            tab.picture(Path(PICTURES) / f"{name}-{width}.png")
            tab.screen(width, height, phone=phone)
        assert tab.run("document.documentElement.scrollWidth") <= width, (name, width)
    shown = tab.run("document.querySelector('#teach').innerText")
    code = tab.run("[...document.querySelectorAll('#teach pre')].map((e) => e.innerText)")
    for text in code:
        shown = shown.replace(text, "")
    assert not re.search(FLAG.pattern.replace("--?", "--"), shown), shown


def train(tab, press, *, name, steps=4):
    """From checked rows to a finished run."""
    tab.until("document.querySelector('#rows-check .counts') !== null")
    look(tab, f"{name}-1-rows")
    press(tab, "#rows-next")
    tab.until("document.querySelector('[data-path=steps]') !== null")
    choose(tab, "[data-path=steps]", str(steps))
    choose(tab, "[data-path=batch]", "2")
    tab.until("document.querySelector('#method-plan .counts') !== null", WAIT)
    look(tab, f"{name}-2-method")
    press(tab, "#method-next")
    press(tab, "#train-start")
    tab.until("!document.querySelector('#train-next').hidden", WAIT)
    look(tab, f"{name}-3-train")
    press(tab, "#train-next")
    tab.until("document.querySelector('.measured') !== null", WAIT)
    tab.until("document.querySelector('#judge-measure-stop').hidden", WAIT)


def keep(tab, press, name):
    look(tab, f"{name}-4-judge")
    press(tab, "#judge-next")
    tab.until("document.querySelector('#keep-name').checkVisibility()")
    tab.run("document.querySelector('#keep-name').value = ''")
    tab.type("#keep-name", f"{name}\n")
    tab.until(f"document.querySelector('#keep-python').textContent.includes({name!r})")
    look(tab, f"{name}-5-keep")


def keep_under_a_taken_name(server, tab):
    """The page asks first; without consent nothing is kept."""
    add_adapter(server.library, Path(server.library.folder).parent / "other", "taken", 1)
    tab.run("window.confirm = (text) => { window.asked = text; return false; }")
    click(tab, "#judge-next")
    tab.until("document.querySelector('#keep-name').checkVisibility()")
    tab.type("#keep-name", "taken\n")
    assert "next version of taken?" in tab.until("window.asked")
    assert [entry.reference for entry in server.library.entries(name="taken")] == ["taken@1"]
    assert tab.run("document.querySelector('#kept').hidden")
    tab.said.clear()  # the refusal is in the console
    click(tab, "#go-judge")


def click(tab, selector):
    tab.until(f"!document.querySelector({selector!r}).disabled")
    tab.click(selector)


def test_pairs_of_answers_become_a_model_that_prefers_the_good_ones(server, tab):
    drop(tab, "prefs.jsonl", lines_of(PAIRS))
    tab.until("document.querySelector('#rows-check .counts') !== null")
    assert "16 pairs" in tab.text("#rows-check .counts")
    train(tab, click, name="pairs")
    assert tab.run("document.querySelector('#method-objective').value") == "dpo"
    offered = tab.run(
        "[...document.querySelectorAll('#method-objective option')].map(o => o.value)"
    )
    assert offered == ["dpo", "ipo", "kto", "orpo"]
    keep_under_a_taken_name(server, tab)
    keep(tab, click, "pairs")
    assert '"temperature": 0' in tab.text("#keep-curl")
    assert "temperature=0" in tab.text("#keep-python")
    click(tab, "#keep-ask")
    tab.until("[...document.querySelectorAll('.column input')].some((e) => e.value === 'pairs')")


def test_texts_with_labels_become_a_model_that_gives_labels(server, tab):
    drop(tab, "tickets.jsonl", lines_of(LABELS))
    train(tab, click, name="labels")
    assert tab.run("document.querySelector('#rows-layout').value") == "labels"
    assert tab.run("document.querySelector('#method-objective').value") == "classify"
    tab.until("document.querySelectorAll('.judged .right, .judged .wrong').length === 4")
    assert "accuracy" in tab.text(".measured")
    keep(tab, click, "labels")
    assert "/v1/classify" in tab.text("#keep-curl")
    answer = server.post("/v1/classify", {"model": "labels", "input": "The tap is late."})
    assert answer.json()["data"][0]["label"] in ("repairs", "shipping")


def press(tab, selector):
    """Presses a button with the keyboard alone."""
    tab.until(f"!document.querySelector({selector!r}).disabled")
    tab.run(f"document.querySelector({selector!r}).focus()")
    tab.press("Enter")


def test_tool_calls_become_a_model_by_keyboard_alone(server, tab):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    rows = []
    for n in range(20):
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"order": n}}}
        turns = [
            {"role": "user", "content": f"Where is order {n}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        rows.append({"messages": turns, "tools": tools})
    drop(tab, "calls.jsonl", lines_of(rows))
    train(tab, press, name="tools")
    assert tab.run("document.querySelector('#method-objective').value") == "answers"
    keep(tab, press, "tools")
    press(tab, "#keep-ask")
    tab.until("[...document.querySelectorAll('.column input')].some((e) => e.value === 'tools')")
    assert not tab.run("document.querySelector('#differences').checked")
