"""From a file to a data set: split, lengths, checks, report."""

from __future__ import annotations

import gc
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data import encoder
from veneer.data import load as load_module
from veneer.data.checks.check import render_sample
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, Row, RowRef, row_key
from veneer.data.load import DataSet, examine_data, load_data
from veneer.data.split import BY_THRESHOLD, split_by_shares
from veneer.errors import DataError

ANSWER_AT = len(
    "|user\nq000<\n|assistant\n"
)  # ids in front of the answer to a question like q000, in bytes


def pair(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **more},
        ]
    }


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


SETTINGS: dict[str, Any] = {
    "validation": None,
    "validation_share": 0.0,
    "format": "auto",
    "train_on": "assistant",
    "long_rows": "refuse",
    "length": 2048,
    "capacity": Capacity(),
}


def settings_of(train: Any, changes: dict[str, Any]) -> list[DataConfig]:
    own = {
        name: value
        for name, value in {**SETTINGS, **changes}.items()
        if name in DataConfig.model_fields
    }
    return [DataConfig.of({"train": train, **own})]


def rest_of(changes: dict[str, Any]) -> dict[str, Any]:
    given = {**SETTINGS, "tokenizer": tiny_tokenizer(), **changes}
    rest = {name: value for name, value in given.items() if name not in DataConfig.model_fields}
    asked = {field.name: rest.pop(field.name) for field in fields(RowRules) if field.name in rest}
    return {"rules": RowRules(**asked), **rest}


def load(train: Any, **changes: Any) -> DataSet:
    return load_data(*settings_of(train, changes), **rest_of(changes))


def examine(train: Any, **changes: Any) -> DataSet:
    return examine_data(*settings_of(train, changes), **rest_of(changes))


def codes(data: DataSet) -> dict[str, tuple[int, ...]]:
    return {problem.code: problem.lines for problem in data.report.problems}


def chat_row(question: str, answer: str, line: int = 1) -> Row:
    messages = pair(question, answer)["messages"]
    return Row(RowRef("rows.jsonl", line), messages)


def test_a_row_becomes_an_example_with_exact_ids_mask_and_place(tmp_path: Path) -> None:
    data = load(write(tmp_path / "rows.jsonl", pair("q000", "yes")))
    (example,) = data.train
    assert (example.ids.dtype, example.trained.dtype) == (np.int32, np.bool_)
    assert np.flatnonzero(example.trained).tolist() == list(
        range(ANSWER_AT, ANSWER_AT + len("yes<\n"))
    )
    assert str(example.ref) == f"{tmp_path / 'rows.jsonl'}:1"
    assert example.key == row_key(chat_row("q000", "yes", line=9))
    assert 0 <= example.key < 2**63


def test_keys_change_with_the_content_alone() -> None:
    rows = [chat_row("a", "b"), chat_row("a", "c"), chat_row("c", "b")]
    rows += [
        Row(RowRef("x", 1), rows[0].messages, [{"name": "f"}]),
        Row(RowRef("x", 1), [], None, "a", "text"),
    ]
    assert len({row_key(row) for row in rows}) == 5


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=5), unique=True, min_size=1), st.floats(0, 1), st.data()
)
def test_an_added_row_moves_one_other_at_most_and_a_higher_share_none_back(
    questions: list[str], share: float, data: st.DataObject
) -> None:
    rows = [chat_row(question, "a", line) for line, question in enumerate(questions)]
    left, held_out = split_by_shares(rows, [share])
    assert abs(len(held_out) - share * len(rows)) <= 0.5 + 1e-9
    assert [row for row in rows if row in held_out] == held_out and [
        row for row in rows if row in left
    ] == left
    some = data.draw(st.permutations(rows))[: data.draw(st.integers(0, len(rows)))]
    moved = [row for row in some if (row in held_out) != (row in split_by_shares(some, [share])[1])]
    assert len(moved) <= len(rows) - len(some)
    assert all(row in held_out for row in split_by_shares(rows, [share / 2])[1])
    assert {str(row.ref) for row in split_by_shares(rows[::-1], [share])[1]} == {
        str(row.ref) for row in held_out
    }


@pytest.mark.parametrize(("count", "held_out"), [(9, 0), (20, 1), (40, 2), (150, 7), (4000, 200)])
def test_the_share_held_out_is_the_share_asked_for(
    tmp_path: Path, count: int, held_out: int
) -> None:
    file = write(tmp_path / "rows.jsonl", *(pair(f"q{n}") for n in range(count)))
    assert len(examine(file, validation_share=0.05).validation) == held_out


