"""The minutes are divided by measured times, and the verdict says what the figures say."""

from types import SimpleNamespace

import pytest

from veneer.adapters.config import LoRA
from veneer.errors import ConfigError
from veneer.objectives.config import Answers
from veneer.training.state.interrupt import Interrupt
from veneer.training.supervisor import SuccessiveHalving, rung_steps
from veneer.tuning import supervisors
from veneer.tuning.candidates import (
    EVALUATIONS,
    MOST_WARMUP,
    AdvisedSettings,
    Candidate,
    candidates,
    run_config,
)
from veneer.tuning.parts import PartFiles
from veneer.tuning.schedule import MOST_EPOCHS, SPARE, Pace, read_pace, schedule
from veneer.tuning.supervisors import TIME, TimedSearch
from veneer.tuning.verdict import is_better, verdict

ADVISED = AdvisedSettings(Answers(), LoRA(rank=8, alpha=16), 1.3e-3, None, [])
TRIED = candidates(ADVISED)
PACE = Pace({2: 0.12, 8: 0.1}, evaluation=0.5, start=5.0, probe=8.0)


def search_seconds(plan, pace, count):
    """Seconds of training up to each rung, without what a joint forward saves."""
    seconds, running, before = 0.0, list(TRIED), 0.0
    for rung in plan.rungs:
        for candidate in running:
            row = pace.seconds_per_row[candidate.batch]
            seconds += (rung - before) * plan.steps[candidate.batch] * candidate.batch * row
        running, before = running[: len(running) // 2], rung
    return seconds


def test_candidates_are_the_advice_and_its_neighbours():
    assert len(TRIED) == len(set(TRIED)) == len({candidate.name for candidate in TRIED}) == 8
    assert (TRIED[0].learning_rate, TRIED[0].rank, TRIED[0].batch) == (1.3e-3, 8, 8)
    assert {candidate.batch for candidate in TRIED} == {2, 8} and {
        candidate.rank for candidate in TRIED
    } == {8, 32}
    assert {(candidate.learning_rate, candidate.lr_ratio) for candidate in TRIED} == {
        (1.3e-3, 1.0),
        (3.2e-4, 4.0),
        (1.3e-3, 4.0),
    }


def test_the_run_of_a_candidate_has_its_settings_and_those_of_every_search(tmp_path):
    files = PartFiles(*(tmp_path / f"{name}.jsonl" for name in ("train", "search", "judge")))

    def run(steps):
        tried = Candidate(2e-3, 4.0, 32, 2)
        return run_config(tried, ADVISED, base="b", files=files, out=tmp_path, steps=steps, seed=3)

    config = run(60)
    assert config.method == LoRA(rank=32, alpha=64, lr_ratio=4.0)
    assert config.schedule == "linear"
    assert (config.learning_rate, config.batch, config.steps, config.seed) == (2e-3, 2, 60, 3)
    assert (config.evaluate_every, config.patience, config.keep) == (10, 3, 1)
    assert run(5).evaluate_every == 1 and config.warmup == MOST_WARMUP
    assert not config.show_answers and config.base == "b" and config.quantize is None
    assert config.out == str(tmp_path / "rate-0.002_ratio-4_rank-32_batch-2")
    assert "train.jsonl" in repr(config.data.train) and "judge.jsonl" not in repr(config)


@pytest.mark.parametrize("seconds", [120, 600, 3600])
@pytest.mark.parametrize("rows", [60, 1000, 50_000])
def test_search_and_training_fit_into_the_time(seconds, rows):
    plan = schedule(TRIED, rows, PACE, seconds)
    assert search_seconds(plan, PACE, rows) <= seconds / 3
    for batch, steps in plan.steps.items():
        assert PACE.seconds_per_row[batch] * batch * steps <= 2 / 3 * seconds
        assert steps * batch <= MOST_EPOCHS * rows
        assert rung_steps(steps, plan.rungs)[-1] < steps
    assert plan.warmup == min(MOST_WARMUP, plan.rungs[0] / 2)
    longest = max(PACE.seconds_per_row[batch] * batch * n for batch, n in plan.steps.items())
    trials = 3 * (8 * 0.1 + 2 * 0.12)  # of the six candidates that the probe did not have
    before = PACE.probe + PACE.start + trials + plan.search_seconds
    training = longest + EVALUATIONS * PACE.evaluation
    assert training <= (1 - SPARE) * (seconds - before) + 1e-3
    is_filled = training >= (1 - SPARE) * (seconds - before) - PACE.longest_step
    assert is_filled or all(plan.is_whole.values())


def test_a_whole_run_has_a_bounded_number_of_passes():
    plan = schedule(TRIED, 60, PACE, 3600)
    assert plan.steps == {8: 60, 2: 240} and plan.is_whole == {8: True, 2: True}
    assert schedule(TRIED, 50_000, PACE, 600).is_whole == {8: False, 2: False}


def test_the_time_may_allow_all_passes_for_one_batch_size_alone():
    plan = schedule(TRIED, 60, PACE, 115)
    assert plan.steps[8] == 60 and plan.steps[2] < 240
    assert plan.is_whole == {8: True, 2: False}


def test_the_pace_is_that_of_rows_of_mean_length():
    def run(batch, row_tokens):
        steps = [
            {"kind": "step", "seconds": seconds, "tokens": batch * row_tokens}
            for seconds in (9.0, 0.01 * batch * row_tokens, 0.01 * batch * row_tokens)
        ]
        return [*steps, {"kind": "evaluation", "seconds": 2.0}, {"kind": "end"}]

    pace = read_pace([2, 8], [run(2, 30), run(8, 60)], 100.0, 60.0)
    assert pace.seconds_per_row == pytest.approx({2: 1.0, 8: 1.0})
    assert (pace.evaluation, pace.probe) == (2.0, 60.0)
    assert pace.start == pytest.approx(60 - 18 - 2 * 0.6 - 2 * 4.8 - 4)


def test_a_first_rung_that_would_be_too_early_is_left_out():
    plans = [schedule(TRIED, 1000, PACE, seconds) for seconds in (90, 200, 1200)]
    assert [len(plan.rungs) for plan in plans] == [1, 2, 3]
    assert all(rung_steps(plan.steps[8], plan.rungs)[0] >= 5 for plan in plans)


def test_too_little_time_is_refused_with_what_is_needed():
    with pytest.raises(ConfigError) as refusal:
        schedule(TRIED, 300, Pace({2: 2.0, 8: 2.0}, 4.0, 20.0, 30.0), 60)
    minutes = int(str(refusal.value.faults[0]).split()[1])
    schedule(TRIED, 300, Pace({2: 2.0, 8: 2.0}, 4.0, 20.0, 30.0), 60 * minutes + 60)


def result(interval, *, forgetting=(0.1, [0.05, 0.15]), interrupted=False, runner_up=0.02):
    judged = {
        "metrics": ["field_f1"],
        "measures": ["loss", "field_f1"],
        "base": {"rows": 45, "loss": 2.0, "field_f1": 0.1},
        "adapter": {
            "loss": 1.0,
            "field_f1": 0.9,
            "units": {"field_f1": "share"},
            "against": {
                "loss": {"other": 2.0, "difference": -1.0, "interval": interval},
                "field_f1": {"other": 0.1, "difference": 0.8, "interval": [0.7, 0.9]},
            },
            "general": {
                "before": 3.0,
                "loss": 3.0 + forgetting[0],
                "forgetting": forgetting[0],
                "forgetting_interval": forgetting[1],
            },
        },
    }
    return {
        "out": "runs/t",
        "rows": {
            "train": 210,
            "judge": 30,
            "judge_groups": 30,
            "judge_prompts": 30,
            "by_likeness": True,
        },
        "search": {
            "candidates": [{}] * 8,
            "seconds": 62.0,
            "runner_up": runner_up and {"text": "rank 8", "gap": runner_up, "noise": 0.1},
        },
        "chosen": {"text": "learning rate 0.0013, rank 8, batch 2"},
        "run": {"steps": 400, "epochs": 3.8, "reason": "done", "whole": True, "loss": 1.1},
        "interrupted": interrupted,
        "judging": None if interrupted else judged,
        "library": None,
    }


@pytest.mark.parametrize(
    ("interval", "better", "words"),
    [
        ([-1.2, -0.8], True, "Sure that it is better"),
        ([-0.3, 0.1], None, "Not sure: the interval holds zero"),
        ([0.1, 0.4], False, "Sure that it is worse"),
        (None, None, "Not sure: these rows are too few or too alike"),
    ],
)
def test_the_verdict_is_as_sure_as_its_interval(interval, better, words):
    made = result(interval)
    lines = verdict(made)
    assert is_better(made) is better and len(lines) == 5
    assert words in lines[2] and "0.0200 higher" in lines[2]
    assert "field F1 10.0% → 90.0%" in lines[1] and "on 45 rows" in lines[1].lower()
    assert ("veneer chat --adapter runs/t" in lines[4]) == bool(better)


@pytest.mark.parametrize(("sign", "better"), [(1, True), (-1, False)])
def test_the_verdict_of_pairs_follows_from_their_accuracy(sign, better):
    made = result([-1.2, -0.8])
    gain = {"other": 0.5, "difference": sign * 0.3, "interval": sorted([sign * 0.2, sign * 0.4])}
    likelier = {"other": 0.6, "difference": 0.1, "interval": [-0.1, 0.3]}
    made["judging"] |= {"metrics": [], "measures": ["accuracy", "likelier"]}
    made["judging"]["adapter"] |= {
        "accuracy": 0.5 + sign * 0.3,
        "likelier": 0.7,
        "units": {"accuracy": "share", "likelier": "share"},
        "against": {"accuracy": gain, "likelier": likelier},
    }
    lines = verdict(made)
    assert is_better(made) is better
    assert "preferred answer likelier in 60.0% → 70.0%" in lines[1]
    assert f"the interval is {'above' if better else 'below'} zero" in lines[2]


def test_the_verdict_is_not_sure_where_parts_may_have_similar_prompts():
    made = result([-1.2, -0.8])
    made["rows"]["by_likeness"] = False
    assert "Not sure: many prompts are alike" in verdict(made)[2]


@pytest.mark.parametrize(
    ("forgetting", "words"),
    [
        ((0.1, [0.05, 0.15]), "it forgot some general text"),
        ((0.1, [-0.05, 0.25]), "cannot be told from chance"),
        ((0.1, None), "cannot be told from chance"),
        ((-0.1, [-0.2, -0.05]), "it forgot nothing"),
    ],
)
def test_the_verdict_says_what_was_forgotten(forgetting, words):
    assert words in verdict(result([-1.2, -0.8], forgetting=forgetting))[3]


@pytest.mark.parametrize("reason", ["time", "done", "early_stop"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("library", ["tickets", None])
def test_the_verdict_says_what_to_do_next(reason, whole, library):
    made = result([-1.2, -0.8])
    made["run"] |= {"reason": reason, "whole": whole}
    last = verdict({**made, "library": library})[4]
    by_time = reason == "time" or (reason == "done" and not whole)
    assert ("the time ended the training" in last) == by_time
    assert ("in the library as tickets" in last) == (library is not None)
    assert ("veneer adapters add runs/t" in last) == (library is None)


def test_an_interrupted_verdict_claims_nothing():
    lines = verdict(result(None, interrupted=True))
    assert lines[0].startswith("Interrupted.") and "Not judged" in lines[1]


@pytest.mark.parametrize("seconds", [20, 33, 47.5, 60])
@pytest.mark.parametrize("every", [1, 5, 20])
@pytest.mark.parametrize("step_seconds", [0.1, 0.7])
@pytest.mark.parametrize("evaluation_seconds", [0.2, 9.0])
def test_the_last_run_ends_within_the_time_at_its_last_evaluation_there(
    seconds, every, step_seconds, evaluation_seconds, monkeypatch
):
    """The probe measured another time of an evaluation, so the first is judged by that."""
    now, reasons = 0.0, []
    monkeypatch.setattr(supervisors.time, "monotonic", lambda: now)
    search = TimedSearch(
        SuccessiveHalving([]),
        deadline=seconds,
        evaluation_seconds=9.0,
        interrupt=Interrupt(),
        say=print,
        name=str,
    )
    inputs, progress = SimpleNamespace(evaluate_every=every, steps=1000), SimpleNamespace(step=0)
    run = SimpleNamespace(inputs=inputs, progress=progress, ended=False, rungs=())
    run.stop = lambda reason, message: (reasons.append(reason), setattr(run, "ended", True))
    search.begin([run])
    evaluated = 0.0
    while not run.ended and progress.step < inputs.steps:
        progress.step += 1
        now += step_seconds
        if progress.step % every == 0:
            now += evaluation_seconds
            evaluated = now
        search.review([run])
    assert reasons in ([TIME], []) and now <= seconds
    longest = every * step_seconds + max(evaluation_seconds, 9.0 * (evaluated == 0))
    assert not reasons or evaluated + longest > seconds - 1e-6
