"""Predictions by row, so that two evaluations can be compared on the same rows.

One JSON object per line:

    row, key      position of the row, and a hash of its content (hexadecimal), by which rows are
                  matched. A row that became several examples has a line for each
    references    the right answers; the first is the row's last turn
    nats, tokens  of the row's trained tokens
    answer, cut   the generated answer, if requested; whether it was cut at max_new_tokens
    label         the likeliest label, if accuracy was requested
    probability   of the label, among the labels; calibrated: the same (label_figures.py)
    <metric>      the figure of this row
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.examples import Example, RowFault
from veneer.data.files.json_text import whole_value
from veneer.errors import DataError
from veneer.evaluation.intervals import Counts, OfTotals, paired_difference
from veneer.evaluation.metrics.metric import Metric, ratio
from veneer.files.atomic import write_text

Line = dict[str, Any]
NAMED_ROWS = 10


def line_of(example: Example) -> Line:
    """Begins the line of an example: which row it is."""
    return {"row": str(example.ref), "key": f"{example.key:016x}"}


def write_predictions(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(path, text, replace=True)


def read_predictions(path: Path) -> list[Line]:
    """Reads predictions. Raises DataError for another kind of file."""
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
        and all(isinstance(reference, str) for reference in references)
        and type(nats) in (int, float)
        and type(tokens) is int
        and 0 <= tokens < 2**53
        and -(2**53) < nats < 2**53
    )


def lines_of_rows(lines: Sequence[Line]) -> list[list[Line]]:
    """Groups the lines by row: a conversation may have become an example for each answer."""
    return [list(group) for _, group in groupby(lines, key=lambda line: line["row"])]


def matched(lines: Sequence[Line], other_lines: Sequence[Line], file: str) -> list[Line]:
    """Returns their lines in the order of ours. DataError names rows that are not in both."""
    waiting: dict[str, list[Line]] = {}
    for line in other_lines:
        waiting.setdefault(line["key"], []).append(line)
    matches, missing = [], []
    for line in lines:
        equal_lines = waiting.get(line["key"])
        if equal_lines:
            matches.append(equal_lines.pop(0))
        else:
            missing.append(str(line["row"]))
    unmatched = [str(line["row"]) for lines in waiting.values() for line in lines]
    if missing or unmatched:
        faults = [f"{row} is not in {file}" for row in missing] + [
            f"{row} is only in {file}" for row in unmatched
        ]
        more = [f"and {len(faults) - NAMED_ROWS} more"] if len(faults) > NAMED_ROWS else []
        raise DataError(
            f"{file} is about other rows: {len(missing) + len(unmatched)} do not match",
            faults[:NAMED_ROWS] + more,
            "Evaluate both on the same --data.",
        )
    return matches


def refuse_unanswered(lines: Sequence[Line], metrics: Iterable[Metric]) -> None:
    """Raises DataError if the lines lack the answers or labels that a metric is about."""
    for metric in metrics:
        field = _field_of(metric)
        if any(not isinstance(line.get(field), str) for line in lines):
            step = f"Make them with veneer evaluate --metrics {metric.name} --predictions FILE."
            raise DataError(
                f"these predictions have no {field}s, which {metric.name} is about", next_step=step
            )


def _field_of(metric: Metric) -> str:
    return "answer" if metric.needs == "answers" else "label"


def counts_of(lines: Sequence[Line], metric: Metric) -> Counts:
    """Returns (N, K) counts of a metric from answers. DataError if the lines have none."""
    refuse_unanswered(lines, [metric])
    field = _field_of(metric)
    return metric.counts([line[field] for line in lines], [line["references"] for line in lines])


def loss_counts(lines: Sequence[Line]) -> Counts:
    """Returns (N, 2) nats and tokens."""
    return np.array([[line["nats"], line["tokens"]] for line in lines], dtype=np.float64)


def differences(
    ours: Sequence[Line], theirs: Sequence[Line], metrics: Sequence[Metric], prompts: Sequence[int]
) -> dict[str, Any]:
    """Returns, for the loss and each metric: their figure, ours minus theirs, and its 95% interval.

    The lines are of the same rows in the same order (`matched`); the interval is over these rows,
    paired. prompts: a number for each row, equal for rows with the same prompt.
    """
    sides: dict[str, tuple[Counts, Counts, OfTotals, bool]] = {
        "loss": (loss_counts(ours), loss_counts(theirs), ratio, False)
    }
    for metric in metrics:
        own_counts, other_counts = counts_of(ours, metric), counts_of(theirs, metric)
        sides[metric.name] = (own_counts, other_counts, metric.of_totals, metric.unit == "share")
    result = {}
    for name, (a, b, of_totals, share) in sides.items():
        difference, ends = paired_difference(a, b, of_totals, share=share, prompts=prompts)
        result[name] = {
            "other": of_totals(b.sum(axis=0)),
            "difference": difference,
            "interval": ends,
        }
    return result
