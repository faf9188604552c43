"""What an answer is worth: exact match, JSON validity, field F1, and an interval around a mean.

Pure functions of texts and numbers; nothing here knows of models or rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
"""Bootstrap draws: the ends of a 95% interval then move by about a twentieth of its width."""

Path = tuple[str | int, ...]


def exact_match(expected: str, answer: str) -> bool:
    """Equal but for white space: each run of it counts as one space, and at the ends as none."""
    return expected.split() == answer.split()


def parse_json(text: str) -> Any:
    """The value of a text that is one JSON document and nothing else; raises ValueError otherwise.

    NaN and Infinity, which Python's parser lets through, are not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:  # thousands of open brackets: a model that repeats itself
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def json_validity(answer: str) -> bool:
    """Whether the text is one JSON document and nothing else."""
    try:
        parse_json(answer)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class FieldCounts:
    """Fields of one answer: `matched` are in both, with the same value."""

    matched: int
    expected: int
    answered: int


def field_counts(expected: str, answer: str) -> FieldCounts:
    """Compare two JSON texts field by field.

    A field is a path and its value: `{"a": {"b": 1}, "c": [2, 3]}` has a.b = 1, c[0] = 2 and c[1] = 3.
    An empty object or list is a value. Numbers are equal by value (1 is 1.0), texts to the letter, and
    true is not 1. An answer that is not JSON has no fields. Raises ValueError if `expected` is not JSON.
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


def field_f1(counts: Iterable[FieldCounts]) -> float:
    """Micro F1 over all fields of all answers: 2 matched / (expected + answered); 0 without any field."""
    counts = list(counts)
    return f1_of_totals([sum(c.matched for c in counts), sum(c.expected + c.answered for c in counts)])


def f1_of_totals(totals: ArrayLike) -> float:
    """2 matched / (expected + answered) from [matched, expected + answered]."""
    matched, fields = np.asarray(totals, dtype=np.float64)
    return float(2 * matched / fields) if fields else 0.0


def bootstrap_interval(
    values: ArrayLike,
    seed: int,
    *,
    level: float = 0.95,
    statistic: Callable[[NDArray[np.float64]], float] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over rows: (low, high).

    values     one number per row, or one line of numbers per row (N, K)
    statistic  of a resample of the rows, of the shape of `values`; their mean by default
    Rows are drawn with replacement RESAMPLES times; the same seed gives the same interval.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    rows = np.asarray(values, dtype=np.float64)
    if not len(rows):
        raise ValueError("no rows to resample")
    random = np.random.default_rng(seed)
    draws = [statistic(rows[random.integers(0, len(rows), len(rows))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
