"""The Teach tab, in a browser that drops a file of rows."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.serve.http.browser import CHROMIUM
from tests.serve.server import add_adapter, running
from tests.support.running_job import running_job
from tests.support.tiny import save_tiny
from veneer.adapters.config import METHODS
from veneer.api import load
from veneer.data.examples import RowRef
from veneer.data.files.formats import to_row
from veneer.data.files.layouts import detect
from veneer.data.files.places import RowFile
from veneer.data.teacher_text import ABOUT_DOCUMENT
from veneer.errors import DataError, UnknownNameError
from veneer.files.strict_json import read_yaml
from veneer.jobs.published import note_published
from veneer.library.library import Library
from veneer.objectives.config import Distil
from veneer.serve import limits
from veneer.serve.engine.fine_tuning import TrainSettings
from veneer.serve.http import json_body, uploads
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed
from veneer.serve.studio import row_preview
from veneer.serve.studio.events import follow
from veneer.serve.studio.keeping import held_out_questions
from veneer.serve.studio.row_preview import column_map
from veneer.serve.studio.training import job_look
from veneer.training.config import RunConfig

API = "/studio/api"
WAIT = 240.0
"""Seconds for a trainer's process on a busy machine."""
TICKETS = [
    ("The tap leaks.", "repairs"),
    ("Where is my parcel?", "shipping"),
    ("I was charged twice.", "billing"),
    ("The door is stuck.", "repairs"),
    ("Refund me at me@example.com", "billing"),
    ("The parcel is open.", "shipping"),
    ("The lift is stuck.", "repairs"),
    ("The lift is stuck.", "repairs"),
    ("Change my address.", "shipping"),
    ("The invoice is wrong.", "billing"),
]
CSV = "ticket,queue\n" + "".join(f'"{ticket}",{queue}\n' for ticket, queue in TICKETS)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is on the path: apt-get install chromium"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


def settings(folder):
    return TrainSettings(run={"base": str(folder / "base")}, folder=folder / "jobs", share=1)


@pytest.fixture(scope="module")
def server(folder):
    base = load(save_tiny(folder / "base"))
    library = Library(folder / "adapters")
    add_adapter(library, folder / "poems", "poems", 1, base)
    with running(library, base=base, studio=True, train=settings(folder)) as running_server:
        yield running_server


@pytest.fixture
def tab(server, chromium):
    page = chromium.open(f"{server.url}/")
    page.until("document.querySelector('#tab-teach').ariaSelected === 'true'")
    yield page
    page.check_quiet(server.url)


def upload(server, text, name="rows.csv", **headers):
    headers = {"content-type": "application/octet-stream", **headers}
    return server.http(headers=headers).post(f"{API}/drafts", params={"name": name}, content=text)


def drop(tab, name, text):
    """Drops a file on the page, as a desktop does."""
    tab.run(
        "(() => { const data = new DataTransfer();"
        f" data.items.add(new File([{json.dumps(text)}], {json.dumps(name)}));"
        " for (const type of ['dragover', 'drop']) document.querySelector('#drop').dispatchEvent("
        "new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data})); })()"
    )