def test_a_prompt_is_never_on_two_sides_and_sets_are_held_out_each(tmp_path: Path) -> None:
    rows = [chat_row(f"q{n}", f"a{k}") for n in range(200) for k in range(2)]
    parts = [{str(row.messages[0]) for row in part} for part in split_by_shares(rows, [0.1, 0.2])]
    assert [len(part) for part in parts] == [140, 20, 40] and len(set.union(*parts)) == 200
    assert split_by_shares(rows, [0.0]) == [rows, []]
    one = write(tmp_path / "one.jsonl", *(pair(f"q{n}") for n in range(100)))
    other = write(tmp_path / "other.jsonl", *(pair(f"q{n}", "b") for n in range(50, 150)))
    data = examine([{"path": one}, {"path": other}], validation_share=0.1)
    assert [size.rows for size in data.held] == [10, 10] and [size.rows for size in data.sets] == [
        90,
        90,
    ]
    assert "D210" not in codes(data)  # a prompt of both is on the same side in both


def test_a_prompt_with_too_many_rows_is_passed_over(tmp_path: Path) -> None:
    rows = [chat_row("q58" if n < 60 else f"q{n}", f"a{n}") for n in range(120)]
    held_out = split_by_shares(rows, [0.05])[1]
    assert len(held_out) == 6 and all(row.messages[0]["content"] != "q58" for row in held_out)


def test_a_run_that_began_before_holds_out_what_it_held_out(tmp_path: Path) -> None:
    # By the hash alone; q58 is one of the questions that a share of 0.05 holds out, with all its
    # answers.
    crowded = write(
        tmp_path / "crowded.jsonl",
        *(pair("q58" if n < 60 else f"q{n}", f"a{n}") for n in range(120)),
    )
    data = examine(crowded, validation_share=0.05, held_out_by=BY_THRESHOLD)
    assert len(data.validation) >= 60
    assert "D216" in codes(data)
    assert not data.report.refused
    even = write(tmp_path / "even.jsonl", *(pair(f"q{n}") for n in range(120)))
    held = examine(even, validation_share=0.05, held_out_by=BY_THRESHOLD)
    assert "D216" not in codes(held) and len(held.validation) != len(
        examine(even, validation_share=0.05).validation
    )


def test_held_out_rows_stand_in_the_order_of_their_examples(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl", *(pair(f"q{n:03}", "x" * (1 + n % 60)) for n in range(100))
    )
    data = load(file, validation_share=0.5, length=70, long_rows="drop")
    assert len(data.validation) > 10
    assert [row_key(row) for row in data.validation_rows] == [
        example.key for example in data.validation
    ]
    assert [row.ref for row in data.validation_rows] == [example.ref for example in data.validation]


