"""From runs and evaluations to the figures of a comparison: what `comparison.json` holds.

Quality has an interval over rows and seeds (evaluation/intervals.py), and so has each difference to
the best, taken between the same rows and seeds. Costs are of the run with seed 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from veneer.comparison.execute import FinishedRun
from veneer.comparison.plan import Candidate, Comparison
from veneer.data.examples import Row
from veneer.evaluation.intervals import Counts, OfTotals, interval, paired_difference
from veneer.evaluation.metric import ratio
from veneer.evaluation.predictions import Line, counts_of, loss_counts, read_predictions
from veneer.training.output.records import read_records

FORMAT_VERSION = 1
DISAGREEMENTS = 5
Figures = dict[str, Any]


class Measure(NamedTuple):
    """A figure from sums of counts; share: it lies between 0 and 1."""

    of_totals: OfTotals
    share: bool


@dataclass(frozen=True)
class CandidateResult:
    """A candidate that came to an end.

    search        (rate, run) of the search; best: the place of the one that was taken
    runs          one for each seed, with the best rate
    evaluations   what `veneer evaluate` said of each
    """

    candidate: Candidate
    search: Sequence[tuple[float, FinishedRun]]
    best: int | None
    runs: Sequence[FinishedRun]
    evaluations: Sequence[Mapping[str, Any]]


def make_figures(
    comparison: Comparison,
    finished: Sequence[CandidateResult],
    base: Mapping[str, Any],
    rows: Sequence[Row],
) -> Figures:
    """The content of comparison.json; docs/format.md names its fields. rows: the test rows, in the
    file's order."""
    measures = {
        metric.name: Measure(metric.of_totals, metric.unit == "share")
        for metric in comparison.found
    }
    measures["loss"] = Measure(ratio, share=False)
    whole = [f for f in finished if f.best is not None]
    lines = {
        f.candidate.name: [read_predictions(run.folder / "predictions.jsonl") for run in f.runs]
        for f in whole
    }
    counts = {name: _counts(comparison, seeds) for name, seeds in lines.items()}
    primary = comparison.found[0].name if comparison.found else "loss"
    units = {metric.name: metric.unit for metric in comparison.found} | {"loss": "nats"}
    methods = [
        _method(f, base, counts.get(f.candidate.name), measures, comparison.out) for f in finished
    ]
    best, full = _best(methods, primary), _full(finished, methods)
    for method in [m for m in methods if m["quality"]]:
        assert best is not None
        ours = counts[method["name"]]
        method["to_best"] = _differences(ours, counts[best], measures)
        if full is not None:
            same = full == best
            method["to_full"] = (
                method["to_best"] if same else _differences(ours, counts[full], measures)
            )
    base_lines = read_predictions(comparison.out / "base" / "predictions.jsonl")
    base_counts = _counts(comparison, [base_lines])
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
        "units": units,
        "best": best,
        "full": full,
        "untuned": {
            name: _figure(base_counts[name], measure) for name, measure in measures.items()
        },
        "untuned_general": base.get("general", {}).get("loss"),
        "methods": methods,
        "disagreements": _disagreements(comparison, lines, rows, primary),
    }


def _counts(comparison: Comparison, seeds: Sequence[Sequence[Line]]) -> dict[str, Counts]:
    """(S, N, K) of every measure."""
    found = {m.name: np.stack([counts_of(lines, m) for lines in seeds]) for m in comparison.found}
    found["loss"] = np.stack([loss_counts(lines) for lines in seeds])
    return found


def _figure(counts: Counts, measure: Measure) -> Figures:
    of_totals = measure.of_totals
    return {
        "value": of_totals(counts.sum(axis=(0, 1))),
        "interval": interval(counts, of_totals, share=measure.share),
        "seeds": [of_totals(seed.sum(axis=0)) for seed in counts],
    }


def _differences(
    ours: Mapping[str, Counts], theirs: Mapping[str, Counts], measures: Mapping[str, Measure]
) -> Figures:
    found = {}
    for name, measure in measures.items():
        difference, ends = paired_difference(
            ours[name], theirs[name], measure.of_totals, share=measure.share
        )
        found[name] = {"difference": difference, "interval": ends}
    return found


