"""The page at /, in a browser that clicks and reads."""

import concurrent.futures
import json
import re
import time
from pathlib import Path

import pytest

import veneer
from tests.serve.http.browser import CHROMIUM
from tests.serve.server import BASE, add_adapter, running
from tests.support.tiny import tiny_tokenizer
from veneer.library.library import Library
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is on the path: apt-get install chromium"
)
WEB = Path(veneer.__file__).parent / "serve" / "web"
NAMES = ["poems", "tickets", "weather"]
CHAT = "/v1/chat/completions"
FIGURES = (
    r"([\d.]+ tokens/s · )?first after \d+ ms · \d+ of \d+ prompt tokens cached · \d+ tokens,"
    r" (stopped.*|ended)"
)


def record(step, loss):
    return {
        "kind": "step",
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "tokens": 500,
        "seconds": 0.5,
    }


def write(folder, records):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    library = Library(folder / "adapters")
    for seed, name in enumerate(NAMES, 1):
        add_adapter(library, folder / name, name, seed)
    start = {"kind": "start", "base": "/home/somebody/models/tiny", "method": "lora", "steps": 40}
    write(folder / "runs", [])
    write(folder / "runs" / "first", [start, *(record(n, 3.0 - n / 20) for n in range(1, 11))])
    return folder


@pytest.fixture(scope="module")
def server(places):
    with running(Library(places / "adapters"), runs=places / "runs") as found:
        yield found


@pytest.fixture
def tab(server, chromium, tmp_path):
    found = chromium.open(f"{server.url}/", downloads=tmp_path)
    found.until("document.querySelectorAll('.column').length === 2")
    yield found
    found.check_quiet(server.url)


def set_field(tab, name, value):
    code = f"{{ const e = document.querySelector({name!r}); e.value = {json.dumps(str(value))};"
    tab.run(code + "e.dispatchEvent(new Event('input', {bubbles: true})); }")


def ask(tab, question="Where is my parcel?", tokens=24):
    set_field(tab, "#max-tokens", tokens)
    tab.type("#question", f"{question}\n")


def ended(tab, columns):
    """Each column's parts, when all have ended."""
    code = "[...document.querySelectorAll('.turn:last-child .answer')]"
    tab.until(f"{code}.length === {columns} && !document.querySelector('#send').hidden")
    parts = (
        "[e.querySelector('h4').innerText, e.querySelector('.said').textContent,"
        " e.querySelector('.figures').innerText]"
    )
    return tab.run(f"{code}.map((e) => {parts})")


def body_of(question, tokens, **more):
    messages = [{"role": "user", "content": question}]
    return {
        "model": BASE,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0.7,
        "seed": 1,
        **more,
    }


def text_of(server, body):
    return server.post(CHAT, body).json()["choices"][0]["message"]["content"]


def test_it_is_one_file_that_runs_its_own_script_alone(server):
    found = server.http().get("/")
    policy = found.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert len(re.findall(r"<script", found.text)) == len(re.findall(r"<style", found.text)) == 1
    tags = re.findall(r"<[a-z][^>]*>", found.text.partition("<script")[0])
    assert not [
        tag
        for tag in tags
        if re.search(r"""\s((on\w+|style)=|(src|href|action)=["'](?!data:))""", tag)
    ]
    assert not re.search(r"@import|url\(|innerHTML", found.text)
    assert server.http().get("/", headers={"host": "elsewhere.example"}).status_code == 403


