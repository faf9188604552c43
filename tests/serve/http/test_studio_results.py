"""Work that the Teach tab starts: other bases, evaluations and exports."""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from zipfile import ZipFile

import pytest

from tests.serve.server import add_adapter, running
from tests.support.models.reasoning import conversation, reasoning_tokenizer
from tests.support.running_job import running_job
from tests.support.tiny import save_tiny
from veneer.api import load
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity
from veneer.data.load import examine_data
from veneer.errors import ConfigError, InputError, QuotaError
from veneer.files.partial import unfinished
from veneer.files.strict_json import read_json, read_yaml
from veneer.jobs.limits import JobLimits
from veneer.jobs.record import write_record
from veneer.jobs.uploads import UploadStore
from veneer.library.library import Library
from veneer.serve.engine.fine_tuning import TrainSettings
from veneer.serve.studio import commands, events, work
from veneer.serve.studio.bases import StudioBases
from veneer.serve.studio.bodies import ExportBody
from veneer.serve.studio.commands import CommandLine
from veneer.serve.studio.drafts import Drafts
from veneer.serve.studio.exports import export_report, finish_export
from veneer.serve.studio.judging import JudgedModel, save_result, whole_rows, worse_rows
from veneer.serve.studio.plans import Plans
from veneer.serve.studio.results import Results
from veneer.serve.studio.work import WorkKey, WorkQueue, work_look

