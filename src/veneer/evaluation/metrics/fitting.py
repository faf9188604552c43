"""Chooses the metric that fits the answers of some rows, and how long a generated answer may be."""

import json
from collections.abc import Sequence
from typing import Any

from veneer.data.examples import Row
from veneer.errors import VeneerError
from veneer.evaluation.labels import labels_of

MORE_TOKENS = 1.25
"""Longest answer that is generated, times the longest right answer."""


def metrics_for(rows: Sequence[Row]) -> tuple[str, ...]:
    """Chooses the metric of these rows' answers; none if only the loss says something."""
    answers = [_answer(row) for row in rows]
    if all(_is_json_object(answer) for answer in answers):
        return ("field_f1",)
    return ("accuracy",) if label_choices(rows) else ()


def label_choices(rows: Sequence[Row]) -> list[str]:
    """Returns the labels that are these rows' answers; none if the answers are other texts."""
    answers = [_answer(row) for row in rows]
    try:
        labels = labels_of([[answer or ""] for answer in answers])
    except VeneerError:
        return []
    return labels if all(answers) and len(labels) > 1 else []


def longest_answer(tokenizer: Any, rows: Sequence[Row]) -> int:
    """Returns how many tokens a generated answer to one of these rows may have."""
    lengths = [len(tokenizer(_answer(row) or "")["input_ids"]) for row in rows]
    return round(MORE_TOKENS * max(lengths, default=0)) + 8


def _answer(row: Row) -> str | None:
    """Returns the last answer of a row; None if it has none, a tool call, or several answers in
    order of preference."""
    last = row.messages[-1] if row.messages and not row.others else {}
    return None if last.get("tool_calls") else last.get("content")


def _is_json_object(answer: str | None) -> bool:
    try:
        return isinstance(json.loads(answer or ""), dict)
    except ValueError:
        return False
