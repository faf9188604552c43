"""Answers and evaluation, on a tiny random base. Where an answer must be right, it is the base's
own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.helpers import filled_lora, make_examples
from tests.support.models.routed import Routed
from tests.support.tiny import tiny_base
from veneer.data.batching import make_batch
from veneer.data.examples import Example, Row, RowRef
from veneer.data.template.template import ChatTemplate
from veneer.decoding.generate import generate
from veneer.errors import ConfigError, DataError, DivergedError
from veneer.evaluation.answers import evaluate_answers
from veneer.evaluation.evaluation import EvaluationOptions, evaluate
from veneer.evaluation.general import BUILT_IN, WINDOW, general_documents, general_examples
from veneer.evaluation.intervals import Counts
from veneer.evaluation.label_scores import label_examples, label_scores
from veneer.evaluation.labels import labels_of, read_labels
from veneer.evaluation.metrics.registry import METRICS, find_metrics
from veneer.evaluation.predictions import matched, read_predictions, write_predictions
from veneer.models.frozen_base import FrozenBase
from veneer.models.likelihood import _nats, example_nats
from veneer.models.step import prepare

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return tiny_base("llama")


def row(line: int, question: str, expected: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return Row(ref=RowRef("rows.jsonl", line), messages=messages, tools=None, text=None)


def rows(expected: Sequence[str]) -> list[Row]:
    """Questions of lengths that go up and down, so that batching by length changes their order."""
    return [row(i + 1, "q" * (1 + 7 * i % 5) + str(i), text) for i, text in enumerate(expected)]


def own_answers(base: FrozenBase, of: Sequence[Row]) -> list[str]:
    """One row at a time, straight from generate."""
    template = ChatTemplate(base.tokenizer)
    texts = []
    for one in of:
        (ids,) = generate(
            base, [template.encode_prompt(one.messages[:-1])], max_new_tokens=NEW_TOKENS
        )
        texts.append(base.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


def example(trained: int, line: int) -> Example:
    mask = np.array([False] + [True] * trained)
    return Example(
        np.arange(trained + 1, dtype=np.int32), mask, RowRef("rows.jsonl", line), key=trained
    )


def half_a_nat(examples: Sequence[Example]) -> Counts:
    return np.array([[0.5 * e.trained.sum(), e.trained.sum()] for e in examples], dtype=np.float64)


def run(
    base: FrozenBase, of: Sequence[Row], metrics: Sequence[str], **options: Any
) -> dict[str, Any]:
    examples = [example(2 + 4 * i, i + 1) for i in range(len(of))]
    nats = options.pop("nats", half_a_nat)
    choices = EvaluationOptions(metrics=find_metrics(metrics), max_new_tokens=NEW_TOKENS, **options)
    return evaluate(base, of, examples, choices, nats=nats)


def own_nats(base: FrozenBase) -> Any:
    paths = prepare(base.model)
    return lambda examples: example_nats(Routed(base.model, paths), examples, batch=4)


# --- answers ---


def test_answers_come_in_the_rows_order(base: FrozenBase) -> None:
    asked = rows(["x"] * 7)
    answers = evaluate_answers(base, asked, max_new_tokens=NEW_TOKENS)
    assert [a.row for a in answers] == asked
    assert [a.answer for a in answers] == own_answers(base, asked)
    assert len({a.answer for a in answers}) > 3  # or the order could not be seen


def test_expected_answers_are_the_last_turns_without_white_space_around_them(
    base: FrozenBase,
) -> None:
    asked = rows([" one \n", "two"])
    answers = evaluate_answers(base, asked, max_new_tokens=1)
    assert [a.expected for a in answers] == ["one", "two"]


def test_an_expected_tool_call_is_spelt_as_the_template_spells_it(base: FrozenBase) -> None:
    call = {"type": "function", "function": {"name": "book", "arguments": {"nights": 3}}}
    messages = [
        {"role": "user", "content": "Three nights"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    (answer,) = evaluate_answers(
        base, [Row(RowRef("rows.jsonl", 1), messages, None, None)], max_new_tokens=1
    )
    assert answer.expected.startswith("<tool_call>") and answer.expected.endswith("</tool_call>")
    assert '"nights": 3' in answer.expected
    assert "im_end" not in answer.expected


def test_rows_without_an_answer_to_compare_with_are_refused_by_name(base: FrozenBase) -> None:
    unanswered = [
        Row(RowRef("rows.jsonl", line), [{"role": "user", "content": "?"}], None, None)
        for line in range(2, 20)
    ]
    text = Row(RowRef("rows.jsonl", 20), [], None, "plain text")
    with pytest.raises(DataError) as caught:
        evaluate_answers(base, [row(1, "q", "a"), *unanswered, text], max_new_tokens=1)
    assert caught.value.faults[0] == "rows.jsonl:2"
    assert caught.value.faults[-1] == "and 9 more"


def test_progress_counts_rows_up_to_all_of_them(base: FrozenBase) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_answers(
        base, rows(["x"] * 5), max_new_tokens=1, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(n, 5) for n in range(1, 6)]


# --- evaluation ---


def test_the_loss_is_per_token_and_needs_no_answers(base: FrozenBase) -> None:
    without_answers = Row(RowRef("rows.jsonl", 1), [], None, "plain text")
    found = run(base, [without_answers] * 2, [])
    assert found.pop("perplexity") == pytest.approx(np.exp(0.5))
    assert found == {"rows": 2, "loss": 0.5, "tokens": 8, "intervals": {}, "units": {}}


def test_every_metric_is_what_the_answers_give(base: FrozenBase) -> None:
    asked = rows(["not it"] * 8)
    for one, text in list(zip(asked, own_answers(base, asked), strict=True))[:2]:
        one.messages[-1]["content"] = text
    result = run(base, asked, ["exact_match", "json_validity"])
    assert result["exact_match"] == 2 / 8
    low, high = result["intervals"]["exact_match"]
    assert 0 <= low < 2 / 8 < high < 1
    assert result["json_validity"] == 0.0  # random bytes
    assert result["loss"] == 0.5


def test_field_f1_counts_the_fields_of_answers_that_are_no_json_as_missed(base: FrozenBase) -> None:
    result = run(base, rows(['{"a": 1, "b": 2}'] * 3), ["field_f1"])
    assert result["field_f1"] == 0.0 and result["intervals"]["field_f1"][0] == 0.0
    assert 0.5 < result["intervals"]["field_f1"][1] < 1  # of three rows


def test_the_result_is_the_same_every_time_and_goes_into_json(base: FrozenBase) -> None:
    answers = ['{"a": 1}', "2", "3", "4"]
    first, second = (run(base, rows(answers), list(METRICS), labels=answers) for _ in range(2))
    assert json.loads(json.dumps(first)) == second


@pytest.mark.parametrize(
    ("dtype", "near"),
    [(torch.bfloat16, 1e-6), (torch.float16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)],
    ids=str,
)
def test_the_nats_of_given_logits_are_at_least_as_precise_as_float32(
    dtype: torch.dtype, near: float
) -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )
    targets = torch.arange(7)
    expected = -torch.log_softmax(logits.double(), dim=1)[targets, targets]
    torch.testing.assert_close(_nats(logits, targets), expected, rtol=near, atol=near)


def test_predictions_are_written_row_by_row(base: FrozenBase, tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    asked = rows(["not it", '"né"', "[1]"])
    run(base, asked, ["exact_match", "json_validity"], predictions=path)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["row"] for line in lines] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert [line["references"] for line in lines] == [["not it"], ['"né"'], ["[1]"]]
    assert [line["answer"] for line in lines] == own_answers(base, asked)
    assert all({"exact_match", "json_validity"} <= line.keys() for line in lines)
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_an_unknown_metric_is_refused_with_the_names_there_are(base: FrozenBase) -> None:
    with pytest.raises(ConfigError, match="blue") as caught:
        run(base, rows(["x"]), ["exact_match", "blue"])
    assert all(metric in str(caught.value) for metric in METRICS)


def nothing_computed(_: Sequence[Example]) -> Counts:
    raise AssertionError("something was computed first")


def test_field_f1_refuses_rows_whose_expected_answer_is_no_json_before_anything_is_computed(
    base: FrozenBase,
) -> None:
    asked = rows(['{"a": 1}', "plain", '{"a": 2}', "{'a': 3}"])
    with pytest.raises(DataError) as caught:
        run(base, asked, ["field_f1"], nats=nothing_computed)
    assert caught.value.faults == ["rows.jsonl:2", "rows.jsonl:4"]


def test_nothing_to_evaluate_is_an_error_not_a_loss_of_zero(base: FrozenBase) -> None:
    with pytest.raises(DataError, match="no token"):
        evaluate(base, [], [], EvaluationOptions(), nats=lambda examples: np.zeros((0, 2)))


def test_further_references_of_a_row_count_too(base: FrozenBase) -> None:
    asked = rows(["not it"] * 3)
    (second,) = own_answers(base, asked[1:2])
    asked[1] = replace(asked[1], references=("nor this", f" {second} "))
    assert run(base, asked, ["exact_match"])["exact_match"] == pytest.approx(1 / 3)


# --- the loss row by row ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_nats_of_each_example_are_those_of_the_model_alone(family: str, batch: int) -> None:
    base = tiny_base(family)
    examples = make_examples(7)
    found = example_nats(Routed(base.model, prepare(base.model)), examples, batch=batch)
    for one, (nats, tokens) in zip(examples, found, strict=True):
        logits = (
            base.model(input_ids=torch.tensor(one.ids[None].astype(np.int64))).logits[0].double()
        )
        chances = torch.log_softmax(logits, dim=-1)
        expected = -sum(chances[t - 1, one.ids[t]].item() for t in np.flatnonzero(one.trained))
        assert nats == pytest.approx(expected, rel=1e-4) and tokens == one.trained.sum()


# --- labels ---

LABELS = ["card", "card_lost", "refund", "a refund that is late"]


def likeliest_labels(
    tokenizer: Any, of: Sequence[Row], labels: Sequence[str], **options: Any
) -> list[str]:
    scores = label_scores(tokenizer, of, labels, **options)
    return [labels[number] for number in scores.argmax(axis=1)]


def slow_choice(base: FrozenBase, row: Row, label_list: Sequence[str], *, per_token: bool) -> str:
    """Every label alone, from the model's own logits."""
    template = ChatTemplate(base.tokenizer)
    prompt = template.encode_prompt(row.messages[:-1])
    scores = []
    for label in label_list:
        own = base.tokenizer(label)["input_ids"] + [257, 198]  # <|im_end|> and a new line
        logits = base.model(input_ids=torch.tensor([prompt + own])).logits[0].double()
        chances = torch.log_softmax(logits, dim=-1)
        total = sum(chances[len(prompt) + i - 1, token].item() for i, token in enumerate(own))
        scores.append(total / len(own) if per_token else total)
    return label_list[int(np.argmax(scores))]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_the_label_chosen_is_that_of_a_slow_reference(family: str, per_token: bool) -> None:
    base = tiny_base(family)
    asked = rows(["card"] * 8)
    expected = [slow_choice(base, one, LABELS, per_token=per_token) for one in asked]
    nats = own_nats(base)
    assert (
        likeliest_labels(base.tokenizer, asked, LABELS, nats=nats, length_normalised=per_token)
        == expected
    )


