"""Rows of answers that somebody preferred or rated: layouts, faults, and their examples."""

import json

import numpy as np
import pytest

from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.cli.main import main
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, Example, RowFault, RowRef
from veneer.data.files.layouts import detect
from veneer.data.files.places import RowFile
from veneer.data.files.preferences import make_row
from veneer.data.files.sources import scan_rows
from veneer.data.large import training_data
from veneer.data.load import examine_data
from veneer.data.mismatched import mismatched
from veneer.errors import ConfigError, DataError
from veneer.serve.studio.bodies import RowChoices
from veneer.serve.studio.row_preview import layout_of

REF = RowRef("pairs.jsonl", 1)
ASK = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SHOWN = {**GOOD, "weight": 0}

PAIRS = {
    "texts": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "whole conversations with their prompt": {
        "prompt": "2 + 2?",
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "messages": [ASK, GOOD],
        "score_chosen": 8.0,
    },
    "whole conversations with their prompt as messages": {
        "prompt": [ASK],
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
    },
    "of OpenAI": {
        "input": {"messages": [ASK], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "ranked": {"prompt": "2 + 2?", "ranked": ["4", "5"]},
}


@pytest.mark.parametrize("record", PAIRS.values(), ids=PAIRS)
def test_a_pair_is_recognised_and_only_its_answers_are_learnt(record):
    row = make_row(record, REF, detect(frozenset(record), "pairs"))
    assert (row.messages, row.others) == ([ASK, GOOD], ([ASK, BAD],))


def test_pairs_of_every_layout_are_rows_of_one_file_and_pairs_beside_ratings_are_not(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in PAIRS.values()))
    rows, problems = scan_rows(file, kind="pairs")
    assert not problems
    assert {row.format for row in rows} == {"pairs", "openai_pairs", "ranked"}
    assert layout_of(RowFile("pairs.jsonl", file), RowChoices()) in {"pairs", "ranked"}
    rated = {"prompt": "2 + 2?", "completion": "5", "label": False}
    file.write_text("".join(json.dumps(row) + "\n" for row in (PAIRS["ranked"], rated)))
    _, problems = scan_rows(file, kind="ratings")
    assert [problem.code for problem in problems] == ["D108", "D108"]


def test_earlier_answers_of_both_conversations_are_their_prompt():
    record = {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}
    row = make_row(record, REF, "pairs")
    assert row.messages == [ASK, SHOWN, ASK, GOOD] and row.others == ([ASK, SHOWN, ASK, BAD],)
    record = {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}  # identical
    row = make_row(record, REF, "pairs")
    assert row.messages == [ASK, GOOD] and row.others == ([ASK, GOOD],)


def test_tools_and_a_system_column_belong_to_both_answers():
    tool = {"type": "function", "function": {"name": "add"}}
    record = {**PAIRS["of OpenAI"], "input": {"messages": [ASK], "tools": [tool]}}
    assert make_row(record, REF, "openai_pairs").tools == [tool]
    row = make_row({**PAIRS["texts"], "system": "Be brief."}, REF, "pairs")
    assert row.messages[0]["role"] == row.others[0][0]["role"] == "system"


@pytest.mark.parametrize("label", [True, "true", "True"])
def test_a_rated_answer_is_liked_or_not(label):
    record = {"prompt": "2 + 2?", "completion": "4", "label": label}
    assert detect(frozenset(record), "ratings") == "ratings"
    assert detect(frozenset(record), "answers") == "prompt_completion"
    assert make_row(record, REF, "ratings").liked is True
    assert make_row({**record, "label": False}, REF, "ratings").liked is False


FAULTS = {
    "no prompt": ("D117", {"chosen": "4", "rejected": "5"}, "have no prompt"),
    "other prompts": (
        "D117",
        {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "2 + 3?"}, BAD]},
        "begin with different messages",
    ),
    "a prompt that is not theirs": (
        "D117",
        {"prompt": "3?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "'prompt' is not the question",
    ),
    "a prompt with a system turn that they do not have": (
        "D117",
        {
            "prompt": [{"role": "system", "content": "Be brief."}, ASK],
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
        },
        "'prompt' is not the question",
    ),
    "one whole conversation": (
        "D117",
        {"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [BAD]},
        "'chosen' is a whole conversation",
    ),
    "an empty answer": (
        "D101",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": ""},
        "'rejected' is empty",
    ),
    "one answer": ("D109", {"prompt": "2 + 2?", "ranked": ["4"]}, "two answers or more"),
    "a label": ("D109", {"prompt": "a", "completion": "b", "label": 3}, "neither true nor false"),
}


@pytest.mark.parametrize(("code", "record", "said"), FAULTS.values(), ids=FAULTS)
def test_a_row_that_cannot_be_compared_is_a_fault(code, record, said):
    with pytest.raises(RowFault, match=said) as fault:
        make_row(record, REF, detect(frozenset(record), "ratings"))
    assert fault.value.code == code


# examples


def examine(tmp_path, records, kind, *, length=200, **fields):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    fields = {"train": str(file), "validation_share": 0.0, **fields}
    config = DataConfig.of(fields)
    rules = RowRules(length, Capacity(), kind=kind)
    return examine_data(config, rules, tiny_tokenizer()), config, rules


def test_the_answers_of_a_row_are_examples_with_one_prompt(tmp_path):
    ranked = {"prompt": "Which?", "ranked": ["best", "good", "bad"]}
    data, *_ = examine(tmp_path, [PAIRS["texts"], ranked], "pairs")
    assert [e.kind for e in data.train] == ["chosen", "rejected", "chosen", "rejected", "rejected"]
    assert [e.row for e in data.train] == [0, 0, 1, 1, 1]
    first, second = data.train[:2]
    start = int(first.trained.argmax())
    assert start == second.trained.argmax() and (first.ids[:start] == second.ids[:start]).all()
    assert len({e.key for e in data.train}) == 5
    assert len(data.train_rows) == 5 and data.report.rows == 2


def test_a_row_is_left_out_whole_if_one_answer_is_too_long(tmp_path):
    long = {**PAIRS["texts"], "rejected": "5" * 300}
    data, *_ = examine(tmp_path, [PAIRS["texts"], long], "pairs", long_rows="drop")
    assert len(data.train) == 2 and data.report.dropped == 1


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_prompts_of_compared_answers_are_never_trained(kind, tmp_path):
    rated = [{"prompt": f"{n}?", "completion": "4", "label": n > 0} for n in range(2)]
    rows = [PAIRS["texts"]] if kind == "pairs" else rated
    data, *_ = examine(tmp_path, rows, kind, train_on="all")
    (problem,) = (p for p in data.report.problems if p.code == "D117" and p.lines)
    assert "train_on all" in problem.message and problem.fatal and not data.train


def test_another_label_is_another_set_and_another_row(tmp_path):
    rated = [{"prompt": f"{n}?", "completion": "4", "label": n > 0} for n in range(2)]
    first, *_ = examine(tmp_path, rated, "ratings")
    rated[0]["label"] = True
    second, *_ = examine(tmp_path, rated, "ratings")
    assert first.fingerprint != second.fingerprint
    assert first.train[0].key != second.train[0].key


def test_tokens_of_pairs_are_not_put_into_files(tmp_path):
    _, config, rules = examine(tmp_path, [PAIRS["texts"]], "pairs", tokens="files")
    with pytest.raises(ConfigError, match="cannot be kept in files"):
        training_data(config, rules, tiny_tokenizer())


# mismatched answers, for kto


def example(prompt, answer, number=0):
    ids = np.array([*prompt, *answer], dtype=np.int32)
    trained = np.arange(len(ids)) >= len(prompt)
    return Example(ids, trained, REF, number, kind="chosen")


def test_every_row_gets_the_answer_of_the_next_row_with_another_prompt():
    rows = [example([1], [5]), example([1], [6]), example([2], [7, 7]), example([3], [8])]
    extra = mismatched(rows, 10)
    assert [e.ids.tolist() for e in extra] == [[1, 7, 7], [1, 7, 7], [2, 8], [3, 5]]
    assert all(e.kind == "mismatched" and e.trained[1:].all() for e in extra)
    assert [e.ids.tolist() for e in mismatched(rows[1:3], 2)] == [[1, 7], [2, 6]]
    around = mismatched([*rows[:3], example([1], [9])], 10)
    assert [e.ids.tolist() for e in around] == [[1, 7, 7], [1, 7, 7], [2, 9], [1, 7, 7]]
    assert mismatched(rows[:2], 10) is None
    assert [e.ids.tolist() for e in mismatched(rows[:1], 10, rows[1:])] == [[1, 7, 7]]


def test_rated_rows_of_one_prompt_are_refused(tmp_path):
    rows = [{"prompt": "same", "completion": str(n), "label": True} for n in range(3)]
    data, *_ = examine(tmp_path, rows, "ratings")
    assert [p.code for p in data.report.problems if p.fatal] == ["D117"]
    rows[0]["prompt"] = "other"
    data, *_ = examine(tmp_path, rows, "ratings")
    assert [e.kind for e in data.train] == ["chosen", "mismatched"] * 3
    assert [e.row for e in data.train] == [0, 0, 1, 1, 2, 2]
    assert data.sets[0].examples == 6 and data.sets[0].rows == 3
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "b", "completion": "c", "label": False}) + "\n")
    sets = [{"path": str(tmp_path / "rows.jsonl")}, {"path": str(other)}]
    same = [{"prompt": "a", "completion": str(n), "label": True} for n in range(2)]
    data, *_ = examine(tmp_path, same, "ratings", train=sets)  # a mixture of sets of one prompt
    assert [e.kind for e in data.train] == ["chosen", "mismatched"] * 2 + ["rejected", "mismatched"]
    assert [data_set.rows for data_set in data.sets] == [2, 1] and not data.report.refused
    rows = [{"prompt": str(n), "completion": str(n), "label": n > 1} for n in range(5)]
    data, *_ = examine(tmp_path, rows, "ratings", validation_share=0.2)  # one row is held out
    assert [e.kind for e in data.validation][1:] == ["mismatched"] and not data.report.refused