def test_rows_longer_than_length_are_refused_dropped_or_cut(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", pair("q000"), pair("q001", "x" * 50), pair("q002"))
    length = ANSWER_AT + 10
    with pytest.raises(DataError) as error:
        load(file, length=length)
    assert f"rows.jsonl:2  longer than {length} tokens (the longest: {ANSWER_AT + 52})" in str(
        error.value
    )
    dropped = load(file, length=length, long_rows="drop")
    assert [example.ref.line for example in dropped.train] == [1, 3]
    assert (dropped.report.too_long, dropped.report.dropped, dropped.report.truncated) == (1, 1, 0)
    cut = load(file, length=length, long_rows="cut")
    assert [len(example.ids) for example in cut.train] == [ANSWER_AT + 5, length, ANSWER_AT + 5]
    assert cut.train[1].trained.sum() == 10
    assert (cut.report.truncated, cut.report.answers, cut.report.answers_stopped) == (1, 3, 2)
    assert cut.report.stop_token_trained == "partly"


def test_rows_that_would_lose_their_whole_answer_are_refused_and_left_out_only_on_request(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "rows.jsonl", pair("q000"), pair("q" * 100), pair("q001"))
    with pytest.raises(
        DataError, match=r"D204 .*rows\.jsonl:2  cut at 60 tokens, the row loses its whole answer"
    ):
        load(file, length=60, long_rows="cut")
    assert len(load(file, length=60, long_rows="drop").train) == 2


def test_rows_longer_than_the_models_positions_are_a_problem_of_their_own(tmp_path: Path) -> None:
    """Whatever `length` says: 2,048 is more than GPT-2 has, and a model with rotary positions
    computes on in silence."""
    file = write(tmp_path / "rows.jsonl", *(pair("q", "a" * n) for n in (1, 90, 80, 5)))
    room = Capacity(positions=100)
    with pytest.raises(
        DataError, match=r"D217 .*:2-3 .*longer than the model's 100 positions"
    ) as caught:
        load(file, capacity=room)
    assert "rows.jsonl:2: 112 tokens; " in str(caught.value) and ":3: 102 tokens" in str(
        caught.value
    )
    assert caught.value.next_step.startswith("Choose a base with more positions, or choose")
    for length in (100, 101, 2048):
        assert codes(examine(file, capacity=room, length=length))[
            "D203" if length == 100 else "D217"
        ] == (2, 3)
    dropped, cut = (load(file, capacity=room, long_rows=way) for way in ("drop", "cut"))
    assert [len(e.ids) for e in dropped.train] == [23, 27]
    assert [len(e.ids) for e in cut.train] == [23, 100, 100, 27]
    assert cut.report.length == 100 and codes(cut)["D217"] == (2, 3)
    assert load(file, capacity=room, long_rows="cut", length=50).report.length == 50


def test_ids_that_the_model_has_no_row_for_are_named_with_their_rows(tmp_path: Path) -> None:
    """A token that was added to the tokenizer alone: `vocab_size` leaves it out, and the loss reads
    beside its row."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("Tools:", "<new>")
    file = write(
        tmp_path / "rows.jsonl", pair("a"), *({**pair(q), "tools": [{"name": q}]} for q in "bc")
    )
    known = Capacity(tokens=259)
    with pytest.raises(
        DataError,
        match=r"D218 .*:2-3 \(2 rows\)  token 259 \('<new>'\) is not one of the model's 259",
    ):
        load(file, tokenizer=tokenizer, capacity=known)
    assert "D218" not in codes(examine(file, tokenizer=tokenizer, capacity=Capacity(tokens=260)))
    with pytest.raises(DataError, match="D218"):
        load(
            write(tmp_path / "first.jsonl", pair("a")),
            validation=file,
            tokenizer=tokenizer,
            capacity=known,
        )


def test_a_set_whose_rows_are_all_left_out_as_too_long_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", pair("a"), pair("b"))
    with pytest.raises(DataError, match=r"D205 .*all are too long and left out"):
        load(file, length=10, long_rows="drop")


def test_held_out_rows_without_a_trained_token_are_refused_too(tmp_path: Path) -> None:
    train = write(tmp_path / "rows.jsonl", pair("a"))
    with pytest.raises(DataError, match=r"D205 .*held\.jsonl:2"):
        load(train, validation=write(tmp_path / "held.jsonl", pair("b"), pair("c", weight=0)))


def test_rows_without_a_trained_token_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", pair("q000"), pair("q001", weight=0))
    with pytest.raises(DataError, match=r"D205 .*rows\.jsonl:2  nothing in the row is trained on"):
        load(file)
    with pytest.raises(DataError, match="no token would be trained on"):
        load(write(tmp_path / "none.jsonl", pair("q001", weight=0)))


def test_hardly_any_trained_tokens_are_refused_if_cutting_is_the_reason_and_reported_if_not(
    tmp_path: Path,
) -> None:
    long = "q" * 900
    whole = examine(write(tmp_path / "whole.jsonl", pair(long, "y")))
    assert (whole.report.refused, "D206" in codes(whole)) == (False, True)
    cut = write(tmp_path / "cut.jsonl", *(pair(long + str(n), "y" * 500) for n in range(3)))
    with pytest.raises(DataError, match=r"D206 .*trained on: 3 rows are cut at 925 tokens"):
        load(cut, length=925, long_rows="cut")


def test_a_set_whose_rows_are_all_held_out_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", pair("q000"))
    with pytest.raises(DataError, match="all are held out"):
        load(file, validation_share=0.999999)


def test_the_report_counts_what_the_ids_and_masks_hold(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s"}
    chat = pair("q001<|im_end|>")
    chat["messages"].insert(0, system)
    file = write(tmp_path / "rows.jsonl", pair("q000"), pair("q000"), chat)
    held_out = write(tmp_path / "held.jsonl", pair("q000", "no"), pair("q9"))
    data = load(file, validation=held_out)
    report = data.report
    assert (report.rows, report.validation_rows, report.formats) == (3, 2, {"chat": 5})
    assert (
        report.tokens
        == sum(len(example.ids) for example in data.train)
        == sum(report.tokens_by_role.values())
    )
    assert report.trained_tokens == 15 == report.trained_by_role["assistant"]
    assert report.trained_by_role == {"user": 0, "assistant": 15, "system": 0}
    assert report.tokens_by_role["system"] == len("|system\ns<\n")
    assert sum(rows for _, rows in report.histogram) == 3
    assert (report.stop_token_trained, report.stop_tokens) == ("yes", ["<|im_end|>"])
    assert (report.duplicates, report.control_rows, report.leaked, report.fully_masked) == (
        1,
        1,
        1,
        0,
    )
    assert codes(data) == {"D208": (3,), "D209": (2,), "D210": (1,)}
    assert not report.refused
    assert json.loads(json.dumps(report.to_dict()))["stop_token_trained"] == "yes"


def test_a_template_that_never_ends_an_answer_is_reported(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>\\n' }}{%- endfor", "\\n' }}{%- endfor")
    data = examine(write(tmp_path / "rows.jsonl", pair("q000")), tokenizer=tokenizer)
    assert data.report.stop_token_trained == "no"
    assert "D207" in codes(data)


def test_examine_reports_what_load_refuses_and_reads_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps(pair("q000")) + "\nnot json\n" + json.dumps(pair("q001", " ")) + "\n"
    )
    data = examine(str(file))
    assert codes(data) == {"D103": (2,), "D101": (3,), "D212": ()}
    assert (len(data.train), data.report.refused) == (1, True)
    with pytest.raises(DataError) as error:
        load(str(file))
    assert len(error.value.faults) == 2
    with pytest.raises(DataError, match=r"D100 .*absent\.jsonl"):
        examine(str(tmp_path / "absent.jsonl"))


def test_every_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    chat = pair("q001")
    chat["messages"].insert(0, {"role": "system", "content": "s"})
    file = write(tmp_path / "rows.jsonl", chat, pair("q000"), chat)
    with pytest.raises(
        DataError,
        match=r"D201 .*rows.jsonl:1, 3 \(2 rows\)  the chat template refuses it: no system",
    ):
        load(file, tokenizer=tokenizer)


def test_the_fingerprint_is_of_the_tokens_and_their_masks(tmp_path: Path) -> None:
    records = [pair("q000"), pair("q001")]
    first = load(write(tmp_path / "a.jsonl", *records))
    assert first.fingerprint == load(write(tmp_path / "b.jsonl", *records)).fingerprint
    others = [
        load(write(tmp_path / "c.jsonl", *reversed(records))),
        load(write(tmp_path / "d.jsonl", *records), train_on="all"),
        load(
            write(tmp_path / "e.jsonl", *records[:1]),
            validation=write(tmp_path / "f.jsonl", *records[1:]),
        ),
    ]
    assert len({first.fingerprint, *(data.fingerprint for data in others)}) == 4


def test_a_sample_shows_the_row_in_stretches_of_equal_mask_and_role(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (example,) = load(write(tmp_path / "rows.jsonl", pair("é", "🙂"))).train
    pieces = render_sample(tokenizer, example)
    assert pieces == [
        ("<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n", False, "user"),
        ("🙂<|im_end|>\n", True, "assistant"),
    ]
    assert "".join(text for text, _, _ in pieces) == tokenizer.decode(example.ids)


def test_garbage_is_looked_for_between_stretches_of_rows_and_as_before_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", *(pair(f"question {number}") for number in range(20)))
    own, seen, asked = load_module.ChatTemplate.encode_rows, [], []

    def encode_rows(self: Any, rows: Any, **more: Any) -> Any:
        seen.append(gc.isenabled())
        return own(self, rows, **more)

    monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(load_module.ChatTemplate, "encode_rows", encode_rows)
    real = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *which: asked.append(which) or real(*which))
    assert gc.isenabled()
    assert len(load(path).train) == 20
    assert seen[-3:] == [False] * 3 and asked == [(1,)] * 3 and gc.isenabled()
    with pytest.raises(DataError):
        load(str(tmp_path / "gone.jsonl"))
    assert gc.isenabled()
    gc.disable()
    try:
        load(path)
        assert not gc.isenabled()
    finally:
        gc.enable()