def _method(
    f: CandidateResult,
    base: Mapping[str, Any],
    counts: Mapping[str, Counts] | None,
    measures: Mapping[str, Measure],
    out: Path,
) -> Figures:
    config = f.candidate.config
    method: Figures = {
        "name": f.candidate.name,
        "settings": config.method.model_dump(mode="json"),
        "quantize": config.quantize,
        "folds": config.method.folds,
        "instead_of_folding": config.method.instead_of_folding,
        "search": [
            {"learning_rate": rate, "loss": d.loss, "failure": d.failure} for rate, d in f.search
        ],
        "failure": None,
        "quality": {},
    }
    if f.best is None or counts is None:
        failures = sorted({run.failure for _, run in f.search if run.failure})
        return {**method, "failure": ", ".join(failures) or "no loss"}
    summary = f.runs[0].summary
    return {
        **method,
        "learning_rate": f.search[f.best][0],
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
            [e["general"] for e in f.evaluations if "general" in e], base.get("general")
        ),
        "curve": _curve(f.runs[0].folder),
        "runs": [_path(run.folder, out) for run in f.runs],
    }


def _path(path: Path, out: Path) -> str:
    """From the comparison's own folder where it lies inside, so that the folder may be moved; else
    absolute."""
    path, out = path.resolve(), out.resolve()
    return str(path.relative_to(out) if path.is_relative_to(out) else path)


def _forgetting(
    after: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None
) -> Figures | None:
    """Loss on general text after minus that of the base, over documents; the mean over seeds."""
    if before is None or not after:
        return None

    def table(general: Mapping[str, Any]) -> Counts:
        return np.array([general["nats"], general["tokens_of_documents"]], dtype=np.float64).T

    mean = np.mean([table(each) for each in after], axis=0)
    difference, ends = paired_difference(mean, table(before), ratio)
    return {"value": difference, "interval": ends}


def _curve(folder: Path) -> list[list[float | None]]:
    return [
        [r["step"], r["loss"]]
        for r in read_records(folder / "metrics.jsonl")
        if r["kind"] == "evaluation"
    ]


def better(primary: str, a: float, b: float) -> bool:
    """Whether a is better than b: less of a loss, more of anything else."""
    return a < b if primary == "loss" else a > b


def _full(finished: Sequence[CandidateResult], methods: Sequence[Figures]) -> str | None:
    """Full fine-tuning is what the others are held against, where it is among them."""
    for f, figures in zip(finished, methods, strict=True):
        if f.candidate.config.method.trains_base and figures["quality"]:
            return f.candidate.name
    return None


def _best(methods: Sequence[Figures], primary: str) -> str | None:
    found: Figures | None = None
    for method in methods:
        if method["quality"] and (
            found is None
            or better(
                primary, method["quality"][primary]["value"], found["quality"][primary]["value"]
            )
        ):
            found = method
    return None if found is None else str(found["name"])


def _disagreements(
    comparison: Comparison,
    lines: Mapping[str, Sequence[Sequence[Line]]],
    rows: Sequence[Row],
    primary: str,
) -> list[Figures]:
    """The rows on which the candidates (with seed 0) lie furthest apart, by the deciding
    measure."""
    first = {name: seeds[0] for name, seeds in lines.items()}
    if len(first) < 2:
        return []
    field = (
        "label"
        if any(m.name == primary and m.needs == "label" for m in comparison.found)
        else "answer"
    )
    apart = []
    for number in range(len(rows)):
        sides = [side[number] for side in first.values()]
        losses = [line["nats"] / max(line["tokens"], 1) for line in sides]
        values = losses if primary == "loss" else [line[primary] for line in sides]
        apart.append((float(np.ptp(values)), float(np.ptp(losses))))
    # Rows that the deciding measure does not part are ordered by how likely their right answer was
    # found.
    order = sorted(range(len(rows)), key=lambda n: apart[n], reverse=True)[:DISAGREEMENTS]
    return [
        {
            "row": f"{_path(comparison.test, comparison.out)}:{rows[n].ref.line}",
            "prompt": _question(rows[n]),
            "expected": _expected(rows[n]),
            "answers": {
                name: {
                    "text": side[n].get(field),
                    "value": side[n]["nats"] / max(side[n]["tokens"], 1)
                    if primary == "loss"
                    else side[n][primary],
                }
                for name, side in first.items()
            },
        }
        for n in order
        if apart[n] > (0.0, 0.0)
    ]


def _question(row: Row) -> str:
    if row.text is not None:
        return row.text[:400]
    return next((str(m["content"]) for m in reversed(row.messages[:-1]) if m.get("content")), "")


def _expected(row: Row) -> str:
    return "" if not row.messages else str(row.messages[-1].get("content") or "")