def test_length_normalisation_can_change_the_choice(base: FrozenBase) -> None:
    asked = rows(["card"] * 8)
    nats = own_nats(base)
    plain, normal = (
        likeliest_labels(base.tokenizer, asked, LABELS, nats=nats, length_normalised=n)
        for n in (False, True)
    )
    assert plain != normal


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_choose_no_label_and_are_refused_by_row(
    base: FrozenBase, value: float
) -> None:
    asked = rows(["card"] * 3)

    def broken(examples: Sequence[Example]) -> Counts:
        found = half_a_nat(examples)
        found[[str(each.ref) == "rows.jsonl:2" for each in examples], 0] = value
        return found

    for ask in (
        lambda: likeliest_labels(base.tokenizer, asked, LABELS, nats=broken),
        lambda: run(base, asked, [], nats=broken),
    ):
        with pytest.raises(DivergedError, match="not finite") as caught:
            ask()
        assert caught.value.faults == ["rows.jsonl:2"] and "float32" in (
            caught.value.next_step or ""
        )


def test_accuracy_is_the_share_of_rows_whose_label_is_right(base: FrozenBase) -> None:
    asked = rows(["card"] * 6)
    chosen = likeliest_labels(base.tokenizer, asked, LABELS, nats=own_nats(base))
    for one, label in list(zip(asked, chosen, strict=True))[:2]:
        one.messages[-1]["content"] = label
    for one, label in list(zip(asked, chosen, strict=True))[2:]:
        one.messages[-1]["content"] = next(each for each in LABELS if each != label)
    found = run(base, asked, ["accuracy"], labels=LABELS, nats=own_nats(base))
    assert found["accuracy"] == pytest.approx(2 / 6)
    assert found["labels"]["own"] is False and found["labels"]["names"] == LABELS
    assert sum(cell["rows"] for cell in found["labels"]["confusion"]) == 6
    own = run(base, rows(["card", "refund"] * 3), ["accuracy"], nats=own_nats(base))
    assert own["labels"]["own"] is True and own["labels"]["names"] == ["card", "refund"]


