"""Metrics: pure functions of texts, each against values worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.evaluate.metrics import (
    FieldCounts,
    bootstrap_interval,
    exact_match,
    f1_of_totals,
    field_counts,
    field_f1,
    json_validity,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("expected", "answer", "equal"),
    [
        ("a b", " a\n\tb ", True),
        ("a b", "ab", False),
        ("a b", "A b", False),
        ("", " \n", True),
        ("a", "", False),
        ("a", "a a", False),
    ],
)
def test_exact_match_ignores_how_much_white_space_there_is(expected: str, answer: str, equal: bool) -> None:
    assert exact_match(expected, answer) is equal


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        (" [1] \n", True),
        ("3", True),
        ('"text"', True),
        ("", False),
        ("{'a': 1}", False),
        ('{"a": 1} and more', False),
        ('{"a": 1}{"a": 1}', False),
        ("NaN", False),
        ('{"a": -Infinity}', False),
        ("[" * 100_000, False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_is_valid_only_as_one_whole_document(text: str, valid: bool) -> None:
    assert json_validity(text) is valid


@pytest.mark.parametrize(
    ("expected", "answer", "counts"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', (2, 2, 2)),
        ('{"a": 1, "b": "x"}', '{"a": 1, "b": "y"}', (1, 2, 2)),
        ('{"a": 1, "b": "x"}', '{"a": 1}', (1, 2, 1)),
        ('{"a": 1}', '{"a": 1, "b": 2, "c": 3}', (1, 1, 3)),
        ('{"a": {"b": 1, "c": 2}}', '{"a": {"b": 1, "c": 3}}', (1, 2, 2)),
        ('{"a": {"b": 1}}', '{"a.b": 1}', (0, 1, 1)),  # a dot in a name is not a path
        ('{"a": [1, 2, 3]}', '{"a": [1, 3, 2]}', (1, 3, 3)),
        ('{"0": 1}', "[1]", (0, 1, 1)),  # nor is a place in a list a name
        ('{"a": {}, "b": []}', '{"a": {}, "b": []}', (2, 2, 2)),
        ('{"a": {}}', '{"a": []}', (0, 1, 1)),
        ('{"a": 1}', '{"a": 1.0}', (1, 1, 1)),
        ('{"a": 1}', '{"a": true}', (0, 1, 1)),
        ('{"a": 0}', '{"a": false}', (0, 1, 1)),
        ('{"a": 1}', '{"a": "1"}', (0, 1, 1)),
        ('{"a": null}', "{}", (0, 1, 1)),  # {} is itself one field, at the root
        ('"x"', '"x"', (1, 1, 1)),
        ('{"a": 1, "b": 2}', "not JSON", (0, 2, 0)),
        ('{"a": 1}', '{"a": 1', (0, 1, 0)),
    ],
)
def test_fields_are_paths_with_their_values(expected: str, answer: str, counts: tuple[int, int, int]) -> None:
    assert field_counts(expected, answer) == FieldCounts(*counts)


def test_field_counts_refuse_an_expected_text_that_is_not_json() -> None:
    with pytest.raises(ValueError, match=r"."):
        field_counts("not JSON", "{}")


def test_field_f1_weighs_fields_not_answers() -> None:
    counts = [FieldCounts(1, 1, 1), FieldCounts(0, 9, 9)]
    assert field_f1(counts) == 0.1  # the mean over answers would be 0.5


def test_field_f1_counts_an_unparsable_answers_fields_as_missed() -> None:
    counts = [field_counts('{"a": 1, "b": 2}', '{"a": 1, "b": 2}'), field_counts('{"a": 1, "b": 2}', "no")]
    assert field_f1(counts) == 2 * 2 / (4 + 2)


def test_field_f1_of_nothing_is_zero() -> None:
    assert field_f1([]) == 0.0 and f1_of_totals([0, 0]) == 0.0


@given(JSON)
def test_field_f1_of_a_document_with_itself_is_one(document: object) -> None:
    text = json.dumps(document)
    assert field_f1([field_counts(text, json.dumps(document, indent=1))]) == 1.0


@given(JSON, JSON)
def test_field_counts_are_symmetric_and_never_match_more_than_there_is(a: object, b: object) -> None:
    there = field_counts(json.dumps(a), json.dumps(b))
    back = field_counts(json.dumps(b), json.dumps(a))
    assert there == FieldCounts(back.matched, back.answered, back.expected)
    assert 0 <= there.matched <= min(there.expected, there.answered)


def test_the_interval_holds_the_mean_and_has_the_width_of_theory() -> None:
    values = [1.0] * 40 + [0.0] * 60
    low, high = bootstrap_interval(values, seed=0)
    width = 2 * 1.96 * math.sqrt(0.4 * 0.6 / 100)
    assert low < 0.4 < high
    assert math.isclose(high - low, width, rel_tol=0.15)  # 1000 draws place each end to about 5%


def test_a_higher_level_gives_a_wider_interval() -> None:
    values = np.random.default_rng(0).normal(size=200)
    narrow, wide = (
        bootstrap_interval(values, seed=0, level=0.5),
        bootstrap_interval(values, seed=0, level=0.99),
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_values_that_are_all_equal_have_no_width() -> None:
    assert bootstrap_interval([0.25] * 7, seed=0) == (0.25, 0.25)


def test_the_interval_of_a_ratio_resamples_rows_with_all_their_counts() -> None:
    table = [[2.0, 4.0]] * 30  # every resample has F1 = 1
    interval = bootstrap_interval(table, seed=0, statistic=lambda rows: f1_of_totals(rows.sum(axis=0)))
    assert interval == (1.0, 1.0)


def test_no_rows_have_no_interval() -> None:
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_interval([], seed=0)
