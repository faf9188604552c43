"""OpenAI's fine-tuning API, asked with OpenAI's own client; trainers are real processes."""

import asyncio
import csv
import io
import json
import os
import re
import socket
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from tests.serve.server import BASE, running
from tests.support.running_job import running_job
from tests.support.tiny import save_tiny
from veneer import api
from veneer.adapters.config import Prefix
from veneer.cli.answers.server import _read_train_settings, add_server_flags
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.jobs.limits import JobLimits
from veneer.jobs.record import JobRecord, TrainingJob, write_record
from veneer.jobs.store import JobStore
from veneer.jobs.suspension import PIPE
from veneer.library.library import Library
from veneer.serve.engine.fine_tuning import TrainSettings, page_of
from veneer.serve.http.download import BYTES_TYPE, Download
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed
from veneer.serve.http.uploads import Arrivals
from veneer.serve.limits import MOST_UPLOADS
from veneer.serve.protocols.fine_tuning import CreateJobBody, job_object
from veneer.serve.refusals import Refusal
from veneer.training.config import RunConfig

USE, TRAIN = "use-" + "k" * 20, "train-" + "k" * 20
KEYS = ApiKeys([ApiKey("use", hashed(USE), "asker"), ApiKey("train", hashed(TRAIN), "teacher")])
AUTHORIZED = {"authorization": f"Bearer {TRAIN}"}
ROWS = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yes"}]}
    for n in range(12)
]
MOST_BYTES = 100_000


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


UPLOAD_FORM = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", lines(ROWS))}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny(folder, "llama_untied")
    return api.load(str(folder))


@contextmanager
def training_server(folder, base, **changed):
    settings = TrainSettings(
        run={"base": base.source},
        folder=folder / "jobs",
        share=1.0,
        limits=JobLimits(file_bytes=MOST_BYTES),
    )
    given = {"base": base, "keys": KEYS, "train": settings, **changed}
    with running(Library(folder / "library"), **given) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory, base):
    with training_server(tmp_path_factory.mktemp("server"), base) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.openai(api_key=TRAIN)


def upload(client, rows=ROWS, name="rows.jsonl"):
    return client.files.create(file=(name, lines(rows)), purpose="fine-tune")


def test_a_script_of_openais_runs_and_its_model_answers_after_a_restart_of_the_server(
    tmp_path, base
):
    with training_server(tmp_path, base) as server:
        client = server.openai(api_key=TRAIN)
        file = upload(client)
        assert (file.filename, file.purpose, file.status) == (
            "rows.jsonl",
            "fine-tune",
            "processed",
        )
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            validation_file=upload(client, ROWS[:4]).id,
            suffix="My Tickets!",
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}},
            },
            metadata={"team": "support"},
        )
        assert job.status == "validating_files" and job.fine_tuned_model is None
        waiting = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
        assert waiting.status == "queued" and waiting.hyperparameters.n_epochs == "auto"
        assert client.fine_tuning.jobs.pause(waiting.id).status == "paused"
        assert client.fine_tuning.jobs.resume(waiting.id).status == "queued"
        assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
        client.files.delete(file.id)  # the job has a copy

    with training_server(tmp_path, base) as server:
        client = server.openai(api_key=TRAIN)
        deadline = time.monotonic() + 240
        while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in (
            "succeeded",
            "failed",
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert job.status == "succeeded", job.error
        model = job.fine_tuned_model
        assert model.startswith("ft-my-tickets-") and job.metadata == {"team": "support"}
        assert job.trained_tokens > 0 and job.finished_at >= job.created_at
        answer = server.openai(api_key=USE).chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi 3"}], max_tokens=4
        )
        assert answer.model == model
        assert model in [card.id for card in client.models.list()]

        (result,) = job.result_files
        rows = list(csv.DictReader(io.StringIO(client.files.content(result).text)))
        assert [row["step"] for row in rows if row["train_loss"]] == [str(n) for n in range(1, 7)]
        assert any(row["valid_loss"] for row in rows)
        assert client.files.retrieve(result).purpose == "fine-tune-results"
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
        assert "successfully completed" in events[0].message  # the client reads every page
        assert events[-1].message.startswith("Created fine-tuning job")
        assert [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data][
            ::-1
        ] == list(range(1, 7))
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
        assert model in [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints]
        listed = client.fine_tuning.jobs.list(limit=1)
        assert listed.has_more and [job.id for job in listed] == [waiting.id, job.id]
        assert str(tmp_path) not in json.dumps(
            [job.model_dump() for job in listed] + [event.model_dump() for event in events]
        )


