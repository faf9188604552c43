"""Trainers that are suspended while requests wait, with real processes in place of trainers."""

import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.processes import is_suspended
from veneer.jobs.suspension import PIPE, Suspension, SuspensionBudget, trainer_suspended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux suspends trainers")
WAITING = """
import sys, time
from pathlib import Path
from veneer.jobs.suspension import trainer_suspended
with trainer_suspended(Path(sys.argv[1])):
    time.sleep(60)
"""
"""A server whose request waits."""


@contextmanager
def suspension_of_a_trainer(folder, share=0.1):
    """Yields a suspension, and a function that returns whether the trainer and its child are
    suspended."""
    child = "import os, signal, sys; sys.stdout.write(f'{os.getpid()} '); sys.stdout.flush();"
    program = f"import os; os.fork(); {child} signal.pause()"
    trainer = subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, process_group=0
    )
    text = b""
    while text.count(b" ") < 2:
        text += trainer.stdout.read1()
    pids = [int(pid) for pid in text.split()]

    def suspended():
        time.sleep(0.02)  # each process acts on the signal by itself
        deadline = time.monotonic() + 10
        while len(states := {is_suspended(pid) for pid in pids}) > 1:
            assert time.monotonic() < deadline, "one process of the group was left out"
        return states.pop()

    try:
        with Suspension(trainer.pid, folder, share) as suspension:
            yield suspension, suspended
        assert not suspended()
    finally:
        subprocess.run(["kill", "-KILL", "--", f"-{trainer.pid}"], check=True)
        trainer.wait()
        trainer.stdout.close()


def test_a_trainer_is_suspended_while_any_request_waits_and_until_it_must_end(tmp_path):
    with suspension_of_a_trainer(tmp_path) as (suspension, suspended), ExitStack() as second:
        suspension.wait(0.01)
        assert not suspended()
        with trainer_suspended(tmp_path):
            suspension.wait(10)
            assert suspended()
            second.enter_context(trainer_suspended(tmp_path))
            suspension.wait(10)
        suspension.wait(0.01)
        assert suspended(), "the second request waits"
        second.close()
        suspension.wait(10)
        assert not suspended()
        start = time.monotonic()
        suspension.wait(0.05)
        assert time.monotonic() - start >= 0.05, "it waits again"
        with trainer_suspended(tmp_path):
            suspension.wait(10)
            assert suspended()
            suspension.release()
            assert not suspended(), "the worker does something else"
            suspension.wait(0.01)
            assert suspended()
            suspension.end()
            assert not suspended()
            suspension.wait(0.01)
            assert not suspended()
    assert not (tmp_path / PIPE).exists()


def test_a_trainer_goes_on_when_its_pipe_is_deleted(tmp_path):
    with suspension_of_a_trainer(tmp_path) as (suspension, suspended):
        with trainer_suspended(tmp_path):
            suspension.wait(10)
            assert suspended()
            (tmp_path / PIPE).unlink()
        suspension.wait(10)
        assert not suspended()
        suspension.wait(0.01)


def test_a_trainer_continues_when_the_server_is_killed(tmp_path):
    with suspension_of_a_trainer(tmp_path, share=0.01) as (suspension, suspended):
        server = subprocess.Popen([sys.executable, "-c", WAITING, tmp_path])
        suspension.wait(30)
        assert suspended()
        server.kill()
        server.wait()
        suspension.wait(30)
        assert not suspended() and suspension._budget.seconds > 0


def test_a_trainer_runs_its_share_of_the_time_although_requests_wait(tmp_path):
    with (
        suspension_of_a_trainer(tmp_path, share=0.95) as (suspension, suspended),
        trainer_suspended(tmp_path),
    ):
        start = time.monotonic()
        suspension.wait(30)
        suspension.wait(30)
        assert not suspended() and 0.2 <= time.monotonic() - start < 30
        for _ in range(10):
            suspension.wait(0.01)
            assert suspension._budget.seconds <= (time.monotonic() - start) * 0.05 / 0.95


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_budget_gives_training_its_share_in_periods_that_are_not_short(share):
    budget, suspended, changes, suspended_seconds = SuspensionBudget(share), False, 0, 0.0
    for _ in range(100_000):
        allowed = budget.allows(suspended=suspended)
        changes += allowed != suspended
        suspended = allowed
        budget.count(0.01, suspended=suspended)
        suspended_seconds += 0.01 * suspended
    assert suspended_seconds / 1000 == pytest.approx(1 - share, abs=0.01)
    assert suspended_seconds / changes > 0.04


def test_a_share_of_1_and_a_store_without_a_trainer_suspend_nothing(tmp_path):
    with (
        suspension_of_a_trainer(tmp_path, share=1) as (suspension, suspended),
        trainer_suspended(tmp_path),
    ):
        suspension.wait(0.01)
        assert not suspended() and list(tmp_path.iterdir()) == []