API = "/studio/api"
ROWS = "prompt,completion\n" + "".join(f"question {n},answer {n}\n" for n in range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def server(folder):
    base = load(save_tiny(folder / "base"))
    save_tiny(folder / "models" / "other", "qwen2")
    train = TrainSettings(
        run={"base": str(folder / "base"), "quantize": "nf4"},
        folder=folder / "jobs",
        limits=JobLimits(disk_bytes=2**20),
    )
    library = Library(folder / "adapters")
    bases = [folder / "models"]
    with running(library, base=base, studio=True, train=train, bases=bases) as running_server:
        yield running_server


@contextmanager
def uploaded(server, text, name="rows.jsonl"):
    """The path of uploaded rows, while another job runs, so that none is started."""
    headers = {"content-type": "application/octet-stream"}
    with running_job(server.service.fine_tuning.store), server.http(headers=headers) as client:
        sent = client.post(f"{API}/drafts", params={"name": name}, content=text)
        path = f"{API}/drafts/{sent.json()['id']}"
        yield path
        server.post(f"{path}/remove", {})


@pytest.fixture
def draft(server):
    with uploaded(server, ROWS, "rows.csv") as path:
        yield path


def finish(server, job_id):
    """Marks a job as done, with an adapter that no command can read."""
    job = server.service.fine_tuning.store.get(job_id)
    (job.run_folder / "adapter").mkdir(parents=True)
    write_record(job.folder, job.record, state="done")


def test_a_run_on_another_base_is_a_job_and_no_model_of_this_server(server, folder, draft):
    listed = server.http().get(f"{API}/bases")
    bases = {base["name"]: base for base in listed.json()["data"]}
    assert (bases["models/other"]["title"], bases["models/other"]["folder"]) == ("other", "models")
    assert str(folder) not in listed.text
    unknown = server.post(f"{draft}/train", {"base": "models/../base"})
    assert unknown.status_code == 404 and "not on this machine" in unknown.text

    job = server.post(f"{draft}/train", {"base": "models/other", "settings": {"steps": 2}}).json()
    run = read_yaml(server.service.fine_tuning.store.get(job["id"]).run_file)
    assert run["base"] == str(folder / "models" / "other")
    assert "quantize" not in run, "the server's format is of the server's base"
    command = "veneer studio --base models/other"
    assert job["base"] == {"name": "other", "served": False, "command": command}
    assert job["ahead"] == 1
    assert server.http().get(f"{draft}/held_out").json()["rows"] == 2, "read by its tokenizer"
    assert not server.http().get(f"{draft}/check").json()["refused"]
    trial = server.post(f"{draft}/try", {})
    assert trial.status_code == 409 and command in trial.text and "tiny" in trial.text


def test_only_a_finished_run_is_judged_and_exported(server, draft):
    server.post(f"{draft}/train", {"settings": {"steps": 2}})
    for path, body in (("evaluation", {}), ("export", {"to": "ollama"})):
        refusal = server.post(f"{draft}/{path}", body)
        assert refusal.status_code == 400 and "only a finished run" in refusal.text
    assert server.post(f"{draft}/export", {"to": "../x"}).status_code == 400
    assert server.http().get(f"{draft}/export/file").status_code == 404


def test_an_export_without_room_and_one_that_fails_say_why(server, draft, folder):
    job = server.post(f"{draft}/train", {"settings": {"steps": 2}}).json()
    finish(server, job["id"])

    export = {"to": "llamacpp_adapter"}
    ballast = folder / "jobs" / "ballast"
    ballast.write_bytes(bytes(2**20 - 2**20 // 10))  # the last tenth is left to jobs
    for path, body in (("export", export), ("evaluation", {})):
        refusal = server.post(f"{draft}/{path}", body)
        assert refusal.status_code == 507 and "may fill 943,719" in refusal.text
    ballast.unlink()
    assert server.post(f"{draft}/export", export).status_code == 200
    with server.http().stream("GET", f"{draft}/export/events") as stream:
        lines = [json.loads(line[6:]) for line in stream.iter_lines() if line]
    state = {name: value for line in lines for name, value in line.items()}
    assert state["state"] == "failed" and "adapter" in state["error"]
    assert str(folder) not in json.dumps(state)
    assert not list((folder / "jobs" / "drafts").glob("*/export")), "a failed export leaves files"

    leftover = folder / "jobs" / draft.replace(API, "").lstrip("/") / "export"
    leftover.mkdir()
    with unfinished(folder / "jobs" / "drafts") as removed_draft:  # its removal was interrupted
        (removed_draft / "export").mkdir(parents=True)
        results_of(server, folder)
    assert not leftover.exists(), "a server removes exports that ended with an earlier one"


def test_an_export_writes_no_larger_file_than_there_is_room_for(tmp_path):
    settings = CommandLine(5, (1, 0))._process_settings(10)
    with (tmp_path / "file").open("wb") as file:
        subprocess.run(["head", "-c", "100", "/dev/zero"], stdout=file, **settings)
    assert (tmp_path / "file").stat().st_size == 10


@pytest.mark.parametrize("file", ["export/file", "files/adapter", "files/report", "files/card"])
def test_a_download_beside_the_removal_of_its_rows_is_whole_or_not_found(
    server, folder, tmp_path, file, caplog
):
    statuses, contents = set(), set()
    for number in range(12):
        with uploaded(server, ROWS, "rows.csv") as path:
            job_id = server.post(f"{path}/train", {"settings": {"steps": 2}}).json()["id"]
            finish(server, job_id)
            run = server.service.fine_tuning.store.get(job_id).run_folder
            (run / "adapter").rmdir()
            add_adapter(Library(tmp_path / str(number)), run / "adapter", "made", 1)
            (run / "report.html").write_text("report")
            export = folder / "jobs" / "drafts" / path.rpartition("/")[2] / "export"
            export.mkdir()
            (export / "rows.gguf").write_bytes(bytes(200_000))
            (export / "export.json").write_text('{"file": "rows.gguf"}')
            if number == 0:
                whole = server.http().get(f"{path}/{file}")
                assert whole.status_code == 200
            with ThreadPoolExecutor(2) as threads:
                download = threads.submit(server.http().get, f"{path}/{file}")
                removed = threads.submit(server.post, f"{path}/remove", {})
                assert removed.result().status_code == 200
            statuses.add(download.result().status_code)
            contents.add(len(download.result().content) * (download.result().status_code == 200))
    assert statuses <= {200, 404} and contents <= {0, len(whole.content)}
    assert "Traceback" not in caplog.text


def results_of(server, folder):
    """The results of the server's drafts, whose coroutines run in this thread."""
    tuning = server.service.fine_tuning
    bases = StudioBases(server.base, "tiny", {"base": str(folder / "base")}, [])
    drafts = Drafts(tuning.store.folder / "drafts", tuning.uploads)

    async def read(function):
        return function()

    library = Library(folder / "adapters")
    return Results(tuning.store, library, bases, drafts, read=read, check=read)


@pytest.mark.parametrize("length", [32, 2048])
def test_rows_that_the_run_cuts_are_not_evaluated(server, draft, folder, tmp_path, length):
    choices = {"length": length, "long_rows": "cut", "validation_share": 0.2}
    assert server.post(f"{draft}/rows", choices).status_code == 200
    job_id = server.post(f"{draft}/train", {"settings": {"steps": 2}}).json()["id"]
    job, results = server.service.fine_tuning.store.get(job_id), results_of(server, folder)
    if length == 32:
        with pytest.raises(ConfigError, match="all held-out rows are cut at 32 tokens"):
            results._prepare_evaluation(job, tmp_path / "judge" / job_id)
        return
    results._prepare_evaluation(job, tmp_path / "judge" / job_id)
    assert len((tmp_path / "judge" / job_id / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("objective", ["dpo", "kto", "classify"])
def test_a_run_is_judged_by_the_answers_that_it_should_give(server, folder, tmp_path, objective):
    """Rejected answers were judged as right ones, also those that were only rated."""
    records = {
        "dpo": lambda n: {"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": "no"},
        "kto": lambda n: {
            "prompt": f"say {n}",
            "completion": "yes" if n % 2 else "no",
            "label": n % 2 > 0,
        },
        "classify": lambda n: {"text": f"say {n}", "label": "ab"[n % 2]},
    }
    text = "".join(json.dumps(records[objective](number)) + "\n" for number in range(40))
    with uploaded(server, text) as draft:
        choices = {"layout": "auto", "validation_share": 0.5}
        assert server.post(f"{draft}/rows", choices).status_code == 200
        settings = {"steps": 2, "objective.name": objective}
        started = server.post(f"{draft}/train", {"settings": settings})
        assert started.status_code == 200, started.text
        held_out = server.http().get(f"{draft}/held_out").json()
        job = server.service.fine_tuning.store.get(started.json()["id"])
        judged, results = tmp_path / "judge" / job.id, results_of(server, folder)
        results._prepare_evaluation(job, judged)
    shown = read_json(judged / "evaluation.json")["rows"]
    assert held_out["rows"] == len(held_out["questions"]) == len(shown)
    wanted = [row["expected"] for row in [*shown, *held_out["questions"]]]
    lines = [json.loads(line) for line in (judged / "rows.jsonl").read_text().splitlines()]
    if objective == "classify":
        assert len(shown) == 20 and set(wanted) == {"a", "b"}
        assert {line["label"] for line in lines} == {"a", "b"}
        return
    assert len(shown) == 20 if objective == "dpo" else 0 < len(shown) < 20
    assert all(answer.startswith("yes") for answer in wanted)
    assert all(line["completion"][0]["content"].startswith("yes") for line in lines)


def test_answers_that_are_all_rated_bad_are_ratings_and_none_is_expected(server, folder, tmp_path):
    record = {"completion": "no", "label": False}
    text = "".join(json.dumps({"prompt": f"say {n}", **record}) + "\n" for n in range(20))
    with uploaded(server, text) as draft:
        server.post(f"{draft}/rows", {"layout": "auto", "validation_share": 0.5}).raise_for_status()
        started = server.post(f"{draft}/train", {"settings": {"steps": 2}})
        assert started.status_code == 200, started.text
        job = server.service.fine_tuning.store.get(started.json()["id"])
        assert read_yaml(job.run_file)["objective"]["name"] == "kto"
        with pytest.raises(ConfigError, match="no held-out rows with a right answer"):
            results_of(server, folder)._prepare_evaluation(job, tmp_path / "judge" / job.id)


def test_figures_of_an_earlier_run_are_not_those_of_the_next(server, draft, folder):
    store, draft_id = server.service.fine_tuning.store, draft.rpartition("/")[2]
    results = results_of(server, folder)

    def trained():
        job = server.post(f"{draft}/train", {"settings": {"steps": 2}}).json()
        finish(server, job["id"])
        return store.get(job["id"])

    first = trained()
    second = trained()
    late = results.judged_folder(draft_id, first)  # work that was queued before the second run
    late.mkdir(parents=True)
    (late / "evaluation.json").write_text('{"rows": [], "metrics": []}')
    for model in (JudgedModel("base", ""), JudgedModel("adapter", "")):
        save_result(late, model, {"loss": 1.0})
    assert second.id != first.id
    assert not asyncio.run(results.evaluation(draft_id, ""))["whole"]


@pytest.mark.parametrize("name", ["trial-0123456789abcdef", "tiny"])
def test_names_of_judged_adapters_and_of_the_base_are_not_kept(server, draft, name):
    """Under the base's name, the base would answer instead."""
    job = server.post(f"{draft}/train", {"settings": {"steps": 2}}).json()
    finish(server, job["id"])
    refusal = server.post(f"{draft}/keep", {"name": name})
    assert refusal.status_code == 400 and "Choose another name" in refusal.text


def test_a_kept_adapter_is_asked_also_if_its_name_has_a_newer_version(server, tmp_path):
    """Two sets of rows were kept under one name: the first was judged by the second's answers."""
    library = server.library
    with uploaded(server, ROWS, "a.csv") as first, uploaded(server, ROWS, "b.csv") as second:
        for seed, path in enumerate((first, second)):
            job_id = server.post(f"{path}/train", {"settings": {"steps": 2}}).json()["id"]
            finish(server, job_id)
            adapter = server.service.fine_tuning.store.get(job_id).run_folder / "adapter"
            adapter.rmdir()
            add_adapter(Library(tmp_path / str(seed)), adapter, "made", seed)
            if seed:
                refusal = server.post(f"{path}/keep", {"name": "tickets"})
                assert refusal.status_code == 409 and "tickets@1 is in" in refusal.text
            body = {"name": "tickets", "next_version": bool(seed)}
            kept = server.post(f"{path}/keep", body).json()
            assert server.post(f"{path}/keep", {"name": "tickets"}).json() == kept, "once more"
            assert (kept["model"], kept["reference"]) == ("tickets", f"tickets@{seed + 1}")

        def model(path):
            return server.post(f"{path}/try", {}).json()["model"]

        assert [model(first), model(second)] == ["tickets@1", "tickets@2"]
        own = library.get(model(first)).version.object
        library.remove("tickets@1")
        assert library.get(model(first)).version.object == own, "removed, and judged all the same"
        library.remove("tickets")
        assert model(first).startswith("trial-") and model(second).startswith("trial-")


@pytest.fixture
def queue(tmp_path):
    """A function that makes a queue of a server, for drafts "a" * 16 and "b" * 16."""
    drafts = Drafts(tmp_path / "drafts", UploadStore(tmp_path, JobLimits()))
    for letter in "ab":
        drafts.place(letter * 16).mkdir(parents=True)

    async def read(function):
        return function()

    return lambda: WorkQueue(CommandLine(5, (1, 0)), drafts, read)


JUDGE_A, EXPORT_A, EXPORT_B = (
    WorkKey("a" * 16, "judge", "adapter"),
    WorkKey("a" * 16, "export"),
    WorkKey("b" * 16, "export"),
)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_work_is_done_one_piece_at_a_time_and_can_be_stopped(queue):
    order = []

    async def first(commands):
        order.append("first")
        await asyncio.Event().wait()

    async def second(commands):
        order.append("second")
        raise InputError("no")

    async def scenario():
        server = queue()
        await server.start(JUDGE_A, {}, first)
        await server.start(JUDGE_A, {}, first)
        await server.start(EXPORT_B, {}, second)
        await settle()
        states = [server.state(key)["state"] for key in (JUDGE_A, EXPORT_B, EXPORT_A)]
        assert states == ["running", "waiting", "idle"] and order == ["first"]
        await server.start(EXPORT_A, {}, first)
        await server.stop("a" * 16)  # the second piece has not begun
        assert [server.state(key)["state"] for key in (JUDGE_A, EXPORT_A)] == ["stopped", "idle"]
        await settle()
        state = server.state(EXPORT_B)
        assert (state["state"], state["error"], state["open"]) == ("failed", "no", False)
        assert queue().state(EXPORT_B) == state, "the next server finds it"
        await server.close()

    asyncio.run(scenario())
    assert order == ["first", "second"]


def test_work_that_ends_with_its_server_is_interrupted_and_can_be_started_again(queue):
    async def forever(commands):
        await asyncio.Event().wait()

    async def at_once(commands):
        pass

    async def scenario():
        first, second = queue(), queue()
        request = {"to": "ollama"}
        await first.start(EXPORT_A, request, forever)
        await settle()
        assert second.state(EXPORT_A)["state"] == "running", "another server does it"
        await second.start(EXPORT_A, {}, at_once)
        assert second.state(EXPORT_A)["request"] == request, "nobody else starts it meanwhile"
        await first.close()
        state = second.state(EXPORT_A)
        assert (state["state"], state["open"]) == ("interrupted", False)
        assert "Start it again" in state["error"] and state["request"] == request
        await second.start(EXPORT_A, request, at_once)
        await settle()
        assert queue().state(EXPORT_A)["state"] == "done"

    asyncio.run(scenario())


def test_a_draft_keeps_a_bounded_number_of_records(queue, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "MOST_RECORDS", 2)

    async def at_once(commands):
        pass

    async def scenario():
        server = queue()
        for number in range(4):
            await server.start(WorkKey("a" * 16, "judge", f"other-{number}"), {}, at_once)
            await settle()

    asyncio.run(scenario())
    records = tmp_path / "drafts" / ("a" * 16) / "work"
    assert len(list(records.glob("*.json"))) == len(list(records.glob("*.lock"))) == 2


def test_a_plan_is_stopped_by_a_later_one_of_its_draft_alone(tmp_path, monkeypatch):
    """Two people who planned at once stopped each other's plans."""
    script = "import time; time.sleep(1); print('{}')"
    monkeypatch.setattr(commands, "module_command", lambda _: [sys.executable, "-c", script])
    plans = Plans()
    for name in "ab":
        (tmp_path / name).mkdir()

    def plan(name, steps):
        return plans.plan(tmp_path / name, {"steps": steps}, kind="task", compare=False)

    async def plan_both(first, later):
        begun = asyncio.create_task(first)
        await asyncio.sleep(0.5)
        return await asyncio.gather(begun, later, return_exceptions=True)

    async def plan_twice():
        of_two = await plan_both(plan("a", 1), plan("b", 1))
        return of_two, await plan_both(plan("a", 2), plan("a", 3))

    of_two, (stopped, made) = asyncio.run(plan_twice())
    assert of_two == [{}, {}] and made == {}
    assert isinstance(stopped, InputError) and "veneer plan was stopped" in str(stopped)


def test_a_command_is_stopped_once_the_disk_space_is_used_up(monkeypatch):
    monkeypatch.setattr(commands, "DISK_SECONDS", 0.0)
    monkeypatch.setattr(commands, "module_command", lambda name: ["sleep"])

    async def check_room():
        raise QuotaError("jobs and files take 7 bytes", [], "Remove rows first.")

    with pytest.raises(QuotaError, match="veneer 60 was stopped: jobs and files take 7 bytes"):
        asyncio.run(CommandLine(50, check_room=check_room).run(["60"]))


def test_events_of_work_have_what_changed(monkeypatch):
    monkeypatch.setattr(events, "EVERY_SECONDS", 0.0)
    states = iter([{"open": True, "n": 1}, {"open": True, "n": 2}, {"open": False, "n": 2}])

    async def state():
        return next(states)

    async def followed():
        stream = events.follow(work_look(state), lambda: False)
        return [json.loads(event[6:]) async for event in stream]

    assert asyncio.run(followed()) == [{"open": True, "n": 1}, {"n": 2}, {"open": False}]


def test_rows_that_became_worse_are_listed_worst_first():
    rows = [{"line": line} for line in (2, 3, 4, 5)]

    def lines(nats, label, accuracy):
        """Row 3 became two examples, of which the last one is shown."""
        places = ("r:1", "r:2", "r:3", "r:3", "r:4")
        same = {"tokens": 2, "label": label, "accuracy": accuracy}
        return [{"row": place, "nats": n, **same} for place, n in zip(places, nats, strict=True)]

    before, after = lines((2, 2, 3, 1, 2), "a", 1.0), lines((3, 1, 1, 11, 2), "b", 0.0)
    after[2]["label"] = "c"
    worse = worse_rows(rows, before, after, ["accuracy"])
    assert worse["count"] == 2 and [row["line"] for row in worse["rows"]] == [4, 2]
    assert worse["rows"][0]["losses"] == [1, 3]
    assert worse["rows"][0]["before"] == {"answer": "a", "metrics": {"accuracy": 1.0}}
    assert worse["rows"][0]["after"]["answer"] == "b"


@pytest.mark.parametrize("kind", ["conversations", "pairs"])
def test_a_row_that_became_several_examples_is_judged_once(kind, tmp_path):
    """Each of its examples as a row would be divided again."""
    texts = [
        {"messages": conversation(turns, reasons=True, tools=False, system=True)}
        for turns in (2, 1, 3)
    ]
    if kind == "pairs":
        texts = [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": "b"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    files = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "rows.jsonl")}
    rules = RowRules(2048, Capacity(), kind="any")
    data = examine_data(DataConfig.of(files), rules, reasoning_tokenizer())
    assert len(data.validation) == 6
    rows = whole_rows(data, {"length": 2048, "data": {}})
    assert [row.ref.line for row in rows] == [1, 2, 3]
    last = [row.get("messages", [{"content": row.get("chosen")}])[-1]["content"] for row in texts]
    assert [row.messages[-1]["content"] for row in rows] == last


def test_an_export_that_is_a_folder_is_packed_into_one_file(tmp_path):
    out = tmp_path / "tickets"
    out.mkdir()
    (out / "Modelfile").write_text("FROM ./model.gguf")
    command = f"ollama create tickets -f {out}/Modelfile"
    printed = {"out": str(out), "notes": [f"see {tmp_path}/other"], "serve": [command]}
    finish_export(tmp_path, ExportBody(to="ollama"), printed)
    report = export_report(tmp_path)
    assert report["file"] == "tickets.zip" and report["notes"] == ["see other"]
    assert report["commands"] == ["ollama create tickets -f tickets/Modelfile"]
    assert ZipFile(tmp_path / report["file"]).namelist() == ["tickets/Modelfile"]
    assert not out.exists()