def test_the_script_of_the_guide_runs_unchanged(tmp_path, base, monkeypatch, capsys):
    """From the upload to an answer, with rows as the guide shows them."""
    text = (Path(__file__).parents[2] / "docs" / "guides" / "openai_fine_tune.md").read_text()
    (script,) = re.findall(r'```python title="tune.py"\n(.*?)```', text, re.DOTALL)
    (row,) = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    (model,) = re.findall(r'model="(.*?)"', script)
    assert f"--name {model} --train" in text
    (tmp_path / "tickets.jsonl").write_text(row * 4)
    monkeypatch.chdir(tmp_path)
    with training_server(tmp_path, base, name=model, keys=ApiKeys([])) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "any text")
        exec(compile(script, "tune.py", "exec"), {})
        assert re.match(r"succeeded ft-tickets-[0-9a-f]{6} None\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"method": {"type": "reinforcement"}}, "method.type", "reinforcement is not supported"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "0 to 0"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", '"auto"'),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "hyperparameters", "one of"),
        ({"training_file": "file-0123456789abcdef"}, "training_file", "There is no file"),
        ({"training_file": "../../etc/passwd"}, "training_file", "There is no file"),
        ({"model": "gpt-4o-mini"}, "model", "does not exist"),
        ({"epochs": 3}, "epochs", "is not a field"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, body, param, message):
    file = client.files.list().data
    file_id = file[0].id if file else upload(client).id
    body = {"model": BASE, "training_file": file_id, **body}
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/fine_tuning/jobs", body=body, cast_to=object)
    assert error.value.status_code in (400, 404)
    assert error.value.body["param"] == param and message in error.value.body["message"]


def test_what_an_address_asks_for_and_nobody_reads_is_refused_by_name(server, client):
    with pytest.raises(openai.BadRequestError) as fault:
        client.fine_tuning.jobs.list(metadata={"team": "a"})
    assert fault.value.param == "metadata[team]"
    assert client.files.list(purpose="fine-tune", order="asc", limit=1) is not None
    with server.http(headers=AUTHORIZED) as http:
        for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/adapters", "/v1/runs"):
            for known in ("", "&limit=1&after=0"):
                refused = http.get(f"{path}?model=a{known}")
                assert (refused.status_code, refused.json()["error"]["type"]) == (
                    400,
                    "invalid_request_error",
                )
        assert http.get("/v1/files", params={"order": "up"}).json()["error"]["param"] == "order"
        ask = {"model": BASE, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert http.post("/v1/messages?beta=true", json=ask).status_code == 200
        assert http.post("/v1/messages?strict=1", json=ask).status_code == 400
        assert http.post("/v1/chat/completions?stream=true", json=ask).status_code == 400
        for path in ("/", "/healthz", "/metrics"):
            assert http.get(f"{path}?from=elsewhere").status_code == 200


def test_wrong_rows_are_a_failed_job_that_names_them(client):
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in "ab"]
    two_calls = [ROWS[0]["messages"][0], {"role": "assistant", "tool_calls": calls}]
    rows = [
        *ROWS,
        {"messages": [{"role": "user", "content": "x"}], "functions": [{"name": "f"}]},
        {"messages": two_calls, "parallel_tool_calls": False},
    ]
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, rows).id)
    assert job.status == "failed" and job.error.param == "training_file"
    assert job.error.code == "invalid_training_file"
    assert "'functions' would not be trained on" in job.error.message
    assert "2 tool calls, and parallel_tool_calls is false" in job.error.message
    assert "rows.jsonl:13" in job.error.message


def test_bodies_become_settings_of_a_run():
    body = CreateJobBody.read(
        {
            "model": "b",
            "training_file": "f",
            "seed": 7,
            "method": {
                "type": "dpo",
                "dpo": {"hyperparameters": {"beta": 0.2, "batch_size": 2, "n_epochs": "auto"}},
            },
        }
    )
    assert body.run_settings() == {
        "seed": 7,
        "show_answers": False,
        "batch": 2,
        "objective": {"name": "dpo", "beta": 0.2},
    }
    large = {"model": "b", "training_file": "f", "hyperparameters": {"batch_size": 256}}
    settings = CreateJobBody.read(large).run_settings()
    assert (settings["batch"], settings["micro_batch"]) == (256, 8)


def test_a_learning_rate_multiplier_scales_the_usual_rate(server):
    fine_tuning = server.service.fine_tuning
    settings = [
        fine_tuning._settings(
            CreateJobBody.read(
                {
                    "model": BASE,
                    "training_file": "f",
                    "hyperparameters": {"learning_rate_multiplier": factor},
                }
            )
        )
        for factor in (1, 0.5)
    ]
    assert settings[0]["learning_rate"] == 2 * settings[1]["learning_rate"] > 0


