"""Successive halving inside the joint loop: who stops, and that nobody else notices."""

import json
import os
import signal

import pytest

from tests.support.joint import assert_same_run, config, losses, make_world, together
from veneer.errors import ConfigError, RunInterrupted
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config
from veneer.training.supervisor import SuccessiveHalving, halving_shares, rung_steps
from veneer.training.trainee import Trainee

RATES = {"slow": 1e-5, "slower": 1e-6, "good": 1e-2, "fair": 1e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def halved(world, folder, **settings):
    jobs = [
        config(world, folder / name, learning_rate=rate, steps=8, **settings)
        for name, rate in RATES.items()
    ]
    return together(jobs, supervisor=SuccessiveHalving(halving_shares(len(jobs))))


@pytest.mark.parametrize(
    ("jobs", "shares"),
    [(1, []), (2, [0.5]), (3, [0.5]), (4, [0.25, 0.5]), (12, [1 / 8, 1 / 4, 1 / 2])],
)
def test_rungs_are_halves_of_halves(jobs, shares):
    assert halving_shares(jobs) == shares


def test_the_first_rung_is_not_within_the_warm_up():
    assert halving_shares(200)[0] == 1 / 16
    assert rung_steps(3, halving_shares(200)) == [1, 1, 1, 2]


def test_the_worse_half_stops_at_each_rung_and_says_why(world, tmp_path):
    results = dict(zip(RATES, halved(world, tmp_path), strict=True))
    assert {name: result["steps"] for name, result in results.items()} == {
        "slow": 2,
        "slower": 2,
        "fair": 4,
        "good": 8,
    }
    for name, result in results.items():
        reason = "done" if name == "good" else "halving"
        end = read_records(tmp_path / name / "metrics.jsonl")[-1]
        stored = json.loads((tmp_path / name / "summary.json").read_text())
        assert result["reason"] == end["reason"] == stored["reason"] == reason
        assert (tmp_path / name / "adapter").is_dir()


def test_a_stopped_job_holds_what_it_would_have_alone_and_the_others_do_not_notice(world, tmp_path):
    halved(world, tmp_path / "joint")
    run_training(
        config(world, tmp_path / "alone", learning_rate=RATES["good"], steps=8),
        resume=False,
        screen=QuietScreen(),
    )
    assert_same_run(tmp_path / "joint" / "good", tmp_path / "alone")
    alone = losses(tmp_path / "alone")
    stopped = losses(tmp_path / "joint" / "fair")
    assert [record[:2] for record in stopped] == [r[:2] for r in alone if r[1] <= 4]


def test_jobs_wait_at_a_rung_for_jobs_of_more_steps(world, tmp_path):
    jobs = [
        config(world, tmp_path / "many", batch=1, steps=16, learning_rate=1e-6),
        config(world, tmp_path / "few", batch=4, steps=4, learning_rate=3e-2),
    ]
    many, few = together(jobs, supervisor=SuccessiveHalving([0.5]))
    assert (many["steps"], many["reason"]) == (8, "halving")
    assert (few["steps"], few["reason"]) == (4, "done")


def test_the_last_rung_may_leave_one_job_alone(world, tmp_path):
    jobs = [config(world, tmp_path / n, learning_rate=r, steps=8) for n, r in RATES.items()]
    results = together(jobs, supervisor=SuccessiveHalving([0.25], leaves_one=True))
    assert sorted(result["steps"] for result in results) == [2, 2, 2, 8]


def test_interrupted_jobs_are_ordinary_runs_that_resume(world, tmp_path, monkeypatch):
    own = Trainee.begin_step

    def begin_step(self):
        if self.progress.step == 3 and self.inputs.out.name == "good":
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    with monkeypatch.context() as patch, pytest.raises(RunInterrupted) as caught:
        patch.setattr(Trainee, "begin_step", begin_step)
        halved(world, tmp_path)
    assert "good" in caught.value.next_step and "slow" not in caught.value.next_step
    summary = run_training(resume_config(tmp_path / "good"), resume=True, screen=QuietScreen())
    assert (summary["steps"], summary["reason"]) == (8, "done")


def test_jobs_whose_held_out_losses_do_not_compare_are_refused_before_they_start(world, tmp_path):
    data = {"train": str(world / "rows.jsonl")}
    with pytest.raises(ConfigError, match="no rows are held out"):
        halved(world, tmp_path / "none", data={**data, "validation_share": 0.0})
    jobs = [config(world, tmp_path / rows, rows=rows) for rows in ("rows", "others")]
    with pytest.raises(ConfigError, match="held-out rows differ"):
        together(jobs, supervisor=SuccessiveHalving([0.5]))
    jobs = [
        config(world, tmp_path / f"share-{share}", data={**data, "validation_share": share})
        for share in (0.2, 0.4)
    ]
    with pytest.raises(ConfigError, match="held-out rows differ"):
        together(jobs, supervisor=SuccessiveHalving([0.5]))
    jobs = [
        config(
            world, tmp_path / str(t), objective={"name": "distil", "system": "s", "temperature": t}
        )
        for t in (1.0, 2.0)
    ]
    with pytest.raises(ConfigError, match="objectives differ"):
        together(jobs, supervisor=SuccessiveHalving([0.5]))
    assert not list(tmp_path.rglob("run.yaml"))


READ = {
    "train_on": [{"data": {"train_on": part}} for part in ("assistant", "all")],
    "length": [{"length": length} for length in (48, 256)],
    "new_tokens": [{"new_tokens": tokens} for tokens in ([], ["rows"])],
    "uncut": [{"length": length} for length in (200, 256)],
}
"""Settings of two jobs over the same rows. With those of `uncut` they are the same tokens, too."""


@pytest.mark.parametrize("read", READ)
def test_jobs_are_halved_only_if_the_tokens_of_their_held_out_rows_are_the_same(
    read, world, tmp_path
):
    data = {"train": str(world / "rows.jsonl"), "validation_share": 0.5, "long_rows": "cut"}
    jobs = [
        config(
            world,
            tmp_path / str(number),
            **{**settings, "data": data | settings.get("data", {}), "steps": 2},
        )
        for number, settings in enumerate(READ[read])
    ]
    if read == "uncut":
        together(jobs, supervisor=SuccessiveHalving([0.5]))
    else:
        with pytest.raises(ConfigError, match="tokens of their held-out rows differ"):
            together(jobs, supervisor=SuccessiveHalving([0.5]))
        assert not list(tmp_path.rglob("run.yaml"))
