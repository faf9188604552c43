"""Jobs that wait until others have ended: each is the run that it would be alone, and a fault of
one that joins ends no other. Independent jobs: none waits, and each may leave and be resumed."""

import os
import signal
import weakref

import pytest

from tests.support.joint import JOBS, alone, assert_same_run, config, make_world, together
from veneer.errors import BudgetFullError, ConfigError, RunInterrupted
from veneer.plan.probe import forecast
from veneer.training import loop, run
from veneer.training.output.screen import QuietScreen
from veneer.training.run import Job, run_jobs
from veneer.training.state.folder import resume_config
from veneer.training.supervisor import Supervisor
from veneer.training.trainee import Trainee

NAMES = ("bottleneck", "targets", "dora", "batch", "dropout")  # of 3, 6, 6, 4 and 6 steps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def room_for_two(monkeypatch):
    monkeypatch.setattr(run, "has_room", lambda jobs, free: len(jobs) < 2)


class Crash(BaseException):
    """Ends the process of a run without a word."""


def test_waiting_jobs_take_freed_room_and_learn_what_they_learn_alone(
    room_for_two, world, tmp_path, monkeypatch
):
    forward_backward, begin = loop.forward_backward, Trainee.begin_step
    together_in_a_forward, alive = set(), weakref.WeakSet()

    def counted(micro_batches):
        names = [part.gradient.inputs.out.name for part in micro_batches]
        together_in_a_forward.add(frozenset(names))
        forward_backward(micro_batches)

    def begin_step(self):
        alive.add(self)
        assert len(alive) <= 2  # what a job held is free before another begins
        begin(self)

    finished = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", counted)
        patch.setattr(Trainee, "begin_step", begin_step)
        results = together(
            [config(world, tmp_path / "joint" / name, **JOBS[name]) for name in NAMES],
            plan=forecast,
            finished=lambda job, result: finished.append(job.config.out.rpartition("/")[2]),
        )
    assert max(map(len, together_in_a_forward)) == 2
    assert {"targets", "dora"} in together_in_a_forward  # it joined while the other was training
    assert finished[0] == "bottleneck" and sorted(finished) == sorted(NAMES)
    for name, result in zip(NAMES, results, strict=True):
        summary = alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(tmp_path / "joint" / name, tmp_path / "alone" / name)
        assert result["trained_tokens"] == summary["trained_tokens"]


def test_a_waiting_job_that_cannot_begin_ends_alone(room_for_two, world, tmp_path):
    bad = {"method": {"name": "lora", "targets": ["nothing"]}}
    jobs = {"a": {"steps": 2}, "b": {"steps": 4}, "bad": bad, "c": {"steps": 2, "seed": 5}}
    finished = []
    a, b, failed, c = together(
        [config(world, tmp_path / name, **job) for name, job in jobs.items()],
        plan=forecast,
        finished=lambda job, result: finished.append((job.config.out, result)),
    )
    assert isinstance(failed, ConfigError) and "'nothing'" in str(failed)
    assert (str(tmp_path / "bad"), failed) in finished and len(finished) == 4
    assert [result["reason"] for result in (a, b, c)] == ["done"] * 3
    assert not (tmp_path / "bad").exists()
    alone(world, tmp_path / "alone", **jobs["c"])
    assert_same_run(tmp_path / "c", tmp_path / "alone")


@pytest.mark.parametrize("end", ["interrupt", "crash"])
def test_jobs_that_joined_and_jobs_that_waited_are_resumed(
    end, room_for_two, world, tmp_path, monkeypatch
):
    """The third job joins; at its third step the process ends, before the fourth has begun.

    That step is the last one of the second job, which has its result after an interrupt.
    """
    names = ("bottleneck", "targets", "dora", "dropout")
    common = {"save_every": 1, "dtype": "float32"}
    configs = [config(world, tmp_path / name, **common, **JOBS[name]) for name in names]
    own = Trainee.begin_step

    def begin_step(self):
        if self.inputs.config.method.name == "dora" and self.progress.step == 2:
            if end == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    with monkeypatch.context() as patch, pytest.raises(Crash if end == "crash" else RunInterrupted):
        patch.setattr(Trainee, "begin_step", begin_step)
        together(configs, plan=forecast)
    assert (tmp_path / "bottleneck" / "summary.json").exists()
    assert not (tmp_path / "dropout" / "run.yaml").exists()
    left = ["targets", "dora"] if end == "crash" else ["dora"]
    begun = [Job(resume_config(tmp_path / name), True, QuietScreen()) for name in left]
    run_jobs([*begun, Job(configs[3], False, QuietScreen())], plan=forecast)
    for name in names:
        alone(world, tmp_path / "alone" / name, **common, **JOBS[name])
        assert_same_run(tmp_path / name, tmp_path / "alone" / name)


class Independent(Supervisor):
    """Lets the job in the folder `dropout` go after its second step."""

    independent = True

    def lets_go(self, trainee):
        return trainee.inputs.out.name == "dropout" and trainee.progress.step == 2


def test_independent_jobs_fail_leave_and_find_no_room_by_themselves(room_for_two, world, tmp_path):
    bad = {"method": {"name": "lora", "targets": ["nothing"]}}
    jobs = {"bad": bad, "targets": JOBS["targets"], "dropout": JOBS["dropout"], "late": {}}
    finished = []
    failed, _, left, late = together(
        [config(world, tmp_path / name, **job) for name, job in jobs.items()],
        plan=forecast,
        supervisor=Independent(),
        finished=lambda job, result: finished.append(job.config.out.rpartition("/")[2]),
    )
    assert isinstance(failed, ConfigError) and "'nothing'" in str(failed)
    assert isinstance(late, BudgetFullError) and not (tmp_path / "late").exists()
    assert isinstance(left, RunInterrupted) and "stopped at step 2 of 6" in left.headline
    assert str(tmp_path / "targets") not in str(left)
    assert finished == ["bad", "late", "dropout", "targets"]
    run_jobs([Job(resume_config(tmp_path / "dropout"), True, QuietScreen())])
    for name in ("targets", "dropout"):
        alone(world, tmp_path / "alone" / name, **JOBS[name])
        assert_same_run(tmp_path / name, tmp_path / "alone" / name)
