"""Runs a whole comparison: rows, search, seeds, evaluations, figures, page.

out/data/          rows that were split off, if no files were given for them out/runs/          a
folder for each run (execute.py) out/base/          the evaluation of the base comparison.json
the figures; comparison.html shows them
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from veneer.bases.compute import DtypeName
from veneer.comparison.conclusion import conclude
from veneer.comparison.execute import JobRunner
from veneer.comparison.figures import CandidateResult, make_figures
from veneer.comparison.jobs import JobExecutor, JobGenerator, Say, run_jobs, run_together
from veneer.comparison.pace import Pace
from veneer.comparison.page import make_page
from veneer.comparison.plan import Candidate, Comparison
from veneer.comparison.search import search, steps_within
from veneer.data.examples import Row
from veneer.data.files.sources import read_rows
from veneer.evaluation.labels import labels_of
from veneer.files.atomic import write_text


def run_comparison(comparison: Comparison, executor: JobExecutor, say: Say) -> dict[str, Any]:
    """Runs what is not finished, writes comparison.json and comparison.html, and returns the
    figures.

    Raises Interrupted; the same call continues. Raises VeneerError if a run failed other than by
    diverging or not fitting, which are results.
    """
    comparison.out.mkdir(parents=True, exist_ok=True)
    layout = comparison.candidates[0].config.data.format
    rows = read_rows(comparison.test, layout, kind=comparison.row_kind)
    _refuse_free_text(comparison, rows)
    try:
        environment = executor.inspect(
            comparison.base, [candidate.config for candidate in comparison.candidates]
        )
        for line in environment.lines:
            say(line)
        found = zip(comparison.candidates, environment.dtypes, environment.rates, strict=True)
        comparison = replace(comparison, candidates=[resolved(*of_one) for of_one in found])
        runs = len(comparison.candidates) * (len(comparison.factors) + comparison.seeds - 1)
        say(
            _runs_text(
                runs,
                len(comparison.candidates) * comparison.extend
                if len(comparison.factors) > 1
                else 0,
            )
        )
        runner = JobRunner(
            comparison,
            environment.circumstances,
            say,
            ran=[],
            pace=Pace(runs),
            shares_forwards=executor.shares_forwards,
        )
        candidates = run_together(
            train_candidate(runner, candidate) for candidate in comparison.candidates
        )
        generator: JobGenerator[list[Any]] = run_together(
            [runner.evaluate("the base", None), candidates]
        )
        base, results = run_jobs(generator, executor, lambda text: say(runner.pace.line(text)))
    finally:
        executor.stop()
    figures = make_figures(comparison, results, base, rows)
    figures["conclusion"] = conclude(figures)
    figures["new_runs"] = len([path for path in runner.ran if path.suffix != ".json"])
    for name, text in (
        ("comparison.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n"),
        ("comparison.html", make_page(figures)),
    ):
        write_text(comparison.out / name, text, replace=True)
    return figures


def _runs_text(runs: int, extra: int) -> str:
    """Says how many runs there will be. most: further runs that may follow."""
    extra_text = (
        f", and up to {extra:,} more where the best learning rate is the lowest or highest tried"
        if extra
        else ""
    )
    return f"{runs:,} runs{extra_text}"


def _refuse_free_text(comparison: Comparison, rows: Sequence[Row]) -> None:
    """Raises ConfigError if accuracy is requested but neither labels nor answers can serve as
    labels.
    """
    if comparison.labels is None and any(metric.needs == "label" for metric in comparison.found):
        text_rows = [row for row in rows if row.messages and not row.messages[-1].get("tool_calls")]
        labels_of(
            [[str(row.messages[-1]["content"]).strip(), *row.references] for row in text_rows]
        )


def resolved(candidate: Candidate, dtype: DtypeName, rate: float) -> Candidate:
    """Returns the candidate with a fixed type of its base, so that no process chooses another, and
    with its default learning rate, around which the search goes."""
    config = candidate.config
    method = config.method.for_learning_rate(config.learning_rate)
    update = {"dtype": dtype, "learning_rate": rate, "method": method}
    return replace(candidate, config=config.model_copy(update=update))


def train_candidate(runner: JobRunner, candidate: Candidate) -> JobGenerator[CandidateResult]:
    """Searches the learning rate of a candidate, trains every seed with it, and evaluates."""
    comparison = runner.comparison
    if comparison.steps is not None:
        steps = comparison.steps
    else:
        assert comparison.seconds is not None
        steps = yield from steps_within(runner, candidate, comparison.seconds)
    trials, best = yield from search(runner, candidate, steps)
    if best is None:
        return CandidateResult(candidate, trials, None, [], [])
    rate, chosen = trials[best]
    # Time and memory are those of a run that had the process to itself.
    is_kept = not chosen.alone and chosen.has_result and chosen.is_as_alone
    kept = [chosen] if is_kept and comparison.seeds > 1 else []
    if not (chosen.alone or kept):
        runner.pace.one_more()
    more = yield from run_together(
        runner.train(candidate, rate=rate, seed=seed, steps=steps, with_result=True)
        for seed in range(len(kept), comparison.seeds)
    )
    runs = [*kept, *more]
    successful = [run for run in runs if run.failure is None]
    evaluations = yield from run_together(
        runner.evaluate(f"{candidate.name}, seed {seed}", run)
        for seed, run in enumerate(successful)
    )
    # Another seed may diverge at the rate that was best for seed 0.
    failed = [run for run in runs if run.failure]
    pairs = zip(successful, evaluations, strict=True)
    failed += [
        replace(run, failure=evaluation["failure"])
        for run, evaluation in pairs
        if evaluation.get("failure")
    ]
    if failed:
        return CandidateResult(candidate, [*trials, *[(rate, run) for run in failed]], None, [], [])
    return CandidateResult(candidate, trials, best, successful, evaluations)