def test_rows_are_cut_at_the_positions_of_the_served_model(server, base):
    body = {"model": BASE, "training_file": "f"}
    settings = server.service.fine_tuning._settings(CreateJobBody.read(body))
    assert settings["length"] == base.model.config.max_position_embeddings


def test_the_usual_rate_of_a_continued_adapter_is_that_of_its_method(tmp_path, server, base):
    attachment = base.attach(Prefix(tokens=2, start="random"), name="prefix", seed=0)
    manifest = manifest_for(base, method="prefix")
    write_adapter(tmp_path / "a", attachment, manifest, model=base.model)
    base.detach("prefix")
    server.library.add(tmp_path / "a", name="prefixes")
    body = {
        "model": "prefixes",
        "training_file": "f",
        "hyperparameters": {"learning_rate_multiplier": 1},
    }
    settings = server.service.fine_tuning._settings(CreateJobBody.read(body))
    assert settings["learning_rate"] == Prefix().default_learning_rate(base)


@pytest.mark.parametrize("method", ["lora", "qlora", {"name": "dora", "lr_ratio": 2}])
def test_a_multiplier_of_one_trains_as_auto_does(server, base, method):
    def settings(multiplier):
        body = {
            "model": BASE,
            "training_file": "f",
            "hyperparameters": {"learning_rate_multiplier": multiplier},
        }
        made = server.service.fine_tuning._settings(CreateJobBody.read(body))
        config = RunConfig.of({**made, "data": "rows.jsonl", "out": "out"})
        return config.resolved(base, rows=10), config.method.for_learning_rate(config.learning_rate)

    server.service.fine_tuning.run["method"] = method
    try:
        (auto, auto_method), (one, one_method) = settings("auto"), settings(1)
    finally:
        del server.service.fine_tuning.run["method"]
    assert auto_method == one_method and auto_method.lr_ratio in (2.0, 4.0)
    assert (auto.learning_rate, auto.quantize) == (one.learning_rate, one.quantize)


def test_only_the_scope_train_and_this_site_may_touch_files_and_jobs(server):
    paths = (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("DELETE", "/v1/files/file-0123456789abcdef"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-000000000000/cancel"),
    )
    with server.http() as http:
        for method, path in paths:
            wrong_key = http.request(method, path, headers={"authorization": f"Bearer {USE}"})
            assert (wrong_key.status_code, wrong_key.json()["error"]["code"]) == (
                403,
                "wrong_scope",
            )
            other_site = http.request(
                method, path, headers={**AUTHORIZED, "origin": "https://evil.example"}
            )
            assert other_site.json()["error"]["code"] == "unknown_origin"
            assert http.request(method, path).status_code == 401


def test_uploads_are_bounded_and_leave_nothing_when_they_are_cut_off(server, client):
    def stored():
        folder = server.service.fine_tuning.uploads.folder
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    before = stored()
    with pytest.raises(openai.APIStatusError, match="larger than 100,000 bytes"):
        client.files.create(file=("a.jsonl", b"x" * (MOST_BYTES + 70_000)), purpose="fine-tune")
    with pytest.raises(openai.APIStatusError, match="larger than the 100,000 bytes"):
        client.files.create(file=("a.jsonl", b"x" * (MOST_BYTES + 1)), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="only fine-tune"):
        client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="not a file of rows"):
        client.files.create(file=("a.exe", b"{}"), purpose="fine-tune")
    with server.http(headers=AUTHORIZED) as http:
        assert http.post("/v1/files", json={}).status_code == 415
        assert http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}).status_code == 400
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {TRAIN}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 50000\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"x" * 20_000)
    time.sleep(0.2)
    assert stored() == before
    file = upload(client, name="../../x.jsonl")
    assert file.filename == "x.jsonl"
    assert client.files.content(file.id).read() == lines(ROWS)
    assert client.files.delete(file.id).deleted and stored() == before


def test_limits_of_a_store_are_answered_without_an_invitation_to_retry(client, server):
    store = server.service.fine_tuning.store
    before, store.limits = store.limits, JobLimits(jobs=0)
    try:
        with pytest.raises(openai.APIStatusError, match="which is the limit") as error:
            client.fine_tuning.jobs.create(model=BASE, training_file=upload(client).id)
    finally:
        store.limits = before
    assert error.value.body["code"] == "quota_reached"
    assert error.value.response.headers["x-should-retry"] == "false"


