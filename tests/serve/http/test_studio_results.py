"""Work that the Teach tab starts: other bases, evaluations and exports."""

import asyncio
import json
import subprocess
from zipfile import ZipFile

import pytest

from tests.serve.server import running
from tests.support.running_job import running_job
from tests.support.tiny import save_tiny
from veneer.api import load
from veneer.errors import ConfigError, InputError
from veneer.files.strict_json import read_yaml
from veneer.jobs.limits import JobLimits
from veneer.jobs.record import write_record
from veneer.library.library import Library
from veneer.serve.engine.fine_tuning import TrainSettings
from veneer.serve.studio.bases import StudioBases
from veneer.serve.studio.bodies import ExportBody
from veneer.serve.studio.commands import CommandLine, WorkQueue
from veneer.serve.studio.drafts import Drafts
from veneer.serve.studio.exports import export_report, finish_export
from veneer.serve.studio.judging import JudgedModel, save_result, worse_rows
from veneer.serve.studio.results import Results

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


@pytest.fixture
def draft(server):
    """The path of uploaded rows, while another job runs, so that none is started."""
    headers = {"content-type": "application/octet-stream"}
    with running_job(server.service.fine_tuning.store), server.http(headers=headers) as client:
        sent = client.post(f"{API}/drafts", params={"name": "rows.csv"}, content=ROWS)
        path = f"{API}/drafts/{sent.json()['id']}"
        yield path
        server.post(f"{path}/remove", {})


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

    def failed():
        server.post(f"{draft}/export", {"to": "llamacpp_adapter"})
        with server.http() as client:
            for _ in range(300):
                state = client.get(f"{draft}/export").json()
                if state["state"] not in ("waiting", "running"):
                    return state
                asyncio.run(asyncio.sleep(0.1))
        raise AssertionError(state)

    ballast = folder / "jobs" / "ballast"
    ballast.write_bytes(bytes(2**20))
    assert "limit is 1,048,576" in failed()["error"]
    ballast.unlink()
    state = failed()
    assert state["state"] == "failed" and "adapter" in state["error"]
    assert str(folder) not in json.dumps(state)
    assert not list((folder / "jobs" / "drafts").glob("*/export")), "a failed export leaves files"


def test_an_export_writes_no_larger_file_than_there_is_room_for(tmp_path):
    settings = CommandLine(5, (1, 0))._process_settings(10)
    with (tmp_path / "file").open("wb") as file:
        subprocess.run(["head", "-c", "100", "/dev/zero"], stdout=file, **settings)
    assert (tmp_path / "file").stat().st_size == 10


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


def test_names_of_judged_adapters_are_not_kept(server, draft):
    job = server.post(f"{draft}/train", {"settings": {"steps": 2}}).json()
    finish(server, job["id"])
    refusal = server.post(f"{draft}/keep", {"name": "trial-0123456789abcdef"})
    assert refusal.status_code == 400 and "Choose another name" in refusal.text


def test_work_is_done_one_piece_at_a_time_and_can_be_stopped():
    order = []

    async def scenario():
        queue, ends = WorkQueue(5, (1, 0)), asyncio.Event()

        async def first(commands):
            order.append("first")
            await ends.wait()

        async def second(commands):
            order.append("second")
            raise InputError("no")

        queue.start(("a", "judge"), first)
        queue.start(("a", "judge"), first)
        queue.start(("b", "export"), second)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        states = [queue.state(key)["state"] for key in (("a", "judge"), ("b", "export"))]
        assert states == ["running", "waiting"] and order == ["first"]
        queue.start(("a", "export"), first)
        await queue.stop("a")  # the second piece has not begun
        for kind in ("judge", "export"):
            assert queue.state(("a", kind))["state"] == "idle"
        for _ in range(9):
            await asyncio.sleep(0)
        assert queue.state(("b", "export")) == {"state": "failed", "seconds": 0, "error": "no"}
        await queue.close()

    asyncio.run(scenario())
    assert order == ["first", "second"]


def test_rows_that_became_worse_are_listed_worst_first():
    rows = [{"line": line} for line in (2, 3, 4, 5)]
    before = [{"nats": nats, "tokens": 2, "label": "a", "accuracy": 1.0} for nats in (2, 2, 2, 2)]
    after = [{"nats": nats, "tokens": 2, "label": "b", "accuracy": 0.0} for nats in (3, 1, 6, 2)]
    worse = worse_rows(rows, before, after, ["accuracy"])
    assert worse["count"] == 2 and [row["line"] for row in worse["rows"]] == [4, 2]
    assert worse["rows"][0]["losses"] == [1, 3]
    assert worse["rows"][0]["before"] == {"answer": "a", "metrics": {"accuracy": 1.0}}


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
