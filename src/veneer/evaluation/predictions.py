"""Predictions, kept row by row, so that two runs can be compared on the same rows.

One JSON object a line:

    row, key      where the row stands, and a hash of its content (hexadecimal): what rows are
                  matched by
    references    the right answers; the first one is the row's own last turn
    nats, tokens  of the row's trained tokens
    answer, cut   what the model wrote, if answers were asked for; whether it was cut at their
                  longest
    label         the likeliest label, if accuracy was asked for
    <metric>      the figure of this row
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.examples import RowFault
from veneer.data.files.json_text import whole_value
from veneer.errors import DataError
from veneer.evaluation.intervals import Counts, OfTotals, paired_difference
from veneer.evaluation.metric import Metric, ratio
from veneer.files.atomic import atomic_file

Line = dict[str, Any]
NAMED_ROWS = 10


def write_predictions(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path, replace=True) as partial:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8")


def read_predictions(path: Path) -> list[Line]:
    """Raises DataError where the file is not one of predictions."""
    try:
        texts = path.read_text(encoding="utf-8").split(
            "\n"
        )  # an answer may hold other ends of lines
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{path} cannot be read: {fault}") from None
    lines: list[Line] = []
    bad = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = whole_value(text)
        except RowFault as fault:
            bad.append(f"line {number} {fault}")
            continue
        if _is_prediction(line):
            lines.append(line)
        else:
            bad.append(f"line {number}")
    if bad or not lines:
        raise DataError(
            f"{path} holds no predictions",
            bad[:NAMED_ROWS],
            "Make it with veneer evaluate --predictions FILE.",
        )
    return lines


def _is_prediction(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    nats: Any = line.get("nats")
    tokens, references = line.get("tokens"), line.get("references")
    return (
        isinstance(line.get("row"), str)
        and isinstance(line.get("key"), str)
        and isinstance(references, list)
        and all(isinstance(each, str) for each in references)
        and type(nats) in (int, float)
        and type(tokens) is int
        and 0 <= tokens < 2**53
        and -(2**53) < nats < 2**53
    )


def matched(ours: Sequence[Line], theirs: Sequence[Line], file: str) -> list[Line]:
    """Their lines in the order of ours. Raises DataError, naming rows, unless both are over the
    same rows."""
    waiting: dict[str, list[Line]] = {}
    for line in theirs:
        waiting.setdefault(line["key"], []).append(line)
    found, missing = [], []
    for line in ours:
        same = waiting.get(line["key"])
        if same:
            found.append(same.pop(0))
        else:
            missing.append(str(line["row"]))
    left = [str(line["row"]) for lines in waiting.values() for line in lines]
    if missing or left:
        faults = [f"{row} is not in {file}" for row in missing] + [
            f"{row} is only in {file}" for row in left
        ]
        more = [f"and {len(faults) - NAMED_ROWS} more"] if len(faults) > NAMED_ROWS else []
        raise DataError(
            f"{file} is about other rows: {len(missing) + len(left)} do not match",
            faults[:NAMED_ROWS] + more,
            "Evaluate both on the same --data.",
        )
    return found


def counts_of(lines: Sequence[Line], metric: Metric) -> Counts:
    """(N, K) of a metric from written answers. Raises DataError where the lines have none."""
    field = "answer" if metric.needs == "answers" else "label"
    if any(not isinstance(line.get(field), str) for line in lines):
        raise DataError(
            f"these predictions have no {field}s, which {metric.name} is about",
            next_step=f"Make them with veneer evaluate --metrics {metric.name} --predictions FILE.",
        )
    return metric.counts([line[field] for line in lines], [line["references"] for line in lines])


def loss_counts(lines: Sequence[Line]) -> Counts:
    """(N, 2) nats and tokens."""
    return np.array([[line["nats"], line["tokens"]] for line in lines], dtype=np.float64)


def differences(
    ours: Sequence[Line], theirs: Sequence[Line], metrics: Sequence[Metric]
) -> dict[str, Any]:
    """For the loss and each metric: the other's figure, ours minus theirs, and the 95% interval of
    that.

    The lines are of the same rows in the same order (`matched`); the interval is over these rows,
    paired.
    """
    sides: dict[str, tuple[Counts, Counts, OfTotals, bool]] = {
        "loss": (loss_counts(ours), loss_counts(theirs), ratio, False)
    }
    for metric in metrics:
        own, other = counts_of(ours, metric), counts_of(theirs, metric)
        sides[metric.name] = (own, other, metric.of_totals, metric.unit == "share")
    result = {}
    for name, (a, b, of_totals, share) in sides.items():
        difference, ends = paired_difference(a, b, of_totals, share=share)
        result[name] = {
            "other": of_totals(b.sum(axis=0)),
            "difference": difference,
            "interval": ends,
        }
    return result
