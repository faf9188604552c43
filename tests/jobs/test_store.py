"""Jobs in a folder: the queue, limits, and trainers that are killed, on a tiny model."""

import gzip
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO

import pytest

from tests.support.processes import is_suspended
from tests.support.running_job import running_job
from tests.support.tiny import save_tiny
from veneer.errors import ConfigError, QuotaError, UnknownNameError
from veneer.jobs.launch import AUTOGROUP, lower_priority
from veneer.jobs.limits import JobLimits
from veneer.jobs.outcome import Outcome
from veneer.jobs.queue import WAITS_FOR_DISK, jobs_in_turn, start_together
from veneer.jobs.record import JobRecord, TrainingJob
from veneer.jobs.store import JobStore
from veneer.jobs.suspension import trainer_suspended
from veneer.jobs.uploads import UploadStore
from veneer.jobs.worker import RESUME, WorkerJob, trainer_outcome
from veneer.training.state.checkpoint import numbers

ROWS = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yes"}]}
    for n in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny(folder, "llama_untied")
    return str(folder)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.jobs.store.share_of_machine", lambda share: (1, 0))  # not slower
    return JobStore(tmp_path / "jobs", library=tmp_path / "library", train_share=0.5)


@pytest.fixture
def busy_store(store):
    with running_job(store):
        yield store


def wait_for(store, job_id, *states, seconds=240):
    deadline = time.monotonic() + seconds
    while (job := store.get(job_id)).state not in states:
        log = job.folder / "trainer.log"
        assert time.monotonic() < deadline, log.read_text() if log.exists() else job
        time.sleep(0.05)
    return job


def wait_until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def newest_process(pattern):
    output = subprocess.run(["pgrep", "-n", "-f", pattern], capture_output=True, text=True).stdout
    return int(output) if output else None


def test_a_killed_trainer_and_used_up_disk_space_are_failures_that_resume(store, base):
    settings = {"base": base, "steps": 100_000, "save_every": 1, "data": {"validation_share": 0}}
    store.limits = JobLimits(disk_bytes=100_000)
    job = store.create(settings, rows={"train": ROWS}, publish_as="tickets")
    assert job.state == "running"
    trainer = f"veneer.jobs.trainer .*{job.id}"
    wait_until(lambda: newest_process(trainer) is not None)
    os.kill(newest_process(trainer), signal.SIGKILL)  # while it loads
    job = wait_for(store, job.id, "failed")
    assert "was killed, probably" in job.error and RESUME in job.error
    assert store.resume(job.id).state == "running"
    waiting = store.create(settings, rows={"train": ROWS})
    job = wait_for(store, job.id, "failed")
    assert "the limit is 100,000" in job.error and "Delete jobs or files" in job.error
    assert numbers(job.run_folder / "checkpoints")
    with pytest.raises(QuotaError, match="the limit is 100,000"):
        store.resume(job.id)
    wait_until(lambda: not store._is_locked(job.folder))  # the worker has looked at the queue
    assert store.start_next() is None and store.get(waiting.id).state == "queued"
    messages = [event["message"] for event in store.events(waiting.id)]
    assert messages.count(WAITS_FOR_DISK) == 1 and messages[-1] == WAITS_FOR_DISK
    store.cancel(waiting.id)
    store.limits = JobLimits()
    assert store.resume(job.id).record.disk_bytes == store.limits.disk_bytes
    step = job.facts()["step"]
    wait_until(lambda: store.get(job.id).facts()["step"] > step)
    pid = newest_process(trainer)
    with trainer_suspended(store.folder):
        wait_until(lambda: is_suspended(pid))
        store.cancel(job.id)
        job = wait_for(store, job.id, "cancelled")
    assert max(numbers(job.run_folder / "checkpoints")) == job.facts()["step"]
    assert [event["level"] for event in store.events(job.id)].count("error") == 2
    store.delete(job.id)
    assert [other.id for other in store.jobs()] == [waiting.id] and not job.run_folder.exists()


def test_the_end_of_a_trainer_is_told_in_a_sentence_that_names_the_log(busy_store, base):
    job = busy_store.create({"base": base}, rows={"train": ROWS})
    first = WorkerJob(busy_store, job.id, 0, is_shared=True)
    place = f"The log is jobs/{job.id}/trainer.log in the folder of jobs."
    for code, words in {
        1: f"An error in Veneer ended the trainer (exit code 1). {place}",
        -signal.SIGSEGV: f"The trainer crashed with signal SIGSEGV. {place}",
        -signal.SIGRTMIN - 1: f"The trainer crashed with signal {signal.SIGRTMIN + 1}. {place}",
    }.items():
        assert trainer_outcome(code, first) == Outcome(kind="crashed", error=words)
    assert trainer_outcome(-signal.SIGTERM, first) == Outcome(kind="interrupted")
    busy_store.cancel(job.id)


