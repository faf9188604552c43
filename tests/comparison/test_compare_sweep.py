"""The search of a comparison: learning rates of one candidate train in the same forwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comparison.test_compare import write_rows
from tests.support.tiny import save_tiny
from veneer import api
from veneer.comparison.comparison import train_candidate
from veneer.comparison.execute import FinishedRun, JobRunner
from veneer.comparison.figures import CandidateResult
from veneer.comparison.jobs import CommandJob, run_jobs
from veneer.comparison.local import LocalExecutor, job_command
from veneer.comparison.plan import Candidate, Comparison
from veneer.comparison.sweep import train_rates
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen

RATES = (1e-2, 3e-2, 1e-1)
STEPS = 4


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> JobRunner:
    folder = tmp_path_factory.mktemp("sweep")
    base = str(save_tiny(folder / "base"))
    train, test = (
        write_rows(folder / f"{name}.jsonl", count, start)
        for name, count, start in (("train", 8, 0), ("test", 3, 20))
    )
    data = {"train": str(train), "validation": str(test)}
    candidates = [
        Candidate(name, RunConfig.of({"base": base, "data": data, "method": name, "out": "o"}))
        for name in ("lora", "full")
    ]
    comparison = Comparison(
        candidates,
        base,
        train,
        test,
        test,
        folder / "out",
        steps=STEPS,
        factors=(1.0, 3.0, 10.0),
        extend=0,
        seeds=2,
        max_new_tokens=2,
        general=None,
    )
    return JobRunner(comparison, {}, lambda text: None, [], shares_forwards=True)


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    executor = LocalExecutor()
    yield executor
    executor.stop()


def searched(
    runner: JobRunner, candidate: Candidate, executor: LocalExecutor
) -> tuple[dict[float, FinishedRun], int]:
    """Returns the runs by learning rate, and how many were made now."""
    before = len(runner.ran)
    runs = run_jobs(train_rates(runner, candidate, RATES, STEPS), executor, lambda text: None)
    return runs, len(runner.ran) - before


@pytest.fixture(scope="module")
def together(runner: JobRunner, executor: LocalExecutor) -> dict[float, FinishedRun]:
    runs, made = searched(runner, runner.comparison.candidates[0], executor)
    assert made == len(RATES)
    return runs


def test_rates_train_together_and_the_worse_half_stops(
    runner: JobRunner, together: dict[float, FinishedRun]
) -> None:
    assert len({run.folder.parent for run in together.values()}) == 1
    assert not any(run.alone for run in together.values())
    assert sorted(run.summary["steps"] for run in together.values()) == [2, STEPS, STEPS]
    assert [run.summary["steps"] for run in together.values() if run.was_halved] == [2]
    assert not list(runner.comparison.out.rglob("checkpoints"))


def test_a_run_of_a_search_learns_what_it_learns_alone(
    together: dict[float, FinishedRun], tmp_path: Path
) -> None:
    run = next(run for run in together.values() if not run.was_halved)
    config = run.config.model_copy(update={"out": str(tmp_path / "alone")})
    summary = api.train_run(config, resume=False, screen=QuietScreen())
    assert run.summary["last_loss"] == pytest.approx(summary["last_loss"], rel=1e-6)
    assert run.summary["first_loss"] == pytest.approx(summary["first_loss"], rel=1e-6)


def test_a_finished_search_is_found_and_a_rate_without_a_result_trains_alone(
    runner: JobRunner, together: dict[float, FinishedRun], executor: LocalExecutor
) -> None:
    lora = runner.comparison.candidates[0]
    assert searched(runner, lora, executor) == (together, 0)
    halved = next(rate for rate, run in together.items() if run.was_halved)
    summary = together[halved].folder / "summary.json"
    content = summary.read_text()
    summary.unlink()  # as if it had diverged beside the others
    runs, made = searched(runner, lora, executor)
    assert made == 1 and runs[halved].alone and runs[halved].summary["steps"] == STEPS
    summary.write_text(content)


def test_full_fine_tuning_trains_each_rate_alone(
    runner: JobRunner, executor: LocalExecutor
) -> None:
    runs, made = searched(runner, runner.comparison.candidates[1], executor)
    assert made == len(RATES) and all(run.alone for run in runs.values())
    assert not any(run.was_halved for run in runs.values())


def test_costs_are_those_of_a_run_that_trained_alone(
    runner: JobRunner, together: dict[float, FinishedRun], executor: LocalExecutor
) -> None:
    candidate = runner.comparison.candidates[0]
    config = candidate.config.model_copy(update={"learning_rate": RATES[0]})
    result: CandidateResult = run_jobs(
        train_candidate(runner, Candidate(candidate.name, config)), executor, lambda text: None
    )
    assert [run.alone for run in result.runs] == [False, True] and result.best is not None
    assert result.runs[0].folder == together[result.search[result.best][0]].folder
    summary = json.loads((result.runs[1].folder / "summary.json").read_text())
    assert result.costs == summary and summary["seconds"] > 0


def test_an_interrupted_search_goes_on_only_from_checkpoints(tmp_path: Path) -> None:
    config = RunConfig.of({"base": "b", "data": "d", "out": str(tmp_path)})
    job = CommandJob("a", tmp_path / "rates", ("begin",), config, ("resume",))
    settings = job.folder / "learning_rate-1" / "run.yaml"
    settings.parent.mkdir(parents=True)
    settings.touch()
    assert job_command(job) == ["begin"] and not settings.exists()


@pytest.mark.parametrize(
    ("best", "settings", "is_as_alone"),
    [
        (5, {}, False),
        (4, {}, True),
        (10, {}, True),
        (9, {"evaluate_every": 3}, True),
        (10, {"patience": 2}, False),
    ],
)
def test_the_best_of_an_evaluation_that_only_halving_makes_is_no_run_of_a_seed(
    best: int, settings: dict[str, int], is_as_alone: bool
) -> None:
    config = RunConfig.of({"base": "b", "data": "d", "out": "o"} | settings)
    run = FinishedRun(Path("o"), config, {"steps": 10, "best_step": best}, alone=False)
    assert run.is_as_alone == is_as_alone
