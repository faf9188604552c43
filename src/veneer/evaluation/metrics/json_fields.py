"""Metrics for answers in JSON: validity, and how many fields are right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.evaluation.intervals import Counts
from veneer.evaluation.metrics.metric import Metric, mean_of
from veneer.files.strict_json import refuse_constant

Path = tuple[str | int, ...]


def parse_json(text: str) -> Any:
    """Parses a text that is one JSON document, else raises ValueError.

    NaN and Infinity, which Python's parser accepts, are not JSON.
    """
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:  # thousands of open brackets from a model that repeats itself
        raise ValueError("nested too deeply") from None


def json_validity(answer: str) -> bool:
    """Returns whether the text is one JSON document and nothing else."""
    try:
        parse_json(answer)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class FieldCounts:
    """Counts fields of one answer. matched: in both, with the same value."""

    matched: int
    expected: int
    answered: int


def field_counts(expected: str, answer: str) -> FieldCounts:
    """Compares two JSON texts field by field.

    A field is a path and its value: `{"a": {"b": 1}, "c": [2, 3]}` has a.b = 1, c[0] = 2 and c[1] =
    3. An empty object or list is a value. Numbers are equal by value (1 is 1.0), texts to the
    letter, and true is not 1. An answer that is not JSON has no fields. Raises ValueError if
    `expected` is not JSON.
    """
    expected_fields = _leaves(parse_json(expected))
    try:
        answered_fields = _leaves(parse_json(answer))
    except ValueError:
        answered_fields = {}
    matched = sum(
        path in answered_fields and _same(value, answered_fields[path])
        for path, value in expected_fields.items()
    )
    return FieldCounts(matched, len(expected_fields), len(answered_fields))


def _leaves(value: Any) -> dict[Path, Any]:
    leaves: dict[Path, Any] = {}
    open_values: list[tuple[Path, Any]] = [((), value)]
    while open_values:
        path, value = open_values.pop()
        if isinstance(value, dict) and value:
            open_values += [((*path, name), inner) for name, inner in value.items()]
        elif isinstance(value, list) and value:
            open_values += [((*path, index), inner) for index, inner in enumerate(value)]
        else:
            leaves[path] = value
    return leaves


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def field_line(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Returns [matched, expected + answered] against the reference that it agrees with best."""
    every = [field_counts(reference, answer) for reference in references]
    lines = [(float(c.matched), float(c.expected + c.answered)) for c in every]
    return max(lines, key=lambda line: line[0] / line[1] if line[1] else 0.0)


def field_f1(totals: Counts) -> float:
    """Computes micro F1 over all fields of all answers: 2 matched / (expected + answered); 0
    without any field."""
    return float(2 * totals[0] / totals[1]) if totals[1] else 0.0


def _not_json(references: Sequence[str]) -> str | None:
    if all(json_validity(reference) for reference in references):
        return None
    return "compares JSON, and the expected answer of these rows is not JSON"


JSON_VALIDITY = mean_of("json_validity", lambda answer, references: json_validity(answer))
FIELD_F1 = Metric("field_f1", field_line, field_f1, refuses=_not_json)
