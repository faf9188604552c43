"""`evaluate`: the loss of a base on held-out rows, and how its answers compare with theirs.

The loss comes in as a function, because how a batch is computed is the training step's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.examples import Example, Row
from veneer.errors import ConfigError, DataError
from veneer.evaluate.answers import Answer, evaluate_answers, expected_answers, refuse_rows
from veneer.evaluate.metrics import (
    bootstrap_interval,
    exact_match,
    f1_of_totals,
    field_counts,
    field_f1,
    json_validity,
)
from veneer.models.base import Base
from veneer.store.atomic import atomic_file

METRICS = ("exact_match", "json_validity", "field_f1")
INTERVAL_SEED = 0  # the interval of the same answers is the same


def evaluate(
    base: Base,
    rows: Sequence[Row],
    examples: Sequence[Example],
    metrics: Sequence[str],
    *,
    loss: Callable[[Sequence[Example]], tuple[float, int]],
    max_new_tokens: int = 256,
    batch: int = 16,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """What `veneer evaluate` reports, ready for JSON.

        rows, tokens    rows evaluated; trained tokens that the loss is over
        loss            nats per trained token: every token counts the same, however long its row
        <metric>        each metric asked for, a share between 0 and 1
        intervals       {metric: [low, high]}, 95%, bootstrapped over rows

    loss         examples -> (summed nats, trained tokens), on this base as it stands
    metrics      of METRICS; none: nothing is generated
    predictions  a JSONL file to write: row, expected, answer, and each metric of that row
    Raises ConfigError for an unknown metric, DataError for rows that a metric cannot be computed on.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ConfigError(f"unknown metrics: {', '.join(unknown)}", [], f"There are: {', '.join(METRICS)}.")
    if "field_f1" in metrics:
        # Before anything is generated, which takes minutes.
        refuse_rows(
            "field_f1 compares JSON, and the expected answer of these rows is not JSON",
            [
                row.ref
                for row, text in zip(rows, expected_answers(base, rows), strict=True)
                if not json_validity(text)
            ],
            "Ask for exact_match instead.",
        )
    total, tokens = loss(examples)
    if not tokens:
        raise DataError("no token to evaluate", [], "See what is trained on: veneer data check")
    result: dict[str, Any] = {"rows": len(examples), "loss": total / tokens, "tokens": tokens}
    if not metrics:
        return result
    answers = evaluate_answers(base, rows, max_new_tokens=max_new_tokens, batch=batch)
    result["intervals"] = {}
    scored: list[dict[str, Any]] = [
        {"row": str(a.row.ref), "expected": a.expected, "answer": a.answer} for a in answers
    ]
    for metric in metrics:
        values, share, interval = _measure(metric, answers)
        result[metric], result["intervals"][metric] = share, list(interval)
        for line, value in zip(scored, values, strict=True):
            line[metric] = value
    if predictions is not None:
        with atomic_file(predictions, replace=True) as partial:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in scored]
            partial.write_text("".join(lines), encoding="utf-8")
    return result


def _measure(metric: str, answers: Sequence[Answer]) -> tuple[list[float], float, tuple[float, float]]:
    """A metric per row, over all rows, and its interval."""
    if metric == "field_f1":
        counts = [field_counts(a.expected, a.answer) for a in answers]
        # Micro F1 is a ratio of sums: rows are resampled with their counts, not with their own F1.
        table = [[c.matched, c.expected + c.answered] for c in counts]
        interval = bootstrap_interval(
            table, INTERVAL_SEED, statistic=lambda resampled: f1_of_totals(resampled.sum(axis=0))
        )
        return [field_f1([c]) for c in counts], field_f1(counts), interval
    if metric == "exact_match":
        values = [float(exact_match(a.expected, a.answer)) for a in answers]
    else:
        values = [float(json_validity(a.answer)) for a in answers]
    return values, float(np.mean(values)), bootstrap_interval(values, INTERVAL_SEED)
