"""Figures of a comparison, from its runs and evaluations: the content of `comparison.json`.

Quality has an interval over rows and seeds (evaluation/intervals.py), and so has each difference to
the best, between the same rows and seeds. Costs are those of the first run that trained alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparison.execute import FinishedRun
from veneer.comparison.measures import Measure, TestMeasures, test_measures
from veneer.comparison.plan import Candidate, Comparison
from veneer.data.examples import Row, prompt_key
from veneer.evaluation.intervals import Counts, interval, paired_difference
from veneer.evaluation.metrics.metric import ratio
from veneer.evaluation.predictions import Line, lines_of_rows, read_predictions
from veneer.training.output.records import read_records

FORMAT_VERSION = 1
DISAGREEMENTS = 5
Figures = dict[str, Any]


@dataclass(frozen=True)
class CandidateResult:
    """Holds the result of a candidate.

    search        (rate, run) of the search; best: index of the one that was chosen
    runs          one for each seed, with the best rate
    evaluations   `veneer evaluate` of each
    """

    candidate: Candidate
    search: Sequence[tuple[float, FinishedRun]]
    best: int | None
    runs: Sequence[FinishedRun]
    evaluations: Sequence[Mapping[str, Any]]

    @property
    def costs(self) -> Mapping[str, Any]:
        """Returns the summary of the first run that had the process to itself."""
        return next(run for run in self.runs if run.alone).summary


def make_figures(
    comparison: Comparison,
    results: Sequence[CandidateResult],
    base: Mapping[str, Any],
    rows: Sequence[Row],
) -> Figures:
    """Returns the content of comparison.json (docs/format.md). rows: the test rows, in the file's
    order.
    """
    base_lines = read_predictions(comparison.out / "base" / "predictions.jsonl")
    groups = zip(rows, lines_of_rows(base_lines), strict=True)
    prompts = [prompt_key(row) for row, row_lines in groups for _ in row_lines]
    test = test_measures(comparison, base_lines, prompts)
    measures, primary = test.measures, test.primary
    successful = [result for result in results if result.best is not None]
    lines = {
        result.candidate.name: [
            read_predictions(run.folder / "predictions.jsonl") for run in result.runs
        ]
        for result in successful
    }
    counts = {name: _counts(test, seeds) for name, seeds in lines.items()}
    methods = [
        _method(result, base, counts.get(result.candidate.name), measures, comparison.out)
        for result in results
    ]
    best, full = _best(methods, primary), _full(results, methods)
    for method in [m for m in methods if m["quality"]]:
        assert best is not None
        own_counts = counts[method["name"]]
        method["to_best"] = _differences(own_counts, counts[best], measures)
        if full is not None:
            full_is_best = full == best
            method["to_full"] = (
                method["to_best"]
                if full_is_best
                else _differences(own_counts, counts[full], measures)
            )
    base_counts = _counts(test, [base_lines])
    return {
        "format_version": FORMAT_VERSION,
        "base": comparison.base,
        "data": {
            name: _path(getattr(comparison, name), comparison.out)
            for name in ("train", "validation", "test")
        },
        "test_rows": len(rows),
        "seeds": comparison.seeds,
        "budget": {"steps": comparison.steps, "seconds": comparison.seconds},
        "primary": primary,
        "units": test.units,
        "best": best,
        "full": full,
        "untuned": {
            name: _figure(base_counts[name], measure) for name, measure in measures.items()
        },
        "untuned_general": base.get("general", {}).get("loss"),
        "methods": methods,
        "disagreements": _disagreements(comparison, lines, counts, rows, test),
    }


def _counts(test: TestMeasures, seeds: Sequence[Sequence[Line]]) -> dict[str, Counts]:
    """Returns counts (S, N, K) of every measure."""
    of_seeds = [test.counts(lines) for lines in seeds]
    return {name: np.stack([counts[name] for counts in of_seeds]) for name in test.measures}


def _figure(counts: Counts, measure: Measure) -> Figures:
    of_totals = measure.of_totals
    return {
        "value": of_totals(counts.sum(axis=(0, 1))),
        "interval": interval(counts, of_totals, share=measure.share, prompts=measure.prompts),
        "seeds": [of_totals(seed.sum(axis=0)) for seed in counts],
    }


def _differences(
    left: Mapping[str, Counts], right: Mapping[str, Counts], measures: Mapping[str, Measure]
) -> Figures:
    differences = {}
    for name, measure in measures.items():
        difference, ends = paired_difference(
            left[name], right[name], measure.of_totals, share=measure.share, prompts=measure.prompts
        )
        differences[name] = {"difference": difference, "interval": ends}
    return differences


def _method(
    result: CandidateResult,
    base: Mapping[str, Any],
    counts: Mapping[str, Counts] | None,
    measures: Mapping[str, Measure],
    out: Path,
) -> Figures:
    config = result.candidate.config
    method: Figures = {
        "name": result.candidate.name,
        "settings": config.method.model_dump(mode="json"),
        "quantize": config.quantize,
        "folds": config.method.folds,
        "instead_of_folding": config.method.instead_of_folding,
        "search": [
            {
                "learning_rate": rate,
                "loss": run.loss,
                "failure": run.failure,
                "steps": run.summary.get("steps"),
            }
            for rate, run in result.search
        ],
        "failure": None,
        "quality": {},
    }
    if result.best is None or counts is None:
        failures = sorted({run.failure for _, run in result.search if run.failure})
        return {**method, "failure": ", ".join(failures) or "no loss"}
    summary = result.costs
    return {
        **method,
        "learning_rate": result.search[result.best][0],
        "steps": summary["steps"],
        "quality": {name: _figure(counts[name], measure) for name, measure in measures.items()},
        **{
            name: summary[name]
            for name in (
                "trainable_parameters",
                "total_parameters",
                "peak_memory_bytes",
                "idle_memory_bytes",
                "adapter_bytes",
                "seconds",
                "total_seconds",
                "examples_per_second",
                "tokens_per_second",
            )
        },
        "forgetting": _forgetting(
            [e["general"] for e in result.evaluations if "general" in e], base.get("general")
        ),
        "curve": _curve(result.runs[0].folder),
        "runs": [_path(run.folder, out) for run in result.runs],
    }


def _path(path: Path, out: Path) -> str:
    """Returns a path relative to the comparison's folder if it is inside, so that the folder may be
    moved.
    """
    path, out = path.resolve(), out.resolve()
    return str(path.relative_to(out) if path.is_relative_to(out) else path)


def _forgetting(
    after: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None
) -> Figures | None:
    """Returns loss on general text after minus that of the base, over documents; the mean over
    seeds.
    """
    if before is None or not after:
        return None

    def table(general: Mapping[str, Any]) -> Counts:
        return np.array([general["nats"], general["tokens_of_documents"]], dtype=np.float64).T

    mean = np.mean([table(evaluation) for evaluation in after], axis=0)
    difference, ends = paired_difference(mean, table(before), ratio)
    return {"value": difference, "interval": ends}


def _curve(folder: Path) -> list[list[float | None]]:
    return [
        [r["step"], r["loss"]]
        for r in read_records(folder / "metrics.jsonl")
        if r["kind"] == "evaluation"
    ]


def better(primary: str, a: float, b: float) -> bool:
    """Returns whether a is better than b: lower for a loss, higher for other measures."""
    return a < b if primary == "loss" else a > b


def _full(results: Sequence[CandidateResult], methods: Sequence[Figures]) -> str | None:
    """Returns the name of full fine-tuning, to which other methods are compared, if it has a
    result.
    """
    for result, figures in zip(results, methods, strict=True):
        if result.candidate.config.method.trains_base and figures["quality"]:
            return result.candidate.name
    return None


def _best(methods: Sequence[Figures], primary: str) -> str | None:
    best: Figures | None = None
    for method in methods:
        if method["quality"] and (
            best is None
            or better(
                primary, method["quality"][primary]["value"], best["quality"][primary]["value"]
            )
        ):
            best = method
    return None if best is None else str(best["name"])


def _disagreements(
    comparison: Comparison,
    lines: Mapping[str, Sequence[Sequence[Line]]],
    counts: Mapping[str, Mapping[str, Counts]],
    rows: Sequence[Row],
    test: TestMeasures,
) -> list[Figures]:
    """Returns the rows on whose last answer the candidates (with seed 0) differ most, by the
    deciding measure.
    """
    first = {name: seeds[0] for name, seeds in lines.items()}
    if len(first) < 2:
        return []
    primary = test.primary
    field = (
        "label"
        if any(m.name == primary and m.needs == "label" for m in comparison.found)
        else "answer"
    )
    values = {
        name: [test.measures[primary].of_totals(row) for row in counts[name][primary][0]]
        for name in first
    }
    distances = []
    last_lines = [
        end - 1 for end in accumulate(map(len, lines_of_rows(next(iter(first.values())))))
    ]
    for number in last_lines:
        candidate_lines = [line_list[number] for line_list in first.values()]
        losses = [line["nats"] / max(line["tokens"], 1) for line in candidate_lines]
        of_row = [of_rows[number] for of_rows in values.values()]
        distances.append((float(np.ptp(of_row)), float(np.ptp(losses))))
    # Rows with equal values of the deciding measure are ordered by the loss of their answers.
    order = sorted(range(len(rows)), key=lambda n: distances[n], reverse=True)[:DISAGREEMENTS]
    return [
        {
            "row": f"{_path(comparison.test, comparison.out)}:{rows[n].ref.line}",
            "prompt": _question(rows[n]),
            "expected": _expected(rows[n]),
            "answers": {
                name: {
                    "text": line_list[last_lines[n]].get(field),
                    "value": values[name][last_lines[n]],
                }
                for name, line_list in first.items()
            },
        }
        for n in order
        if distances[n] > (0.0, 0.0)
    ]


def _question(row: Row) -> str:
    if row.text is not None:
        return row.text[:400]
    return next((str(m["content"]) for m in reversed(row.messages[:-1]) if m.get("content")), "")


def _expected(row: Row) -> str:
    return "" if not row.messages else str(row.messages[-1].get("content") or "")