def test_a_format_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not hold pairs"):
        examine(tmp_path, [PAIRS["texts"]], "pairs", format="chat")


# what `data check` says of pairs


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_identical_and_swapped_pairs_are_reported_by_row(tmp_path):
    rows = [pair("a", "4", "5"), pair("b", "4", "4"), pair("a", "5", "4"), pair("c", "5", "4")]
    data, *_ = examine(tmp_path, rows, "any")
    problems = {p.code: p.lines for p in data.report.problems}
    assert (problems["D227"], problems["D228"]) == ((2,), (3,)) and not data.report.refused
    counts = data.report.pairs
    assert (counts["pairs"], counts["identical"], counts["swapped"]) == (4, 1, 1)


@pytest.mark.parametrize(("longer", "reported"), [(20, True), (13, False)])
def test_a_preference_for_length_is_reported_from_two_thirds_on(longer, reported, tmp_path):
    rows = [pair(str(n), "4" * (5 if n < longer else 1), "5" * 3) for n in range(20)]
    data, *_ = examine(tmp_path, rows, "any")
    assert ("D229" in {p.code for p in data.report.problems}) == reported
    assert data.report.pairs["longer_preferred"] == longer


def test_data_check_reads_pairs_and_counts_them(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    rows = [pair(f"question {n}", "yes", "no, never") for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(file), "--base", str(base)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pairs of answers: 6 · 0 identical · 0 swapped · longer preferred in 0%" in shown