def choose(tab, selector, value):
    tab.run(
        f"(() => {{ const field = document.querySelector({selector!r});"
        f" field.value = {json.dumps(value)};"
        " field.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def drop_tickets(tab):
    """Drops the tickets and chooses their columns; returns when they are checked."""
    drop(tab, "tickets.csv", CSV)
    tab.until("document.querySelector('.records') !== null")
    for name, column, missing in (("prompt", "ticket", "answer"), ("completion", "queue", "")):
        tab.run(f"document.querySelector('[data-name={name}]').focus()")
        choose(tab, f"[data-name={name}]", column)
        reason = f"Choose the column of {missing}." if missing else ""
        tab.until(f"document.querySelector('#rows-reason').textContent === '{reason}'")
    tab.until("document.querySelector('#rows-check .counts') !== null")
    assert tab.run("document.activeElement.dataset.name") == "completion", "it was replaced"


@needs_browser
def test_dropped_rows_are_mapped_checked_and_shown_token_by_token(tab, tmp_path):
    drop_tickets(tab)
    cards = tab.run("[...document.querySelectorAll('.card')].map((card) => card.innerText)")
    assert len(cards) == 3 and "The tap leaks." in cards[0] and "repairs" in cards[0]
    assert "2\nheld out" in tab.text("#rows-check .counts")
    findings = tab.run("[...document.querySelectorAll('.finding')].map((e) => e.textContent)")
    assert any("D209" in text and "row 9" in text and "lift" in text for text in findings)
    assert any("e-mail" in text and "me@example.com" in text for text in findings)
    tokens = "[...document.querySelectorAll('.tokens .token%s')].map((e) => e.textContent).join('')"
    assert "The tap leaks." in tab.run(tokens % ":not(.trained)")
    assert "repairs" in tab.run(tokens % ".trained")
    assert "leaks" not in tab.run(tokens % ".trained")
    tab.call("Page.reload")
    tab.until("document.querySelector('#rows-check .counts') !== null")
    assert tab.text("#rows-name").startswith("tickets.csv"), "a reload finds the rows"
    tab.screen(390, 844, phone=True)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.run("document.querySelector('#rows-next').focus()")
    tab.press("Enter")
    tab.until("document.activeElement.id === 'go-method'")
    tab.until("document.querySelector('[data-path=steps]') !== null")
    choose(tab, "#method-objective", "distil")
    (tmp_path / "handbook.md").write_text("Repairs take a week.")
    tab.files("#document-file", tmp_path / "handbook.md")
    tab.until("document.querySelector('#document-name').textContent.startsWith('handbook.md')")
    assert tab.run("document.documentElement.scrollWidth") <= 390


@needs_browser
def test_a_dropped_file_becomes_a_model_that_answers(server, tab, folder):
    drop_tickets(tab)
    tab.click("#go-method")
    tab.until("document.querySelector('[data-path=steps]') !== null")
    for setting, value in {"steps": 200, "batch": 2, "evaluate_every": 50}.items():
        choose(tab, f"[data-path={setting}]", str(value))
    tab.until("document.querySelector('#method-plan .advice') !== null", WAIT)
    draft = server.http().get(f"{API}/drafts").json()["data"][0]
    plan = server.post(f"{API}/drafts/{draft['id']}/plan", draft["method"])  # it is remembered
    assert plan.json()["plans"][0]["base"] == "tiny" and str(folder) not in plan.text
    assert "learning rate from the base's weights (default)" in tab.text(".advice h3")
    tab.run("document.querySelector('[data-path=learning_rate]').value = '0.1'")
    tab.click("#method-plan .advice button")
    assert tab.run("document.querySelector('[data-path=learning_rate]').value") == ""
    tab.click("#method-next")
    tab.click("#train-start")
    points = "(document.querySelector('#train-curve .line.a')?.getAttribute('points') ?? '').length"
    tab.until(f"{points} > 0", WAIT)
    assert tab.run("document.querySelector('#train-curve .line.base') !== null")
    with running_job(server.service.fine_tuning.store):
        together = "Training, together with 1 other job."
        tab.until(f"document.querySelector('#train-state').textContent === {together!r}")
    tab.click("#train-stop")
    tab.until("!document.querySelector('#train-resume').hidden", WAIT)
    assert "checkpoint" in tab.text("#train-state")
    stopped = tab.run(points)
    tab.call("Page.reload")
    tab.click("#train-resume")  # a reload finds the run, at its step
    tab.until("!document.querySelector('#train-next').hidden", WAIT)
    assert tab.text("#train-facts").startswith("200 of 200")
    assert tab.run(points) > stopped
    tab.click("#train-next")
    answers = "document.querySelectorAll('.judged .right, .judged .wrong').length === %d"
    tab.until(answers % 4)
    columns = "document.querySelectorAll('.measured th').length === %d"
    tab.until(columns % 3, WAIT)
    assert "2 held-out rows" in tab.text("#judge-figures")
    assert "against the base" in tab.text(".measured tr:last-child"), "how much it forgets"
    tab.until("document.querySelector('#judge-worse').childNodes.length")
    choose(tab, "#judge-other", "poems")
    tab.until(answers % 6)
    tab.until(columns % 4, WAIT)
    tab.click("#judge-next")
    tab.type("#keep-name", "queues\n")
    tab.until("document.querySelector('#keep-python').textContent.includes('queues')")
    names = [entry.name for entry in server.library.entries()]
    assert names == ["poems", "queues"], "the name under which it was judged is gone"
    body = {"model": "queues", "messages": [{"role": "user", "content": "The tap leaks."}]}
    assert server.post("/v1/chat/completions", {**body, "max_tokens": 8}).status_code == 200
    draft = server.http().get(f"{API}/drafts").json()["data"][0]
    archive = server.http().get(f"{API}/drafts/{draft['id']}/files/adapter")
    assert "adapter/adapter_model.safetensors" in ZipFile(BytesIO(archive.content)).namelist()
    report = server.http().get(f"{API}/drafts/{draft['id']}/files/report")
    assert report.headers["content-disposition"].startswith("attachment")
    choose(tab, "#export-to", "llamacpp_adapter")
    tab.click("#export-start")
    tab.until("document.querySelector('#exported button') !== null", WAIT)
    assert "--lora queues.gguf" in tab.text("#exported pre")
    exported = server.http().get(f"{API}/drafts/{draft['id']}/export/file")
    assert exported.content.startswith(b"GGUF")
    tab.click("#keep-ask")
    tab.until("[...document.querySelectorAll('.column input')].some((e) => e.value === 'queues')")


@needs_browser
def test_texts_of_a_file_are_text(tab):
    row = json.dumps({"prompt": "<img src=x onerror=alert(1)>", "completion": "<b>bold</b>"})
    drop(tab, "<i>odd</i>.jsonl", (row + "\n") * 3)
    tab.until("document.querySelector('#rows-check .counts') !== null")
    assert tab.text("#rows-name").startswith("i>.jsonl"), "the part behind the last slash"
    assert "<img src=x" in tab.text(".card")
    assert tab.run("document.querySelectorAll('#teach :is(img, b.bold, i)').length") == 0


def test_an_upload_is_refused_as_the_command_line_refuses_the_file(server):
    assert "the extension decides" in upload(server, "a", "rows.txt").json()["error"]["message"]
    assert "as CSV" in upload(server, "a", "rows.XLSX").json()["error"]["message"]
    refusal = server.http().post(f"{API}/drafts", params={"name": "a.csv"}, data={"a": "b"})
    assert refusal.status_code == 415
    assert server.http().get(f"{API}/drafts/..%2F..%2Fetc").status_code == 404
    other_site = upload(server, CSV, origin="https://elsewhere.example")
    assert other_site.status_code == 403
    body = {"layout": "nothing", "validation_share": 2}
    draft = upload(server, CSV).json()
    faults = server.post(f"{API}/drafts/{draft['id']}/rows", body)
    assert faults.status_code == 400
    assert "validation_share" in faults.json()["error"]["message"]
    assert server.post(f"{API}/drafts/{draft['id']}/remove", {}).status_code == 200
    assert server.http().get(f"{API}/drafts/{draft['id']}").status_code == 404


def test_a_slow_upload_is_taken_while_its_parts_arrive(server, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.4)
    for module in (uploads, json_body):
        monkeypatch.setattr(module, "BODY_SECONDS", 0.4)
    text = CSV.encode()

    def parts(pause):
        for start in range(0, len(text), len(text) // 8):
            time.sleep(pause)
            yield text[start : start + len(text) // 8]

    draft = upload(server, parts(0.15))
    assert draft.status_code == 200 and draft.json()["bytes"] == len(text)
    refused = upload(server, parts(1.5))
    assert refused.status_code == 408
    document = server.http(headers={"content-type": "application/octet-stream"}).post(
        f"{API}/drafts/{draft.json()['id']}/document", params={"name": "a.md"}, content=parts(0.15)
    )
    assert document.status_code == 200


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "\ud800", "completion": "a"},
        {"prompt": "a", "completion": "b", "\udfff": "c"},
        {"pro\0mpt\ud800": "a", "answer\ud800": "\0"},
        {"messages": [{"role": "user\ud800", "content": "\ud800"}]},
    ],
    ids=["value", "other column", "all columns", "messages"],
)
def test_half_a_surrogate_pair_in_a_file_is_answered_on_every_path(server, row):
    uploaded = upload(server, json.dumps(row) + "\n", "rows.jsonl")
    assert uploaded.status_code == 200, uploaded.text
    path = f"{API}/drafts/{uploaded.json()['id']}"
    for name in ("", "/check"):
        assert server.http().get(path + name).status_code == 200, name
    for name in ("/rows", "/plan"):
        assert server.post(path + name, {}).status_code in (200, 400), name
    assert server.post(f"{path}/remove", {}).status_code == 200


