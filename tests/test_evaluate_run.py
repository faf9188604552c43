"""Answers and evaluation, on a tiny random base. Where an answer must be right, it is the base's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_base
from veneer.data.examples import Example, Row, RowRef
from veneer.data.template import ChatTemplate
from veneer.errors import ConfigError, DataError
from veneer.evaluate.answers import evaluate_answers
from veneer.evaluate.run import METRICS, evaluate
from veneer.models.base import Base
from veneer.models.generate import generate

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama")


def row(line: int, question: str, expected: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return Row(ref=RowRef("rows.jsonl", line), messages=messages, tools=None, text=None)


def rows(expected: Sequence[str]) -> list[Row]:
    """Questions of lengths that go up and down, so that batching by length changes their order."""
    return [row(i + 1, "q" * (1 + 7 * i % 5) + str(i), text) for i, text in enumerate(expected)]


def own_answers(base: Base, of: Sequence[Row]) -> list[str]:
    """One row at a time, straight from generate."""
    template = ChatTemplate(base.tokenizer)
    texts = []
    for one in of:
        (ids,) = generate(base, [template.encode_prompt(one.messages[:-1])], max_new_tokens=NEW_TOKENS)
        texts.append(base.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


def example(trained: int) -> Example:
    mask = np.array([False] + [True] * trained)
    return Example(np.arange(trained + 1, dtype=np.int32), mask, RowRef("rows.jsonl", 1), key=trained)


def half_a_nat(examples: Sequence[Example]) -> tuple[float, int]:
    tokens = sum(int(e.trained.sum()) for e in examples)
    return 0.5 * tokens, tokens


EXAMPLES = [example(2), example(6)]


def run(base: Base, of: Sequence[Row], metrics: Sequence[str], **options: Any) -> dict[str, Any]:
    return evaluate(base, of, EXAMPLES, metrics, loss=half_a_nat, max_new_tokens=NEW_TOKENS, **options)


# --- answers ---


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_answers_come_in_the_rows_order_whatever_the_batch(base: Base, batch: int) -> None:
    asked = rows(["x"] * 7)
    answers = evaluate_answers(base, asked, max_new_tokens=NEW_TOKENS, batch=batch)
    assert [a.row for a in answers] == asked
    assert [a.answer for a in answers] == own_answers(base, asked)
    assert len({a.answer for a in answers}) > 3  # or the order could not be seen


def test_expected_answers_are_the_last_turns_without_white_space_around_them(base: Base) -> None:
    asked = rows([" one \n", "two"])
    answers = evaluate_answers(base, asked, max_new_tokens=1)
    assert [a.expected for a in answers] == ["one", "two"]


def test_an_expected_tool_call_is_spelt_as_the_template_spells_it(base: Base) -> None:
    call = {"type": "function", "function": {"name": "book", "arguments": {"nights": 3}}}
    messages = [
        {"role": "user", "content": "Three nights"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    (answer,) = evaluate_answers(base, [Row(RowRef("rows.jsonl", 1), messages, None, None)], max_new_tokens=1)
    assert answer.expected.startswith("<tool_call>") and answer.expected.endswith("</tool_call>")
    assert '"nights": 3' in answer.expected
    assert "im_end" not in answer.expected


def test_rows_without_an_answer_to_compare_with_are_refused_by_name(base: Base) -> None:
    unanswered = [
        Row(RowRef("rows.jsonl", line), [{"role": "user", "content": "?"}], None, None)
        for line in range(2, 20)
    ]
    text = Row(RowRef("rows.jsonl", 20), [], None, "plain text")
    with pytest.raises(DataError) as caught:
        evaluate_answers(base, [row(1, "q", "a"), *unanswered, text], max_new_tokens=1)
    assert caught.value.faults[0] == "rows.jsonl:2"
    assert caught.value.faults[-1] == "and 9 more"


def test_progress_counts_rows_up_to_all_of_them(base: Base) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_answers(
        base, rows(["x"] * 5), max_new_tokens=1, batch=2, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


# --- evaluation ---


def test_the_loss_is_per_token_and_needs_no_answers(base: Base) -> None:
    without_answers = Row(RowRef("rows.jsonl", 1), [], None, "plain text")
    assert run(base, [without_answers], []) == {"rows": 2, "loss": 0.5, "tokens": 8}


def test_every_metric_is_what_the_answers_give(base: Base) -> None:
    asked = rows(["not it"] * 8)
    for one, text in list(zip(asked, own_answers(base, asked), strict=True))[:2]:
        one.messages[-1]["content"] = text
    result = run(base, asked, ["exact_match", "json_validity"])
    assert result["exact_match"] == 2 / 8
    low, high = result["intervals"]["exact_match"]
    assert 0 <= low < 2 / 8 < high < 1
    assert result["json_validity"] == 0.0  # random bytes
    assert (result["loss"], result["tokens"]) == (0.5, 8)


def test_field_f1_counts_the_fields_of_answers_that_are_no_json_as_missed(base: Base) -> None:
    result = run(base, rows(['{"a": 1, "b": 2}'] * 3), ["field_f1"])
    assert result["field_f1"] == 0.0 and result["intervals"]["field_f1"] == [0.0, 0.0]


def test_the_result_is_the_same_every_time_and_goes_into_json(base: Base) -> None:
    asked = rows(['{"a": 1}'] * 4)
    first, second = (run(base, asked, METRICS) for _ in range(2))
    assert json.loads(json.dumps(first)) == second


def test_predictions_are_written_row_by_row(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    asked = rows(["not it", '"né"', "[1]"])
    run(base, asked, ["exact_match", "json_validity"], predictions=path)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["row"] for line in lines] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert [line["expected"] for line in lines] == ["not it", '"né"', "[1]"]
    assert [line["answer"] for line in lines] == own_answers(base, asked)
    assert all({"exact_match", "json_validity"} <= line.keys() for line in lines)
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_an_unknown_metric_is_refused_with_the_names_there_are(base: Base) -> None:
    with pytest.raises(ConfigError, match="blue") as caught:
        run(base, rows(["x"]), ["exact_match", "blue"])
    assert all(metric in str(caught.value) for metric in METRICS)


def test_field_f1_refuses_rows_whose_expected_answer_is_no_json_before_anything_is_computed(
    base: Base,
) -> None:
    def no_loss(_: Sequence[Example]) -> tuple[float, int]:
        raise AssertionError("the loss was computed first")

    asked = rows(['{"a": 1}', "plain", '{"a": 2}', "{'a': 3}"])
    with pytest.raises(DataError) as caught:
        evaluate(base, asked, EXAMPLES, ["field_f1"], loss=no_loss)
    assert caught.value.faults == ["rows.jsonl:2", "rows.jsonl:4"]


def test_nothing_to_evaluate_is_an_error_not_a_loss_of_zero(base: Base) -> None:
    with pytest.raises(DataError, match="no token"):
        evaluate(base, [], [], [], loss=half_a_nat)
