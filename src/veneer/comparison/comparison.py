"""A whole comparison: rows, search, seeds, evaluations, figures, page.

out/data/          rows that were split off, where no files were given for them
out/runs/          a folder for each run (execute.py)
out/base/          the evaluation of the base
comparison.json    the figures; comparison.html, the same for people
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from veneer.bases.compute import DtypeName
from veneer.bases.loading.without_weights import load_skeleton
from veneer.comparison.conclusion import conclude
from veneer.comparison.execute import JobRunner
from veneer.comparison.figures import CandidateResult, make_figures
from veneer.comparison.jobs import Asking, JobExecutor, Say, answer, together
from veneer.comparison.pace import Pace
from veneer.comparison.page import make_page
from veneer.comparison.plan import Candidate, Comparison
from veneer.comparison.search import search, steps_within
from veneer.data.examples import Row
from veneer.data.files.sources import read_rows
from veneer.evaluation.labels import labels_of
from veneer.files.atomic import atomic_file
from veneer.models.frozen_base import hidden_size


def run_comparison(comparison: Comparison, place: JobExecutor, say: Say) -> dict[str, Any]:
    """Runs what is not finished yet at the place, writes comparison.json and comparison.html, and
    returns the figures.

    Raises Interrupted: the same call goes on. VeneerError: a run failed in another way than by
    diverging or by not fitting, which are results.
    """
    comparison.out.mkdir(parents=True, exist_ok=True)
    format = comparison.candidates[0].config.data.format
    rows = read_rows(comparison.test, format)
    _refuse_free_text(comparison, rows)
    width = hidden_size(load_skeleton(comparison.base).model.config)
    try:
        found = place.look(comparison.base, [each.config for each in comparison.candidates])
        for line in found.lines:
            say(line)
        pairs = zip(comparison.candidates, found.dtypes, strict=True)
        comparison = replace(comparison, candidates=[with_dtype(c, dtype) for c, dtype in pairs])
        runs = len(comparison.candidates) * (len(comparison.factors) + comparison.seeds - 1)
        say(
            _runs_text(
                runs,
                len(comparison.candidates) * comparison.extend
                if len(comparison.factors) > 1
                else 0,
            )
        )
        worker = JobRunner(comparison, width, found.circumstances, say, ran=[], pace=Pace(runs))
        candidates = together(_candidate(worker, each) for each in comparison.candidates)
        asking: Asking[list[Any]] = together([worker.evaluate("the base", None), candidates])
        base, finished = answer(asking, place, lambda text: say(worker.pace.said(text)))
    finally:
        place.stop()
    figures = make_figures(comparison, finished, base, rows)
    figures["conclusion"] = conclude(figures)
    figures["new_runs"] = len([path for path in worker.ran if path.suffix != ".json"])
    for name, text in (
        ("comparison.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n"),
        ("comparison.html", make_page(figures)),
    ):
        with atomic_file(comparison.out / name, replace=True) as partial:
            partial.write_text(text, encoding="utf-8")
    return figures


def _runs_text(runs: int, most: int) -> str:
    """How many runs there will be, and for what more may follow."""
    more = (
        f", and up to {most:,} more where the best learning rate is the lowest or highest tried"
        if most
        else ""
    )
    return f"{runs:,} runs{more}"


def _refuse_free_text(comparison: Comparison, rows: Sequence[Row]) -> None:
    """ConfigError: accuracy is asked for without labels, and the rows' own answers are none. Before
    anything runs."""
    if comparison.labels is None and any(metric.needs == "label" for metric in comparison.found):
        plain = [row for row in rows if row.messages and not row.messages[-1].get("tool_calls")]
        labels_of([[str(row.messages[-1]["content"]).strip(), *row.references] for row in plain])


def with_dtype(candidate: Candidate, dtype: DtypeName) -> Candidate:
    """The candidate with the type of its base named: each process would choose it anew."""
    return replace(candidate, config=candidate.config.model_copy(update={"dtype": dtype}))


def _candidate(worker: JobRunner, candidate: Candidate) -> Asking[CandidateResult]:
    comparison = worker.comparison
    if comparison.steps is not None:
        steps = comparison.steps
    else:
        assert comparison.seconds is not None
        steps = yield from steps_within(worker, candidate, comparison.seconds)
    tried, best = yield from search(worker, candidate, steps)
    if best is None:
        return CandidateResult(candidate, tried, None, [], [])
    rate, seeds = tried[best][0], range(comparison.seeds)
    runs = yield from together(
        worker.train(candidate, rate=rate, seed=seed, steps=steps, with_result=True)
        for seed in seeds
    )
    whole = [run for run in runs if run.failure is None]
    evaluations = yield from together(
        worker.evaluate(f"{candidate.name}, seed {seed}", run) for seed, run in enumerate(whole)
    )
    failed = [
        run for run in runs if run.failure
    ]  # another seed diverged at the rate that was best for seed 0
    pairs = zip(whole, evaluations, strict=True)
    failed += [replace(run, failure=told["failure"]) for run, told in pairs if told.get("failure")]
    if failed:
        return CandidateResult(candidate, [*tried, *[(rate, run) for run in failed]], None, [], [])
    return CandidateResult(candidate, tried, best, whole, evaluations)