def test_as_many_rows_as_the_page_takes_are_counted_and_one_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(row_preview, "MOST_ROWS", 3)
    file = RowFile("rows.jsonl", tmp_path / "rows.jsonl")
    row = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    for count in (1, 3):
        file.path.write_text(row * count, encoding="utf-8")
        assert row_preview.count_records(file) == count
    file.path.write_text(row * 4, encoding="utf-8")
    with pytest.raises(DataError, match="more than 3 rows"):
        row_preview.count_records(file)


def test_settings_are_refused_as_the_command_line_refuses_them(server):
    draft = upload(server, CSV.replace("ticket,queue", "prompt,completion")).json()
    plan = f"{API}/drafts/{draft['id']}/plan"
    both = {"settings": {"steps": 3, "epochs": 2}}
    assert "give one" in server.post(plan, both).json()["error"]["message"]
    unknown = server.post(plan, {"settings": {"out": "/tmp"}}).json()["error"]["message"]
    assert "'out' is not offered here" in unknown
    assert server.http().get(f"{API}/drafts/{draft['id']}/events").status_code == 404
    assert server.post(f"{API}/drafts/{draft['id']}/stop", {}).status_code == 404


def test_choices_that_are_refused_are_not_kept(server):
    draft = upload(server, CSV.replace("ticket,queue", "prompt,completion")).json()
    path = f"{API}/drafts/{draft['id']}"
    kept = server.http().get(path).json()["method"]
    for body in ({"base": "/etc"}, {"settings": {"out": "/tmp"}}):
        for action in ("plan", "train"):
            assert server.post(f"{path}/{action}", body).status_code in (400, 404)
            assert server.http().get(path).json()["method"] == kept, (action, body)
        assert server.http().get(f"{path}/check").status_code == 200
    assert server.post(f"{path}/plan", {"kind": "style", "keep": True}).status_code == 200
    assert server.http().get(path).json()["method"]["kind"] == "style"