def test_a_server_that_is_to_end_shows_its_jobs_and_takes_no_more_files(tmp_path, base):
    with training_server(tmp_path, base) as server, server.http(headers=AUTHORIZED) as http:
        server.service.loop.refuse_new()
        assert http.get("/v1/fine_tuning/jobs").status_code == 200
        assert http_status(server, UPLOAD_FORM) == 503


def test_a_server_that_does_not_train_says_how_to_turn_it_on(tmp_path):
    with running(Library(tmp_path / "library")) as server, server.http() as http:
        for path in ("/v1/files", "/v1/files/x/content", "/v1/fine_tuning/jobs"):
            answer = http.get(path)
            assert answer.status_code == 404 and "--train" in answer.json()["error"]["message"]


def test_the_end_of_a_running_job_is_estimated_by_its_last_steps(tmp_path):
    job_id, now = "ftjob-000000000000", time.time()
    record = JobRecord(
        id=job_id, created=1, queued=1, started=now - 60, threads=1, niceness=0, library=""
    )
    job = TrainingJob(record, "running", None, tmp_path, tmp_path / job_id)
    job.run_folder.mkdir()
    records = [{"kind": "start", "steps": 10}]
    records += [{"kind": "step", "step": n, "loss": 1.0, "seconds": 50.0 * n} for n in (1, 2, 3)]
    records += [{"kind": "evaluation", "step": 3, "loss": 1.0, "seconds": 60.0}]

    def estimated(count, state="running", others=0):
        job.records_file.write_bytes(lines(records[:count]))
        return job_object(replace(job, state=state), others=others)["estimated_finish"]

    assert estimated(1) is None and estimated(5, "paused") is None
    assert 0 <= estimated(3) - int(now) - 75 * 8 < 30
    assert 0 <= estimated(5) - int(now) - 120 * 7 < 30
    assert 0 <= estimated(5, others=1) - int(now) - 120 * 14 < 30
    os.utime(job.records_file, (1, now - 120))
    assert job_object(job, others=0)["estimated_finish"] is None, (
        "it was resumed, and no step has ended since"
    )


def test_pages_of_a_list_continue_after_an_id():
    objects = [{"id": name} for name in "abc"]
    assert page_of(objects, None, 2)["has_more"]
    assert page_of(objects, "b", 2) == {
        "object": "list",
        "data": [{"id": "c"}],
        "has_more": False,
        "first_id": "c",
        "last_id": "c",
    }
    with pytest.raises(Refusal):
        page_of(objects, "x", 2)


def test_jobs_from_elsewhere_are_listed_too(server, client):
    fine_tuning = server.service.fine_tuning
    store = JobStore(fine_tuning.store.folder)
    job = store.create(
        {"base": server.base.source}, rows={"train": ROWS}, error="not started in this test"
    )
    listed = client.fine_tuning.jobs.retrieve(job.id)
    assert (listed.status, listed.error.message) == ("failed", "not started in this test")
    assert listed.error.code == "invalid_training_file"
    write_record(job.folder, job.record, started=1.0)  # a trainer ran, and died before its records
    listed = client.fine_tuning.jobs.retrieve(job.id)
    assert (listed.error.code, listed.error.param) == ("training_failed", None)


def test_a_job_says_with_how_many_others_it_trains(server, client):
    store = server.service.fine_tuning.store
    with running_job(store), running_job(store):
        running = [job for job in client.fine_tuning.jobs.list() if job.trains_with == 1]
        assert len(running) == 2
        assert client.fine_tuning.jobs.retrieve(running[0].id).trains_with == 1


def test_a_finished_job_without_its_files_leaves_the_lists_whole(server, client):
    store = JobStore(server.service.fine_tuning.store.folder)
    job = store.create({"base": server.base.source}, rows={"train": ROWS}, error="not started")
    write_record(job.folder, job.record, state="done", started=1.0)
    (result,) = client.fine_tuning.jobs.retrieve(job.id).result_files
    assert job.id in [listed.id for listed in client.fine_tuning.jobs.list()]
    assert result not in [file.id for file in client.files.list()]
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(result)
    with pytest.raises(openai.NotFoundError):
        client.files.content(result)


def test_a_download_beside_a_deletion_is_whole_or_not_found(client, server, caplog):
    """It ended in 500, with the file's path in a traceback."""
    statuses = set()
    with ThreadPoolExecutor(2) as threads, server.http(headers=AUTHORIZED) as http:
        for _ in range(40):
            path = f"/v1/files/{upload(client).id}"
            download = threads.submit(http.get, f"{path}/content")
            deleted = threads.submit(server.http(headers=AUTHORIZED).delete, path)
            statuses.add(status := download.result().status_code)
            assert deleted.result().status_code == 200
            assert status == 404 or download.result().content == lines(ROWS)
    assert statuses <= {200, 404} and "Traceback" not in caplog.text