def test_jobs_wait_while_one_runs_and_change_their_state(busy_store, base):
    store, settings = busy_store, {"base": base, "steps": 2}
    job = store.create(settings, rows={"train": ROWS}, details={"seen_by": "page"})
    assert job.state == "queued" and job.facts() == {} and job.record.details["seen_by"] == "page"
    assert store.pause(job.id).state == "paused"
    assert store.resume(job.id).state == "queued"
    assert store.cancel(job.id).state == "cancelled"
    with pytest.raises(ConfigError, match="is cancelled and cannot be resumed"):
        store.resume(job.id)
    (running,) = [other for other in store.jobs() if other.state == "running"]
    with pytest.raises(ConfigError, match="is running and cannot be resumed"):
        store.resume(running.id)
    with pytest.raises(ConfigError, match="Pause or cancel it first"):
        store.delete(running.id)
    assert store.pause(running.id).state == "stopping"
    assert store.find(job.id[-6:]).id == store.find(job.id[:12]).id == job.id
    with pytest.raises(UnknownNameError):
        store.find("job")
    store.delete(job.id)
    assert [other.id for other in store.jobs()] == [running.id]
    assert not start_together(store.folder, [job]), (
        "it was removed while another process read the queue"
    )
    assert not job.folder.exists()


def test_a_compressed_file_is_bounded_by_what_it_holds(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    uploads = UploadStore(tmp_path, JobLimits(file_bytes=10_000))
    packed = gzip.compress(b"\n" * 20_000)
    with pytest.raises(QuotaError, match=r"more than 10,000 bytes when it is unpacked"):
        uploads.add(BytesIO(packed), name="rows.jsonl.gz")
    assert uploads.files() == [] and list(uploads.folder.iterdir()) == []
    table = BytesIO()
    parquet.write_table(
        pyarrow.table({"prompt": ["x" * 1000] * 20, "completion": ["y"] * 20}), table
    )
    with pytest.raises(QuotaError, match=r"more than 10,000 bytes when it is unpacked"):
        uploads.add(BytesIO(table.getvalue()), name="rows.parquet")
    assert uploads.add(BytesIO(packed[:20]), name="rows.jsonl.gz").bytes == 20  # a job says more
    assert uploads.add(BytesIO(gzip.compress(b"{}")), name="rows.jsonl.gz").bytes > 0


def test_rows_that_jobs_share_with_an_uploaded_file_count_once(busy_store, base):
    content = b'{"prompt": "a", "completion": "b"}\n' * 5000
    file = UploadStore(busy_store.folder, busy_store.limits).add(BytesIO(content), name="r.jsonl")
    path = UploadStore(busy_store.folder, busy_store.limits).content_path(file.id)
    used = busy_store.used_bytes()
    for _ in range(2):
        busy_store.create({"base": base, "steps": 2}, rows={"train": path})
    assert busy_store.used_bytes() - used < len(content)


def test_limits_ids_and_settings_are_checked_before_anything_is_written(busy_store, base):
    store = busy_store
    rows, settings = {"train": ROWS}, {"base": base, "steps": 2}
    for wrong, message in (
        ({**settings, "stepz": 2}, "stepz"),
        ({**settings, "out": "/tmp/x"}, "which the store chooses"),
        ({**settings, "data": {"train": "/etc/passwd"}}, "which the store chooses"),
    ):
        with pytest.raises(ConfigError, match=message):
            store.create(wrong, rows=rows)
    with pytest.raises(ConfigError, match="not a valid name"):
        store.create(settings, rows=rows, publish_as="../x")
    with pytest.raises(ConfigError, match="a library holds adapters"):
        store.create({**settings, "method": "full"}, rows=rows, publish_as="x")
    for job_id in ("..", "ftjob-../../../etc", "ftjob-000000000000"):
        with pytest.raises(UnknownNameError):
            store.get(job_id)
    for limits, message in (
        (JobLimits(jobs=1), "1 jobs are kept"),
        (JobLimits(waiting=0), "wait in the queue"),
        (JobLimits(disk_bytes=10), "bytes, the limit is 10"),
    ):
        store.limits = limits
        with pytest.raises(QuotaError, match=message):
            store.create(settings, rows=rows)
    assert len(store.jobs()) == 1


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="the system does not group by session")
def test_a_trainer_has_a_lower_priority_than_other_sessions_too():
    program = f"import os; print(os.nice(0)); print(open({str(AUTOGROUP)!r}).read())"
    output = subprocess.run(
        [sys.executable, "-c", program],
        start_new_session=True,
        preexec_fn=lambda: lower_priority(3),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    own, session = output.splitlines()[:2]
    assert int(own) == os.nice(0) + 3 and session.endswith(" nice 3")


def test_owners_take_turns(tmp_path):
    def job(owner, queued, state="queued", started=None):
        record = JobRecord(
            id=f"{owner}{queued}",
            created=0,
            queued=queued,
            started=started,
            owner=owner,
            threads=1,
            niceness=0,
            library="",
        )
        return TrainingJob(record, state, None, tmp_path, tmp_path)

    jobs = [job("ann", 0, "done", started=5.0), job("ann", 1), job("ann", 2), job("bob", 3)]
    assert [job.id for job in jobs_in_turn(jobs)] == ["bob3", "ann1", "ann2"]
    jobs[3] = replace(jobs[3], record=jobs[3].record.model_copy(update={"started": 9.0}))
    assert [job.id for job in jobs_in_turn(jobs)] == ["ann1", "bob3", "ann2"]
    assert jobs_in_turn(jobs[:1]) == []