def test_each_setting_on_the_page_has_the_help_of_the_command_line(server):
    described = server.http().get(f"{API}/settings").json()["settings"]
    assert described["batch"]["help"] == RunConfig.model_fields["batch"].description
    assert described["batch"]["default"] == 8
    assert [path for path, setting in described.items() if not setting["help"]] == []
    assert {"answers", "dpo"} <= set(described["objective.name"]["choices"])


@pytest.fixture
def busy(server):
    """Another job runs meanwhile, so that none is started."""
    with running_job(server.service.fine_tuning.store):
        yield


@pytest.mark.usefixtures("busy")
def test_the_teacher_of_a_run_reads_an_uploaded_document_as_distil_does(server, folder):
    draft = upload(server, CSV.replace("ticket,queue", "prompt,completion")).json()
    path, store = f"{API}/drafts/{draft['id']}", server.service.fine_tuning.store
    help_text = (
        server.http().get(f"{API}/settings").json()["settings"]["objective.document"]["help"]
    )
    assert help_text == " ".join(Distil.model_fields["document"].description.split())
    headers = {"content-type": "application/octet-stream"}

    def send(content, name="../handbook.md", **changes):
        with server.http(headers={**headers, **changes}) as client:
            return client.post(f"{path}/document", params={"name": name}, content=content)

    for content, status, message in (
        (b" ", 400, "is empty"),
        (b"\xff", 400, "is not UTF-8"),
        (bytes(2**20 + 1), 413, "larger than"),
    ):
        refusal = send(content)
        assert refusal.status_code == status and message in refusal.text
    assert send(b"{}", **{"content-type": "application/json"}).status_code == 415
    assert send(b"Repairs take a week.").json()["document"] == {"name": "handbook.md", "bytes": 20}
    body = {"method": "prefix", "settings": {"objective.name": "distil", "steps": 2}}
    job = store.get(server.post(f"{path}/train", body).json()["id"])
    run = read_yaml(job.run_file)
    assert run["method"] == {"name": "prefix", **METHODS["prefix"].of_document}
    assert run["objective"]["system"] == ABOUT_DOCUMENT
    document = Path(run["objective"]["document"])
    assert document.read_text() == "Repairs take a week."
    assert send(b"Another text.").status_code == 200
    assert len(list(document.parent.iterdir())) == 2, "the job still reads its own"
    assert server.post(f"{path}/document/remove", {}).json()["document"] is None
    assert [*document.parent.iterdir()] == [document]
    refusal = server.post(f"{path}/plan", {"settings": {"objective.document": "/etc/passwd"}})
    assert "'objective.document' is not offered here" in refusal.json()["error"]["message"]
    assert server.post(f"{path}/remove", {}).status_code == 200
    assert not document.exists()


