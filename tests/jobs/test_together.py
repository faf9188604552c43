"""Queued jobs that train together in one process: each keeps its state, results and checkpoints."""

import os
import signal
from dataclasses import replace

import pytest

from tests.jobs.test_store import newest_process, wait_for, wait_until
from tests.support.joint import JOBS, alone, assert_same_run, make_world
from tests.support.processes import is_suspended
from tests.support.running_job import running_job
from veneer.jobs.group import share_first
from veneer.jobs.record import DIED
from veneer.jobs.store import JobStore
from veneer.jobs.suspension import trainer_suspended
from veneer.jobs.worker import TRIED_ALONE
from veneer.training.state.checkpoint import numbers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "jobs", library=tmp_path / "library", train_share=1)


def settings(world, *, base="base", rows="rows", **changed):
    """Returns the settings of tests.support.joint.config, without files."""
    return {
        "base": str(world / base),
        "data": {"validation_share": 0.2},
        "method": {"name": "lora", "rank": 2},
        "steps": 6,
        "batch": 3,
        "evaluate_every": 2,
        "learning_rate": 0.01,
        "show_answers": False,
        **changed,
    }


def trainer_of(job):
    return newest_process(f"veneer.jobs.trainer .*{job.id}")


def test_queued_jobs_of_one_base_train_as_one_process_and_learn_what_they_learn_alone(
    store, world, tmp_path
):
    names, rows = ("lora", "targets"), {"train": world / "rows.jsonl"}
    with running_job(store):
        jobs = {
            name: store.create(
                settings(world, **JOBS[name]),
                rows={"train": world / f"{JOBS[name].get('rows', 'rows')}.jsonl"},
                publish_as=name,
                owner=f"owner of {name}",
            )
            for name in names
        }
        bad = store.create(settings(world), rows={"train": [{"x": "no layout"}]})
        other_base = store.create(settings(world, base="bf16"), rows=rows)
        every_weight = store.create(settings(world, method="full"), rows=rows)
    (tmp_path / "link").symlink_to(store.folder)  # the next server finds the jobs by another path
    linked = JobStore(tmp_path / "link", library=tmp_path / "library", train_share=1)
    assert linked.start_next().id == jobs["lora"].id
    running = [*jobs.values(), bad]
    assert [store.num_together(store.get(job.id)) for job in (*running, other_base)] == [2, 2, 2, 0]
    for waiting in (other_base, every_weight):
        assert store.cancel(waiting.id).state == "cancelled"
    wait_until(lambda: trainer_of(bad) is not None)
    assert len({trainer_of(job) for job in running}) == 1
    assert "train.jsonl cannot be trained on" in wait_for(store, bad.id, "failed").error
    for name, job in jobs.items():
        job = wait_for(store, job.id, "done")
        messages = [event["message"] for event in store.events(job.id)]
        assert "Fine-tuning job started, together with 2 others" in messages
        assert not any("cannot be trained on" in message for message in messages)
        assert job.record.adapter == f"{name}@1"
        alone(world, tmp_path / name, **JOBS[name])
        assert_same_run(job.run_folder, tmp_path / name)
    assert (jobs["lora"].folder / "trainer.log").read_text() == ""


def test_a_job_that_leaves_dtype_open_does_not_train_in_the_type_of_another(store, world):
    rows = {"train": world / "rows.jsonl"}
    with running_job(store):
        begun, queued = (
            store.create(settings(world, dtype=dtype), rows=rows) for dtype in ("bfloat16", "auto")
        )
        begun.run_folder.mkdir(parents=True)
        (begun.run_folder / "run.yaml").write_bytes(begun.run_file.read_bytes())
        assert share_first([begun, queued]) == [begun]
        assert share_first([queued, begun]) == [queued]
        for job in (begun, queued):
            store.cancel(job.id)


def changed(job, **record):
    return replace(job, record=job.record.model_copy(update=record))


def test_one_job_leaves_and_after_a_crash_each_of_the_others_is_tried_alone(
    store, world, monkeypatch
):
    monkeypatch.setattr("veneer.jobs.store.share_of_machine", lambda share: (1, 0))  # not slower
    store.train_share = 0.5
    endless = settings(world, steps=100_000, save_every=1, evaluate_every=100_000)
    rows = {"train": world / "rows.jsonl"}
    with running_job(store):
        first, second, third = (store.create(endless, rows=rows) for _ in range(3))

    def step(job):
        return store.get(job.id).facts().get("step", 0)

    def steps_on(*jobs):
        before = {job.id: step(job) for job in jobs}
        wait_until(lambda: all(step(job) > before[job.id] for job in jobs))

    store.start_next()
    steps_on(first, second, third)
    assert store.cancel(second.id).state == "stopping"
    second = wait_for(store, second.id, "cancelled")
    assert max(numbers(second.run_folder / "checkpoints")) == step(second)
    steps_on(first, third)
    assert store.num_together(store.get(first.id)) == 1
    store.delete(second.id)
    os.kill(trainer_of(first), signal.SIGKILL)
    wait_until(lambda: TRIED_ALONE in store.events(third.id)[-1]["message"])
    wait_until(lambda: store.get(first.id).state == "running" and trainer_of(first) is not None)
    assert store.get(third.id).state == "queued" and store.num_together(store.get(first.id)) == 0
    assert store.pause(third.id).state == "paused"
    steps_on(first)
    with trainer_suspended(store.folder):
        wait_until(lambda: is_suspended(trainer_of(first)))
        os.kill(newest_process(f"veneer.jobs.worker .*{first.id}"), signal.SIGKILL)
        first = wait_for(store, first.id, "failed")  # the trainer saved a checkpoint and ended too
    assert first.error == DIED and first.record.state == "running"
    assert store.start_next() is None
    assert store.get(first.id).record.state == "failed"
    with running_job(store):
        new, first, third = (
            store.create(settings(world), rows=rows),
            store.resume(first.id),
            store.resume(third.id),
        )
        assert share_first([new, first, third]) == [new], "the others are tried alone"
        assert share_first([first, new]) == [first]
        failed = changed(third, alone=False, has_failed=True)
        assert share_first([new, failed]) == [new, failed], "a new job and a resumed one"
        strange = changed(new, owner="somebody else")
        assert share_first([new, failed, strange]) == [new, failed], "it may fail again"
        assert share_first([strange, failed]) == [strange]
        for job in (new, first, third):
            store.cancel(job.id)
