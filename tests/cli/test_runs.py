"""`veneer runs`: the command line's view of jobs, over folders that no trainer works in."""

import json

import pytest

from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.jobs.events import add_event
from veneer.jobs.record import read_record, write_record
from veneer.jobs.store import JobStore

ROWS = [{"prompt": f"{n}?", "completion": str(n)} for n in range(4)]
START = {
    "kind": "start",
    "base": "/models/tiny",
    "method": "lora",
    "steps": 4,
    "trainable_parameters": 10,
    "total_parameters": 100,
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A failed job with two steps."""
    save_tiny(tmp_path / "tiny", "llama_untied")
    store = JobStore(tmp_path / "jobs", library=tmp_path / "library")
    settings = {"base": str(tmp_path / "tiny"), "steps": 4}
    job = store.create(
        settings, rows={"train": ROWS}, publish_as="tickets", error="out of memory\nA next step."
    )
    job.run_folder.mkdir(parents=True)
    steps = [{"kind": "step", "step": n, "loss": 2.0 / n, "seconds": 1.0} for n in (1, 2)]
    job.records_file.write_text("".join(json.dumps(r) + "\n" for r in (START, *steps)))
    monkeypatch.setenv("COLUMNS", "80")
    return job


def runs(job, *words):
    return main(["runs", *words, "--jobs", str(job.folder.parent.parent)])


def test_jobs_are_listed_shown_and_deleted(job, capsys):
    assert runs(job, "list") == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["JOB", "STATE", "STEP", "LOSS", "BASE", "NAME", "AGE"]
    assert line.split() == [job.id, "failed", "2/4", "1.00", "tiny", "tickets", "0", "min"]
    assert len(line) <= 80
    assert runs(job) == runs(job, "--json") == 0, "the action may be left out"
    assert json.loads(capsys.readouterr().out.removeprefix(f"{head}\n{line}\n"))[0]["id"] == job.id
    assert main(["runs", "--json", "--jobs", str(job.folder.parent.parent), "show", job.id]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == job.id, "flags may stand before the action"
    assert runs(job, "show", job.id[-5:]) == 0
    screen = capsys.readouterr().out
    assert "failed · step 2 of 4" in screen and "out of memory" in screen
    assert runs(job, "show", job.id, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["events"][-1]["level"]) == ("failed", 2, "error")
    assert runs(job, "rm", job.id) == 0 and not job.folder.exists() and not job.run_folder.exists()
    assert runs(job, "show", job.id) == 2


def test_resume_keeps_the_disk_space_that_the_server_allowed(job, capsys):
    write_record(job.folder, read_record(job.folder), disk_bytes=7)
    assert runs(job, "resume", job.id) == 4
    assert "the limit is 7" in capsys.readouterr().err


def test_what_a_state_does_not_allow_is_refused(job, capsys):
    assert runs(job, "stop", job.id) == 2
    assert "is failed and cannot be paused" in capsys.readouterr().err
    job.records_file.unlink()
    assert runs(job, "follow", job.id) == 4
    assert "out of memory" in capsys.readouterr().err


def test_a_job_that_has_ended_is_followed_to_its_end(job, capsys):
    write_record(job.folder, read_record(job.folder), state="cancelled", error=None)
    add_event(job.folder, "\x1b[31mnot a colour")
    assert runs(job, "show", job.id) == 0
    assert "\x1b" not in capsys.readouterr().out
    record = {"kind": "step", "step": 3, "loss": 0.5, "seconds": 1.0, "tokens": 8}
    with job.records_file.open("w") as file:
        start = {**START, "trained_tokens": 8}
        file.write(json.dumps(start) + "\n" + json.dumps({**record, "memory_bytes": 0}) + "\n")
    assert runs(job, "list", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["state"], listed["loss"]) == ("cancelled", 0.5)