def test_no_answer_names_a_folder_of_the_server(server, folder):
    draft = upload(server, "prompt,completion\na\n", "../broken.csv").json()
    assert draft["name"] == "broken.csv"
    report = server.http().get(f"{API}/drafts/{draft['id']}/check")
    assert report.json()["refused"] and str(folder) not in report.text


@pytest.mark.usefixtures("busy")
def test_held_out_rows_are_those_of_the_job_whatever_is_chosen_later(server):
    draft = upload(server, CSV.replace("ticket,queue", "prompt,completion")).json()
    path = f"{API}/drafts/{draft['id']}"
    assert server.http().get(f"{path}/held_out").status_code == 404
    assert server.post(f"{path}/train", {"settings": {"steps": 2}}).status_code == 200
    before = server.http().get(f"{path}/held_out").json()
    assert before["rows"] == 2
    server.post(f"{path}/rows", {**draft["rows"], "validation_share": 0.6})
    assert server.http().get(f"{path}/held_out").json() == before
    store = server.service.fine_tuning.store
    (job,) = [job for job in store.jobs() if job.record.details.get("draft") == draft["id"]]
    store.cancel(job.id)
    assert server.post(f"{path}/train", {}).status_code == 200
    record = store.get(server.http().get(path).json()["job"]).folder / "job.json"
    text = record.read_text()
    record.write_text("{}")
    assert draft["id"] in [d["id"] for d in server.http().get(f"{API}/drafts").json()["data"]]
    record.write_text(text)
    assert server.post(f"{path}/remove", {}).status_code == 200
    assert [job for job in store.jobs() if job.record.details.get("draft") == draft["id"]] == []


