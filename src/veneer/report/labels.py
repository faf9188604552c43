"""Writes the section on labels of a run's page: figures of the score head on held-out rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.report.plots import Series, line_chart
from veneer.wording import SHARES, number, percent

Record = Mapping[str, Any]


def label_section(evaluations: Sequence[Record]) -> str:
    """Draws the figures of all evaluations and states the last ones; empty for other objectives."""
    held = [record for record in evaluations if "labels" in record]
    if not held:
        return ""
    last = held[-1]["labels"]
    drawn = ("mrr", "ndcg_at_10") if "mrr" in last else ("accuracy", "macro_f1")
    chart = line_chart(
        [
            Series(SHARES[name], _points(held, name), colour, marks=True)
            for name, colour in zip(drawn, "ab", strict=True)
        ],
        title="Held-out labels",
        x_label="step",
        y_label="share",
    )
    return f"{chart}<p>At the end: {', '.join(_words(last))}.</p>"


def _points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    return [
        (record["step"], _value(record["labels"][name]))
        for record in records
        if name in record["labels"]
    ]


def _words(figures: Record) -> list[str]:
    words = [
        f"{label} {percent(_value(figures[name]), 1)}{_interval(figures[name])}"
        for name, label in SHARES.items()
        if name in figures
    ]
    if "mean_error" in figures:
        words.append(f"mean error {number(figures['mean_error'])}")
    return words


def _interval(figure: float | Record) -> str:
    if not isinstance(figure, Mapping) or figure["low"] is None:
        return ""
    return f" (95% interval {percent(figure['low'], 1)} to {percent(figure['high'], 1)})"


def _value(figure: float | Mapping[str, float]) -> float:
    return figure["value"] if isinstance(figure, Mapping) else figure
