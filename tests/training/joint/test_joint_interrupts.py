"""Ctrl-C while a job ends: it gets its result, and the others have a checkpoint."""

import os
import signal

import pytest

from tests.support.joint import JOBS, alone, assert_same_run, config, make_world, together
from veneer.errors import RunInterrupted
from veneer.training.job import Job, JobRun
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_jobs
from veneer.training.state.folder import resume_config
from veneer.training.state.interrupt import Interrupt
from veneer.training.supervisor import SuccessiveHalving
from veneer.training.trainee import Trainee

LEAVING = [(Trainee, "take_best"), (JobRun, "write"), (JobRun, "end")]
"""What is called while a job ends, in this order."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def interrupting(function, number=signal.SIGINT):
    """Sends the signal within the first call of the function."""
    sent = []

    def interrupted(*arguments):
        if not sent:
            sent.append(os.kill(os.getpid(), number))
        return function(*arguments)

    return interrupted


@pytest.mark.parametrize(("owner", "name"), LEAVING)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_job_ends_saves_the_others(
    number, owner, name, world, tmp_path, monkeypatch
):
    """Before their first evaluation: they have no checkpoint until then."""
    jobs = {"short": {"steps": 2}, "lora": {**JOBS["lora"], "evaluate_every": 6}}
    with monkeypatch.context() as patch, pytest.raises(RunInterrupted) as caught:
        patch.setattr(owner, name, interrupting(getattr(owner, name), number))
        together([config(world, tmp_path / job, **jobs[job]) for job in jobs])
    assert (tmp_path / "short" / "summary.json").is_file()
    assert caught.value.next_step == f"Continue with: veneer train --resume {tmp_path / 'lora'}"
    run_jobs([Job(resume_config(tmp_path / "lora"), True, QuietScreen())])
    alone(world, tmp_path / "alone", **jobs["lora"])
    assert_same_run(tmp_path / "lora", tmp_path / "alone")


def test_an_interrupt_while_a_job_is_reported_saves_the_others(world, tmp_path):
    report = interrupting(lambda job, result: None)
    jobs = {"short": {"steps": 2}, "lora": JOBS["lora"]}
    with pytest.raises(RunInterrupted, match="stopped at step"):
        together(
            [config(world, tmp_path / job, **jobs[job]) for job in jobs],
            finished=lambda job, result: report(job, result),
        )
    assert (tmp_path / "short" / "summary.json").is_file()
    assert list((tmp_path / "lora" / "checkpoints").iterdir())


def test_jobs_that_halving_stopped_end_although_an_interrupt_came(world, tmp_path, monkeypatch):
    rates = {"slow": 1e-6, "fair": 1e-3, "good": 1e-2, "fast": 3e-2}
    jobs = [config(world, tmp_path / n, learning_rate=r, steps=8) for n, r in rates.items()]
    own = Trainee.stop

    def stop(self, reason, message):
        os.kill(os.getpid(), signal.SIGTERM)  # of two signals the second asks again
        own(self, reason, message)

    with monkeypatch.context() as patch, pytest.raises(RunInterrupted) as caught:
        patch.setattr(Trainee, "stop", stop)
        together(jobs, supervisor=SuccessiveHalving([0.25, 0.5]))
    ended = [name for name in rates if (tmp_path / name / "summary.json").is_file()]
    assert len(ended) == 2 and "slow" in ended
    for name in rates:
        assert (str(tmp_path / name) in caught.value.next_step) == (name not in ended)


def test_an_interrupt_of_an_inner_block_reaches_the_outer_one():
    with Interrupt() as outer:
        with Interrupt() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.asked and outer.asked