def test_all_labels_of_a_row_are_computed_behind_one_prompt(base: FrozenBase) -> None:
    template = ChatTemplate(base.tokenizer)
    asked = row(1, "a question that is long enough to matter", "card")
    examples = label_examples(template, asked, LABELS)
    batch = make_batch(examples, packed=True, share_prompt=True, device=base.device)
    assert batch.layout is not None
    assert batch.layout.groups[0].prompt >= len(template.encode_prompt(asked.messages[:-1])) - 1


def test_a_right_answer_that_is_no_label_is_refused_by_row(base: FrozenBase) -> None:
    with pytest.raises(DataError, match="none of the labels") as caught:
        run(base, rows(["card", "other"]), ["accuracy"], labels=LABELS, nats=nothing_computed)
    assert caught.value.faults == ["rows.jsonl:2"]


def test_labels_come_from_a_file_a_list_or_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("a b\n\nc, d\na b\n")
    assert read_labels(str(file)) == ["a b", "c, d"]
    assert read_labels("x, y") == ["x", "y"]
    assert labels_of([["b"], ["a"], ["b"]]) == ["a", "b"]
    assert labels_of([["b"], ["a"], ["c"]] * 2) == ["a", "b", "c"]
    for free in (
        [["b"], ["a"], ["c"]],
        [["b"], ["a" * 61]] * 9,
    ):  # the likeliest of these says little
        with pytest.raises(ConfigError, match="--labels A,B,C"):
            labels_of(free)
    for bad in ([["a"]], [[str(i)] for i in range(500)]):
        with pytest.raises(ConfigError):
            labels_of(bad)