def test_held_out_questions_are_the_rows_whose_answer_is_a_text_without_tools():
    hello = {"role": "user", "content": "Hello"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    records = [
        {"messages": [hello, {"role": "assistant", "content": "Hi"}]},
        {"messages": [hello, {"role": "assistant", "content": "Hi"}], "tools": [tool]},
        {"text": "Hello"},
    ]
    rows = [
        to_row(record, RowRef("rows", line), detect(frozenset(record)))
        for line, record in enumerate(records, 1)
    ]
    assert held_out_questions(rows) == [{"line": 1, "messages": [hello], "expected": "Hi"}]


@pytest.mark.usefixtures("busy")
def test_rows_whose_job_was_deleted_are_trained_again(server):
    draft = upload(server, CSV.replace("ticket,queue", "prompt,completion")).json()
    path, store = f"{API}/drafts/{draft['id']}", server.service.fine_tuning.store
    job = server.post(f"{path}/train", {}).json()
    store.delete(job["id"])
    assert server.http().get(path).json()["training"] is None
    assert server.post(f"{path}/train", {}).json()["state"] == "queued"
    assert server.post(f"{path}/remove", {}).status_code == 200


@pytest.mark.usefixtures("busy")
def test_two_pages_start_a_draft_once_and_remove_it_once(server):
    draft = upload(server, CSV.replace("ticket,queue", "prompt,completion")).json()
    path, store = f"{API}/drafts/{draft['id']}", server.service.fine_tuning.store
    before = len(store.jobs())
    with ThreadPoolExecutor(4) as pages:
        starts = pages.map(lambda _: server.post(f"{path}/train", {}).status_code, range(4))
        assert sorted(starts) == [200, 400, 400, 400]
        assert len(store.jobs()) == before + 1
        ends = pages.map(lambda _: server.post(f"{path}/remove", {}).status_code, range(4))
        assert sorted(ends) == [200, 404, 404, 404]
    assert len(store.jobs()) == before


def test_who_follows_a_job_that_is_deleted_is_told():
    async def progress(after):
        raise UnknownNameError("there is no job 'x'")

    async def followed():
        return [event async for event in follow(job_look(progress, 0), lambda: False)]

    (event,) = asyncio.run(followed())
    assert json.loads(event.removeprefix(b"data: "))["fault"].startswith("there is no job")


def test_a_key_for_use_may_not_train(folder):
    key = "k" * 40
    keys = ApiKeys([ApiKey("use", hashed(key), "one")])
    train = TrainSettings(run={"base": "tiny"}, folder=folder / "jobs")
    with running(Library(folder / "other"), keys=keys, studio=True, train=train) as guarded:
        assert guarded.http().get(f"{API}/drafts").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert guarded.http(headers=headers).get(f"{API}/drafts").status_code == 403


def test_a_train_key_adds_no_version_to_an_adapter_that_no_job_has_made(folder):
    keys = {scope: f"{scope}-" + "k" * 40 for scope in ("train", "admin")}
    stored = ApiKeys([ApiKey(scope, hashed(key), scope) for scope, key in keys.items()])
    library, train = Library(folder / "guarded"), TrainSettings(run={}, folder=folder / "own")
    add_adapter(library, folder / "by_hand", "poems", 1)
    with running(library, keys=stored, studio=True, train=train) as guarded:
        headers = {scope: {"authorization": f"Bearer {key}"} for scope, key in keys.items()}
        draft = upload(guarded, CSV, **headers["train"]).json()

        def keep(scope, name):
            path = f"{API}/drafts/{draft['id']}/keep"
            answer = guarded.http(headers=headers[scope]).post(path, json={"name": name})
            return answer.status_code, answer.json()["error"]["code"]

        assert keep("train", "poems") == (403, "wrong_scope")
        assert keep("train", "tales") == keep("admin", "poems") == (404, "job_not_found")
        store = guarded.service.fine_tuning.store.folder
        add_adapter(library, folder / "of_a_job", "poems", 2)
        note_published(store, library.get("poems"))
        assert keep("train", "poems") == (404, "job_not_found")
        add_adapter(library, folder / "by_hand_again", "poems", 3)
        assert keep("train", "poems") == (403, "wrong_scope")


def test_columns_that_swap_names_are_renamed_and_others_of_the_name_are_dropped():
    swapped = column_map(["prompt", "completion"], {"prompt": "completion", "completion": "prompt"})
    assert swapped == {"completion": "prompt", "prompt": "completion"}
    assert column_map(
        ["a", "prompt", "completion"], {"prompt": "a", "completion": "completion"}
    ) == {"a": "prompt", "prompt": None}