def test_no_line_of_the_page_is_longer_than_a_line_of_python():
    files = [path for path in WEB.rglob("*") if path.is_file()]
    long_lines = [
        f"{path.name}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert len(files) > 20 and long_lines == []


def test_base_and_adapters_answer_side_by_side_in_the_same_forwards(server, tab):
    tab.click("#add-column")
    tab.click("#add-column")
    tab.until(
        "document.querySelectorAll('.column').length === 4 &&"
        " !document.querySelector('#add-column')"
    )
    most = 0
    with server.unhurried(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, tab, tokens=200)
        while most < 4:
            most = max(most, server.ask_engine(lambda engine: len(engine.scheduler.running)))
        asked.result()
    found = ended(tab, 4)
    assert [title for title, _, _ in found] == [BASE, *NAMES]
    plain = (
        "[...document.querySelectorAll('.turn:last-child .answer')].map((e) =>"
        " [...e.querySelectorAll('.said')]"
    )
    plain += (
        ".map((said) => [...said.childNodes].filter((n) => n.nodeName !== 'DEL').map((n) =>"
        " n.textContent).join('')))"
    )
    texts = [text for (text,) in tab.run(plain)]
    assert texts == [
        text_of(server, body_of("Where is my parcel?", 200, model=name)) for name in [BASE, *NAMES]
    ]
    assert len(set(texts)) == 4
    for _, _, figures in found:
        assert re.fullmatch(FIGURES, figures)


def test_what_differs_from_the_base_is_marked_and_may_be_hidden(server, tab):
    ask(tab)
    ended(tab, 2)
    tab.until(
        "document.querySelector('.turn ins') !== null && document.querySelector('.turn del') !=="
        " null"
    )
    own, base = (
        text_of(server, body_of("Where is my parcel?", 24, model=name)) for name in ("poems", BASE)
    )
    parts = tab.run(
        "[...document.querySelectorAll('.said')[1].childNodes].map((n) => [n.nodeName,"
        " n.textContent])"
    )
    assert "".join(text for kind, text in parts if kind != "DEL") == own
    assert "".join(text for kind, text in parts if kind != "INS") == base
    display = "getComputedStyle(document.querySelector('.turn del')).display"
    assert tab.run(display) == "none", "the answer first"
    tab.click("#differences")
    assert tab.run(display) != "none"


def test_a_column_that_is_done_or_fails_lets_the_others_go_on(server, tab):
    tab.type(".column input[type=text]", "nobody\n")
    tab.run("document.querySelector('.column input[type=text]').dispatchEvent(new Event('change'))")
    with server.unhurried():
        ask(tab, tokens=900)
        said = tab.until("document.querySelector('.turn .bad')?.innerText ?? ''")
        assert said.startswith("The model `nobody` does not exist.")
        assert tab.run("document.querySelector('#send').hidden"), "the base goes on"
        tab.press("Escape")
        tab.until("!document.querySelector('#send').hidden")
    for _ in range(100):
        if server.ask_engine(lambda engine: engine.scheduler.idle):
            break
        time.sleep(0.05)
    assert server.ask_engine(lambda engine: engine.scheduler.idle), (
        "what is stopped is computed no more"
    )


def test_a_weight_is_what_the_adapter_acts_with(server, tab):
    set_field(tab, ".column input[type=range]", 0.35)
    ask(tab)
    title = ended(tab, 2)[1][0]
    assert title == "poems × 0.35"
    parts = tab.run(
        "[...document.querySelectorAll('.said')[1].childNodes].map((n) => [n.nodeName,"
        " n.textContent])"
    )
    body = body_of("Where is my parcel?", 24, adapters=[{"name": "poems", "weight": 0.35}])
    assert "".join(text for kind, text in parts if kind != "DEL") == text_of(server, body)


def test_a_second_question_goes_on_from_each_columns_own_answers(server, tab):
    ask(tab)
    first = text_of(server, body_of("Where is my parcel?", 24, model="poems"))
    ended(tab, 2)
    ask(tab, "And now?")
    ended(tab, 2)
    tab.click(".turn:last-child .answer:last-child .tools button")
    shown = tab.until(
        "document.querySelector('.turn:last-child .answer:last-child .prompt').textContent"
    )
    messages = [("user", "Where is my parcel?"), ("assistant", first), ("user", "And now?")]
    rendered = tiny_tokenizer().apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = server.post(
        "/tokenize", {"messages": [{"role": r, "content": c} for r, c in messages]}
    ).json()["tokens"]
    assert shown == server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert (
        rendered.startswith(shown[:10]) and "Where is my parcel?" in shown and "And now?" in shown
    )
    tab.click("#new")
    assert tab.run("document.querySelectorAll('.turn').length") == 0


def test_an_answer_is_copied_as_code_that_gives_it_again(server, tab, capsys):
    set_field(tab, ".column input[type=range]", 1.5)
    ask(tab, 'It\'s "here"?\\')
    ended(tab, 2)
    want = text_of(
        server, body_of('It\'s "here"?\\', 24, adapters=[{"name": "poems", "weight": 1.5}])
    )
    tab.click(".answer:last-child .tools button:nth-child(3)")
    code = tab.text("#code")
    exec(compile(code, "copied", "exec"), {})
    assert capsys.readouterr().out == want + "\n"
    tab.click("#code-close")
    tab.click(".answer:last-child .tools button:nth-child(2)")
    curl = tab.text("#code")
    address, data = re.search(r"^curl (\S+)", curl)[1], re.search(r"-d '(.*)'$", curl, re.DOTALL)[1]
    assert address == server.url + CHAT
    assert text_of(server, json.loads(data.replace("'\\''", "'"))) == want
    tab.press("Escape")


def test_the_answers_are_saved_with_what_they_came_from(tab, tmp_path):
    ask(tab)
    found = ended(tab, 2)
    tab.click("#export")
    for _ in range(200):
        if (tmp_path / "answers.json").exists():
            break
        time.sleep(0.02)
    saved = json.loads((tmp_path / "answers.json").read_text())
    (turn,) = saved["turns"]
    assert saved["base"] == BASE and turn["settings"]["seed"] == 1
    assert [answer["model"] for answer in turn["answers"]] == [BASE, "poems"]
    assert (
        turn["answers"][0]["text"] == found[0][1] and turn["answers"][0]["figures"]["tokens"] == 24
    )


def test_a_file_of_prompts_becomes_a_table(server, tab, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text('id,Question\n1,"One, two\nthree"\n2,Hello\n')
    set_field(tab, "#max-tokens", 6)
    tab.click("#tab-table")
    tab.files("#file", file)
    said = "prompts.csv: 2 prompts of column Question"
    tab.until(f"document.querySelector('#table-said').innerText === '{said}'")
    tab.click("#table-run")
    tab.until("document.querySelector('#table-said').innerText === '4 of 4 answers'")
    cells = tab.run(
        "[...document.querySelectorAll('#answers tr')].map((r) => [...r.children].map((c) =>"
        " c.textContent))"
    )
    assert cells[0] == ["prompt", BASE, "poems"]
    for row, prompt in zip(cells[1:], ["One, two\nthree", "Hello"], strict=True):
        assert row == [
            prompt,
            *(text_of(server, body_of(prompt, 6, model=name)) for name in (BASE, "poems")),
        ]
    tab.click("#table-jsonl")
    saved = tmp_path / "answers.jsonl"
    for _ in range(200):
        if saved.exists() and saved.read_text().endswith("\n"):
            break
        time.sleep(0.02)
    lines = [json.loads(line) for line in saved.read_text().split("\n") if line]
    assert [line["answers"]["poems"] for line in lines] == [row[2] for row in cells[1:]]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"nothing": 1}\n')
    tab.files("#file", bad)
    assert "prompt 2 has nothing in column prompt" in tab.until(
        "document.querySelector('#table-said .bad')?.innerText ?? ''"
    )


def test_the_column_of_a_table_is_chosen_where_no_name_says_it(tab, tmp_path):
    file = tmp_path / "tickets.csv"
    file.write_text("ticket,queue\nIt leaks.,repairs\nWhere is it?,shipping\n")
    tab.click("#tab-table")
    tab.files("#file", file)
    assert "choose the column" in tab.until(
        "document.querySelector('#table-said .bad')?.innerText ?? ''"
    )
    assert tab.run("document.querySelector('#table-run').disabled")
    change = "new Event('change')"
    tab.run(
        "const c = document.querySelector('#table-column'); c.value = 'ticket';"
        f" c.dispatchEvent({change})"
    )
    said = "tickets.csv: 2 prompts of column ticket"
    tab.until(f"document.querySelector('#table-said').innerText === '{said}'")
    cells = tab.run(
        "[...document.querySelectorAll('#answers td:first-child')].map((c) => c.textContent)"
    )
    assert cells == ["It leaks.", "Where is it?"]


def test_the_library_shows_what_each_adapter_changes(tab):
    tab.click("#tab-library")
    tab.until("document.querySelectorAll('#adapters-list button').length === 3")
    set_field(tab, "#filter", "wea")
    tab.click("#adapters-list button")
    tab.until("document.querySelector('#adapter h2')?.innerText === 'weather'")
    assert "lora, rank 3" in tab.text("#adapter")
    kinds = tab.run(
        "[...document.querySelectorAll('.picture svg')].map((s) => [s.ariaLabel,"
        " s.children.length])"
    )
    assert sorted(kinds) == [["down_proj", 2], ["q_proj", 2], ["v_proj", 2]]
    tab.type("#adapter input", "tickets\n")
    tab.until(
        "document.querySelectorAll('#adapter .picture svg[aria-label^=cosine] rect').length === 2"
    )
    assert "° to tickets@1" in tab.text("#adapter")
    tab.click("#adapter .actions button")
    names = "[...document.querySelectorAll('.column input[type=text]')].map((e) => e.value)"
    assert tab.run(names) == ["poems", "weather"]


def test_a_runs_curve_grows_while_it_is_looked_at(tab, places):
    tab.click("#tab-runs")
    tab.until("document.querySelector('#run h2')?.innerText === 'first'")
    points = "document.querySelector('#run .line.quiet').getAttribute('points').split(' ').length"
    assert tab.run(points) == 10
    assert "lora on tiny" in tab.text("#run") and "somebody" not in tab.text("body")
    write(
        places / "runs" / "first",
        [record(11, 2.0), {"kind": "evaluation", "step": 11, "loss": 2.2}],
    )
    tab.until(f"{points} === 11 && document.querySelectorAll('#run .dot').length === 1")
    write(places / "runs" / "first", [{"kind": "end", "reason": "done", "step": 11}])
    tab.until("document.querySelector('#run .soft').innerText.includes('done')")


def test_enter_is_a_new_line_where_one_types_with_thumbs(tab):
    tab.screen(390, 844, phone=True)
    ask(tab, "One")
    assert tab.run("document.querySelector('#question').value") == "One\n"
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.click("#send")
    ended(tab, 2)
    assert tab.run("document.documentElement.scrollWidth") <= 390


def test_tabs_go_by_arrow_keys_and_the_question_by_a_stroke(tab):
    tab.run("document.querySelector('#tab-ask').focus()")
    tab.press("ArrowRight")
    assert tab.run("location.hash + document.activeElement.id") == "#tabletab-table"
    tab.click("#tab-ask")
    tab.run("document.activeElement.blur()")
    tab.press("/")
    assert tab.run("document.activeElement.id") == "question"


def test_a_key_is_typed_in_where_one_is_needed(places, chromium):
    key = "k" * 40
    with running(
        Library(places / "adapters"), keys=ApiKeys([ApiKey("use", hashed(key), "one")])
    ) as server:
        tab = chromium.open(f"{server.url}/")
        tab.until("document.querySelector('#key-dialog').open")
        tab.type("#key", "wrong\n")
        tab.until(
            "document.querySelector('#key-said').innerText.startsWith('This key is not one of')"
        )
        tab.run("document.querySelector('#key').value = ''")
        tab.type("#key", f"{key}\n")
        tab.until("document.querySelectorAll('.column').length === 2")
        ask(tab)
        found = ended(tab, 2)
        assert "24 tokens" in found[0][2]
        tab.click(".answer .tools button:nth-child(2)")
        assert key not in tab.text("#code") and "$VENEER_API_KEY" in tab.text("#code")