def test_labels_may_be_longer_than_a_files_name_and_a_file_of_them_may_be_anything(
    tmp_path: Path,
) -> None:
    many = [f"label {number}" for number in range(2000)]
    assert read_labels(",".join(many)) == many
    with pytest.raises(ConfigError, match="1 labels"):
        read_labels("\0")
    for name, content in {
        "cp1252": b"caf\xe9\nb\n",
        "empty": b"",
        "one": b"a\na\n",
        "NUL": b"\0",
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(ConfigError):
            read_labels(str(file))
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_labels(str(tmp_path / "bom")) == ["a", "b"]
    with pytest.raises(ConfigError, match="not UTF-8"):  # as the words of a command line come
        read_labels("caf\udce9,b")
    with pytest.raises(ConfigError):  # a folder is no file of labels: its name is one label
        read_labels(str(tmp_path))


# --- two evaluations of the same rows ---


def test_two_evaluations_are_compared_row_by_row(base: FrozenBase, tmp_path: Path) -> None:
    asked = rows(["not it"] * 6)
    run(base, asked, ["exact_match"], predictions=tmp_path / "a.jsonl")
    text = (tmp_path / "a.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines[:3]:
        line["answer"] = "not it"
        line["nats"] += line["tokens"]
    reordered = tmp_path / "b.jsonl"
    reordered.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)), "utf-8")
    found = run(base, asked, ["exact_match"], against=reordered)["against"]
    assert found["exact_match"]["other"] == 0.5 and found["exact_match"]["difference"] == -0.5
    low, high = found["exact_match"]["interval"]
    assert (
        -1 <= low < -0.5 < 0 < high
    )  # three of six rows do not show that one is worse: a sign test gives 0.25
    tokens = [line["tokens"] for line in lines]
    assert found["loss"]["difference"] == pytest.approx(-sum(tokens[:3]) / sum(tokens))