def test_a_file_that_was_opened_is_sent_whole_although_it_is_deleted(client, server):
    fine_tuning = server.service.fine_tuning
    file = upload(client)

    folder = fine_tuning.uploads.folder / file.id

    def download(**headers):
        response = Download(fine_tuning.content(file.id), "rows, é.jsonl")
        moved = folder.rename(folder.with_name("moved"))
        transport = httpx.ASGITransport(response)

        async def read():
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                return await http.get("/", headers=headers)

        sent = asyncio.run(read())
        moved.rename(folder)
        assert response._file.closed
        return sent

    whole, part = download(), download(range="bytes=3-9")
    assert whole.content == lines(ROWS) and part.content == lines(ROWS)[3:10]
    assert part.status_code == 206 and whole.headers["content-type"] == BYTES_TYPE
    name = "attachment; filename*=UTF-8''rows%2C%20%C3%A9.jsonl"
    assert whole.headers["content-disposition"] == name
    client.files.delete(file.id)
    with pytest.raises(Refusal, match="no file"):
        fine_tuning.content(file.id)


@contextmanager
def open_in_steps(server, pipe):
    """Yields a list of whether a pipe is open for writing in each step of the engine."""
    states = []

    def watch(engine):
        step = engine.step

        def watched(now):
            states.append(is_open(pipe))
            time.sleep(0.01)
            return step(now)

        engine.step = watched

    server.ask_engine(watch)
    yield states
    server.ask_engine(lambda engine: engine.__dict__.pop("step"))


def is_open(pipe):
    try:
        while os.read(pipe, 100):
            pass
    except BlockingIOError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux suspends trainers")
@pytest.mark.parametrize("stream", [True, False])
def test_training_is_suspended_until_the_first_token(server, stream):
    folder = server.service.fine_tuning.store.folder
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / PIPE)
    pipe = os.open(folder / PIPE, os.O_RDONLY | os.O_NONBLOCK)
    body = {"model": BASE, "prompt": "hi", "max_tokens": 40, "ignore_eos": True, "stream": stream}
    try:
        with open_in_steps(server, pipe) as states:
            server.post("/v1/completions", body, headers=AUTHORIZED).raise_for_status()
            assert states[0] and not states[-1], states
            assert server.post("/v1/completions", {}, headers=AUTHORIZED).status_code == 400
        assert not is_open(pipe)
        body = {"model": BASE, "input": "hi"}
        assert server.post("/v1/classify", body, headers=AUTHORIZED).status_code == 400
        assert os.read(pipe, 100) and not is_open(pipe), "it was open for the classification"
    finally:
        os.close(pipe)
        (folder / PIPE).unlink()


def test_files_that_arrive_at_once_are_bounded(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {TRAIN}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 500\r\n\r\n"
    )
    with ExitStack() as open_connections, server.http(headers=AUTHORIZED) as http:
        for _ in range(MOST_UPLOADS):
            connection = socket.create_connection((host, int(port)))
            open_connections.enter_context(connection).sendall(head.encode())
        deadline = time.monotonic() + 30
        while (answer := http.post("/v1/files", **UPLOAD_FORM)).status_code == 200:
            assert time.monotonic() < deadline
        assert answer.status_code == 429 and "again later" in answer.json()["error"]["message"]
    deadline = time.monotonic() + 30
    while http_status(server, UPLOAD_FORM) != 200:  # the others have gone
        assert time.monotonic() < deadline


def test_as_many_files_as_may_arrive_do_and_each_that_ends_makes_room():
    arrivals = Arrivals(2)
    for _ in range(3):
        with arrivals.one(), arrivals.one(), pytest.raises(Refusal, match="2 files arrive"):
            arrivals.one().__enter__()
    with arrivals.one(), arrivals.one():
        pass


def http_status(server, form):
    with server.http(headers=AUTHORIZED) as http:
        return http.post("/v1/files", **form).status_code


def test_the_disk_space_of_jobs_is_a_flag_of_the_server():
    parser = ArgumentParser()
    add_server_flags(parser)
    args = parser.parse_args(["--train", "--jobs-mib", "5"])
    args.base = "tiny"
    assert _read_train_settings(args).limits == JobLimits(disk_bytes=5 * 2**20)


def test_a_number_of_many_digits_is_a_wrong_limit(server):
    with server.http(headers=AUTHORIZED) as http:
        for limit in ("000000001" + "0" * 5000, "1000000000", "0", "-1", "x", ""):
            assert http.get("/v1/files", params={"limit": limit}).status_code == 400
