"""Metrics: pure functions of texts, each against values worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.evaluation.metrics.exact import exact_match
from veneer.evaluation.metrics.json_fields import (
    FieldCounts,
    field_counts,
    field_f1,
    field_line,
    json_validity,
)
from veneer.evaluation.metrics.metric import Metric, ratio
from veneer.evaluation.metrics.registry import METRICS, find_metrics
from veneer.evaluation.metrics.rouge import common_subsequence
from veneer.evaluation.metrics.user_function import function_from_file

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
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
def test_exact_match_ignores_how_much_white_space_there_is(
    expected: str, answer: str, equal: bool
) -> None:
    assert exact_match(answer, [expected]) is equal


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
def test_fields_are_paths_with_their_values(
    expected: str, answer: str, counts: tuple[int, int, int]
) -> None:
    assert field_counts(expected, answer) == FieldCounts(*counts)


def test_field_counts_refuse_an_expected_text_that_is_not_json() -> None:
    with pytest.raises(ValueError, match=r"."):
        field_counts("not JSON", "{}")


def figure(metric: Metric, answers: list[str], references: list[list[str]]) -> float:
    return metric.of_totals(metric.counts(answers, references).sum(axis=0))


def test_field_f1_weighs_fields_not_answers() -> None:
    nine = json.dumps({str(i): i for i in range(9)})
    others = json.dumps({str(i): -1 for i in range(9)})
    found = figure(METRICS["field_f1"], ['{"a": 1}', others], [['{"a": 1}'], [nine]])
    assert found == 0.1  # the mean over answers would be 0.5


def test_field_f1_counts_an_unparsable_answers_fields_as_missed() -> None:
    expected = '{"a": 1, "b": 2}'
    assert figure(METRICS["field_f1"], [expected, "no"], [[expected]] * 2) == 2 * 2 / (4 + 2)


def test_field_f1_of_nothing_is_zero_and_the_best_reference_counts() -> None:
    assert field_f1(np.zeros(2)) == 0.0
    assert field_line('{"a": 1}', ['{"a": 2, "b": 3}', '{"a": 1, "b": 3}']) == (1, 3)


@given(JSON)
def test_field_f1_of_a_document_with_itself_is_one(document: object) -> None:
    text = json.dumps(document)
    assert figure(METRICS["field_f1"], [json.dumps(document, indent=1)], [[text]]) == 1.0


@given(JSON, JSON)
def test_field_counts_are_symmetric_and_never_match_more_than_there_is(
    a: object, b: object
) -> None:
    there = field_counts(json.dumps(a), json.dumps(b))
    back = field_counts(json.dumps(b), json.dumps(a))
    assert there == FieldCounts(back.matched, back.answered, back.expected)
    assert 0 <= there.matched <= min(there.expected, there.answered)


# --- several references, patterns, the user's own function ---


def test_any_reference_may_be_the_right_one() -> None:
    assert exact_match("b", ["a", " b "]) and not exact_match("c", ["a", "b"])


def test_a_pattern_without_a_group_is_looked_for_in_the_answer() -> None:
    (metric,) = find_metrics([r"regex:^SELECT\b"])
    assert figure(metric, ["SELECT 1", "select 1", "x SELECT"], [["?"]] * 3) == 1 / 3


def test_a_pattern_with_a_group_compares_what_it_finds_last() -> None:
    (metric,) = find_metrics([r"regex:####\s*(-?[\d.]+)"])
    answers = ["so #### 1, no: #### 42 ", "#### 41", "42", "#### 7"]
    references = [["blah #### 42"], ["#### 42"], ["#### 42"], ["#### 6", "#### 7"]]
    assert figure(metric, answers, references) == 2 / 4


@pytest.mark.parametrize("pattern", ["regex:(", "regex:(a)(b)"])
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError):
        find_metrics([pattern])


def test_a_users_function_from_a_file_is_averaged(tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text(
        "def closeness(answer, references):\n    return len(answer) / len(references[0])\n"
    )
    (metric,) = find_metrics([function_from_file(f"{file}:closeness")])
    assert metric.name == "closeness"
    assert figure(metric, ["ab", "abcd"], [["abcd"], ["abcd"]]) == 0.75


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(a, r): return 1", "g", "no function 'g'"),
        ("exit('no')", "f", "SystemExit: no"),
        ("def f(a, r): exit(0)", "f", "SystemExit"),
        ("import nowhere_at_all", "f", "cannot be run: ModuleNotFoundError"),
        ("def f(a, r): return float('nan')", "f", "gave nan"),
        ("def f(a, r): return a.missing", "f", "failed: AttributeError"),
    ],
)
def test_a_users_function_that_does_not_work_is_told_without_a_traceback(
    tmp_path: Path, text: str, name: str, message: str
) -> None:
    file = tmp_path / "score.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_metrics([function_from_file(f"{file}:{name}")])[0].counts(["a"], [["b"]])


def test_unknown_metrics_are_told_together_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        find_metrics(["rougel", "exact_match", "exact_mach"])
    assert "rougel, exact_mach" in str(caught.value) and "did you mean rougeL?" in str(caught.value)


# --- BLEU, chrF and ROUGE against the libraries' own figures ---

ANSWERS = [
    "The Blue Spice is a coffee shop in the city centre.",
    "a cheap place near the river , not family friendly",
    "Alimentum!",
    "",
    "It's rated 5 out of 5; kids are welcome — naïve café.",
]
REFERENCES = [
    [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in city centre.",
    ],
    ["Near the river there is a cheap place that is not family-friendly.", "It is a cheap place."],
    ["Alimentum is in the city centre.", "Alimentum."],
    ["Nothing was said.", "Silence"],
    ["It has a rating of 5 out of 5 and kids are welcome.", "Rated 5 out of 5, it's a naïve café."],
]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize(
    "rows", [slice(None), slice(0, 2), slice(3, 4)], ids=["all", "two", "an empty answer"]
)
def test_bleu_and_chrf_are_sacrebleus_corpus_scores(name: str, rows: slice) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    columns = [list(column) for column in zip(*REFERENCES[rows], strict=True)]
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name](
        ANSWERS[rows], columns
    ).score
    assert figure(METRICS[name], ANSWERS[rows], REFERENCES[rows]) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([name])
    for answer, references in zip(ANSWERS, REFERENCES, strict=True):
        for reference in references:
            theirs = scorer.score(reference, answer)[name].fmeasure
            assert figure(METRICS[name], [answer], [[reference]]) == pytest.approx(
                theirs, abs=1e-12
            )
    best = [
        max(scorer.score(r, a)[name].fmeasure for r in rs)
        for a, rs in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert figure(METRICS[name], ANSWERS, REFERENCES) == pytest.approx(sum(best) / len(best))


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_the_common_subsequence_is_the_longest_there_is(a: list[str], b: list[str]) -> None:
    def is_within(part: tuple[str, ...], whole: list[str]) -> bool:
        rest = iter(whole)
        return all(word in rest for word in part)

    longest = max(
        (len(part) for n in range(len(a) + 1) for part in combinations(a, n) if is_within(part, b)),
        default=0,
    )
    assert common_subsequence(a, b) == longest


def test_a_ratio_is_the_first_sum_by_the_second_and_0_of_nothing() -> None:
    assert ratio(np.array([3.0, 4.0, 9.0])) == 0.75
    assert ratio(np.array([3.0, 0.0])) == 0.0


def test_two_functions_of_one_name_are_refused_as_one_would_hide_the_other() -> None:
    def own(answer: str, references: Sequence[str]) -> float:
        return 1.0

    with pytest.raises(ConfigError, match="several metrics are called '<lambda>'"):
        find_metrics([lambda answer, references: 1.0, lambda answer, references: 0.0])
    assert len(find_metrics([own, own])) == 1