def test_rows_with_the_same_prompt_are_one_observation_of_every_interval(
    base: FrozenBase, tmp_path: Path
) -> None:
    """Answers to two of the four questions became better: as certain as four rows, not sixteen."""
    asked = [row(i + 1, f"question {i // 4}", "it") for i in range(16)]
    run(base, asked, ["exact_match"], predictions=tmp_path / "a.jsonl")
    lines = read_predictions(tmp_path / "a.jsonl")
    for line in lines[:8]:
        line["answer"] = "it"
        line["nats"] += line["tokens"]
    write_predictions(tmp_path / "b.jsonl", lines)
    found = run(base, asked, ["exact_match"], against=tmp_path / "b.jsonl")
    low, high = found["against"]["exact_match"]["interval"]
    assert low < -0.5 < 0 < high
    assert found["intervals"]["exact_match"][1] > 0.4  # sixteen rows, all wrong: 0.21


def test_answers_of_one_conversation_are_one_observation_and_one_row(base: FrozenBase) -> None:
    """As where a template drops earlier reasoning, and a row becomes an example for each answer."""
    asked = [row(i // 4 + 1, f"question {i}", "it") for i in range(16)]
    examples = [replace(example(2 + i, i // 4 + 1), row=i // 4) for i in range(16)]
    losses = np.stack([[0.1, 0.9, 0.2, 0.7] for _ in range(4)]).T.ravel()  # alike within a row

    def nats(of: Sequence[Example]) -> Counts:
        tokens = np.array([e.trained_tokens for e in of], dtype=np.float64)
        return np.stack([losses * tokens, tokens], axis=1)

    found = evaluate(base, asked, examples, EvaluationOptions(), nats=nats)
    apart = evaluate(
        base, asked, [replace(e, row=None) for e in examples], EvaluationOptions(), nats=nats
    )
    assert (found["rows"], apart["rows"]) == (4, 16) and found["loss"] == apart["loss"]
    widths = [np.ptp(result["intervals"]["loss"]) for result in (found, apart)]
    assert widths[0] > 1.5 * widths[1]


def test_predictions_hold_any_answer(tmp_path: Path) -> None:
    line = {
        "row": "x",
        "key": "k",
        "references": ["\x85 \u2028\u2029 \x0b\x0c\x1c\x00"],
        "nats": 1.0,
        "tokens": 2,
    }
    write_predictions(tmp_path / "a.jsonl", [line, {**line, "answer": "\r\n\u2028"}])
    assert read_predictions(tmp_path / "a.jsonl") == [line, {**line, "answer": "\r\n\u2028"}]


def test_predictions_of_other_rows_are_refused_by_name(base: FrozenBase, tmp_path: Path) -> None:
    run(base, rows(["a"] * 3), [], predictions=tmp_path / "a.jsonl")
    late: dict[str, Any] = {"against": tmp_path / "a.jsonl", "nats": nothing_computed}
    with pytest.raises(DataError, match="other rows: 1 do not match") as caught:
        run(base, rows(["a"] * 2), [], **late)
    assert "rows.jsonl:3 is only in" in caught.value.faults[0]
    with pytest.raises(DataError, match="no answers"):
        run(base, rows(["a"] * 3), ["exact_match"], **late)


def test_a_function_that_fails_is_told_before_answers_or_keeps_them(
    base: FrozenBase, tmp_path: Path
) -> None:
    def broken(answer: str, references: list[str]) -> float:
        return answer.missing  # type: ignore[attr-defined,no-any-return]

    def picky(answer: str, references: list[str]) -> float:
        return 1 / references.count(answer)

    asked, file = rows(["a"] * 3), tmp_path / "a.jsonl"
    with pytest.raises(ConfigError, match="broken failed: AttributeError"):
        metrics = [broken]
        run(base, asked, metrics, predictions=file, nats=nothing_computed)
    assert not file.exists()
    with pytest.raises(ConfigError, match="picky failed: ZeroDivisionError"):
        run(base, asked, [picky], predictions=file)  # type: ignore[list-item]
    assert [line["answer"] for line in read_predictions(file)] == own_answers(base, asked)


def test_every_line_that_is_no_prediction_is_named_and_the_bounds_of_its_numbers_are_exact(
    tmp_path: Path,
) -> None:
    file, good = (
        tmp_path / "a.jsonl",
        {"row": "x", "key": "k", "references": [], "nats": 1.0, "tokens": 2},
    )

    def read(*changes: dict[str, Any] | str) -> list[Any]:
        lines = [
            change if isinstance(change, str) else json.dumps({**good, **change})
            for change in changes
        ]
        file.write_text("\n".join(lines) + "\n")
        return read_predictions(file)

    within = [{"tokens": 0}, {"tokens": 2**53 - 1}, {"nats": 2**53 - 1}, {"nats": 1 - 2**53}]
    assert read(*within) == [{**good, **change} for change in within]
    for beyond in ({"tokens": -1}, {"tokens": 2**53}, {"nats": 2**53}, {"nats": -(2**53)}):
        with pytest.raises(DataError) as caught:
            read({}, "{", beyond)
        assert caught.value.faults[0].startswith("line 2 ") and caught.value.faults[1:] == [
            "line 3"
        ]
    with pytest.raises(DataError) as caught:
        read(*[{"row": 1}] * 11)
    assert caught.value.faults == [f"line {number}" for number in range(1, 11)]


def test_rows_that_do_not_match_are_named_up_to_ten(tmp_path: Path) -> None:
    def lines(*keys: int) -> list[dict[str, Any]]:
        return [{"row": f"rows:{key}", "key": str(key)} for key in keys]

    assert matched(lines(2, 1, 1), lines(1, 2, 1), "b") == lines(2, 1, 1)
    for ours, theirs, faults in (
        (lines(1, 2), lines(2, 3), ["rows:1 is not in b", "rows:3 is only in b"]),
        (lines(1, *range(2, 11)), lines(), [f"rows:{n} is not in b" for n in range(1, 11)]),
        (
            lines(),
            lines(*range(12)),
            [*(f"rows:{n} is only in b" for n in range(10)), "and 2 more"],
        ),
    ):
        with pytest.raises(DataError) as caught:
            matched(ours, theirs, "b")
        assert caught.value.faults == faults


def test_a_file_that_holds_no_predictions_is_refused_first(
    base: FrozenBase, tmp_path: Path
) -> None:
    good = {"row": "x", "key": "k", "references": ["a"], "nats": 1.0, "tokens": 2}
    wrong = [
        {"references": [1]},
        {"references": "a"},
        {"nats": True},
        {"nats": 10**400},
        {"tokens": -1},
        {"tokens": 1.5},
    ]
    lines = [json.dumps({**good, **change}) for change in wrong]
    lines += [
        '{"row": "x"}',
        "[" * 600 + "]" * 600,
        json.dumps({**good, "nats": float("nan")}),
        "\0",
        "7",
    ]
    for content in [*(line.encode() for line in lines), b"", b"\xff"]:
        (tmp_path / "a.jsonl").write_bytes(content + b"\n")
        with pytest.raises(DataError, match=r"no predictions|cannot be read"):
            run(base, rows(["a"]), [], against=tmp_path / "a.jsonl", nats=nothing_computed)


# --- forgetting ---


def test_the_text_that_ships_is_varied_and_whole(base: FrozenBase) -> None:
    documents = general_documents(BUILT_IN)
    assert len(documents) >= 10 and 6000 < sum(map(len, documents)) < 9000
    examples, owners = general_examples(documents, base.tokenizer, None)
    assert sorted(set(owners)) == list(range(len(documents)))
    assert max(len(e.ids) for e in examples) <= WINDOW
    lost = sum(len(e.ids) for e in examples) - sum(
        len(base.tokenizer(d)["input_ids"]) for d in documents
    )
    assert lost >= -len(documents)  # a last window of one token predicts nothing


def test_forgetting_is_the_loss_after_minus_before_on_the_users_own_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One document.\n---\nAnother, which is\nlonger.\n---\n\n", "utf-8")
    base = tiny_base("llama")
    nats = own_nats(base)
    filled_lora(base)
    plain = run(base, rows(["a"]), [], general=str(file), nats=nats)["general"]
    assert "forgetting" not in plain and plain["documents"] == 2
    base.routing.active = (("a", 1.0),)
    found = run(base, rows(["a"]), [], general=str(file), nats=nats)["general"]
    assert found["before"] == pytest.approx(plain["loss"])
    assert found["forgetting"] == pytest.approx(found["loss"] - plain["loss"]) != 0
    assert base.routing.active == (("a", 1.0),)


def test_general_text_of_which_nothing_can_be_predicted_is_refused_first(
    base: FrozenBase, tmp_path: Path
) -> None:
    (tmp_path / "general.txt").write_text("a\n---\nb")
    with pytest.raises(DataError, match="nothing to predict"):
        run(base, rows(["a"]), [], general=str(tmp_path / "general.txt"), nats=nothing_computed)


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("---\n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(DataError, match=name):
            general_documents(str(tmp_path / name))
