"""The demo's task: reading, splitting, rendering and scoring calls. No network, no model."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from veneer.data import bfcl
from veneer.data.bfcl import (
    BfclEntry,
    Score,
    answer,
    parse_entries,
    read_bfcl,
    score,
    signature,
    split,
    to_messages,
)
from veneer.errors import CorruptFileError, SourceError


def call(
    properties: dict[str, Any],
    accepted: dict[str, list[Any]],
    *,
    required: tuple[str, ...] = (),
    question: str = "Book it.",
    name: str = "rooms.book",
) -> BfclEntry:
    """A Call from a schema and its accepted values, through the parser of the real files."""
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    entry = {
        "id": "x_0",
        "question": [[{"role": "user", "content": question}]],
        "function": [
            {"name": name, "description": "Book a room. At once.", "parameters": parameters}
        ],
    }
    truth = {"id": "x_0", "ground_truth": [{name: accepted}]}
    return parse_entries(json.dumps(entry).encode(), json.dumps(truth).encode())[0]


def accepts(entry: BfclEntry, arguments: dict[str, Any]) -> bool:
    return score(
        entry, json.dumps({"name": entry.function, "arguments": arguments})
    ).arguments_accepted


ROOM = call(
    {
        "city": {"type": "string"},
        "nights": {"type": "integer"},
        "price": {"type": "float"},
        "quiet": {"type": "boolean"},
        "kind": {"type": "string", "enum": ["single", "double"]},
        "extras": {"type": "array", "items": {"type": "string"}},
        "beds": {"type": "array", "items": {"type": "float"}},
        "guest": {
            "type": "dict",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        },
    },
    {
        "city": ["New York City, NY", "New York"],
        "nights": [3],
        "price": [80.0, 100.5],
        "quiet": [True, ""],
        "kind": ["", "single"],
        "extras": [["pool", "gym"], ["gym", "pool"]],
        "beds": [[1.0, 2.5]],
        "guest": [{"name": ["O'Hara"], "age": [40, ""]}],
    },
    required=("city", "nights"),
    question="Three nights in New York for O'Hara.",
)
RIGHT: dict[str, Any] = {
    "city": "New York",
    "nights": 3,
    "price": 80.0,
    "extras": ["pool", "gym"],
    "beds": [1.0, 2.5],
    "guest": {"name": "O'Hara"},
}


# --- reading ---


def wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "bfcl_eval.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_wheel_whose_files_changed_is_refused_and_both_are_named(tmp_path: Path) -> None:
    questions = b"x" * bfcl._QUESTIONS.size_bytes  # the size is right, the content is not
    path = wheel(tmp_path, {bfcl._QUESTIONS.path: questions, bfcl._ANSWERS.path: b"short"})
    with pytest.raises(CorruptFileError) as caught:
        read_bfcl(path)
    assert len(caught.value.faults) == 2
    assert "sha256" in caught.value.faults[0]
    assert "5 bytes, expected 63,627" in caught.value.faults[1]
    assert "pip download --no-deps bfcl-eval==" in caught.value.next_step


def test_a_wheel_without_the_files_is_refused_and_both_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read_bfcl(wheel(tmp_path, {"other/METADATA": b""}))
    assert [fault.split(" is not")[0] for fault in caught.value.faults] == [
        bfcl._QUESTIONS.path,
        bfcl._ANSWERS.path,
    ]


@pytest.mark.parametrize(
    "content", [None, b"", b"not a zip at all"], ids=["absent", "empty", "no zip"]
)
def test_what_is_no_wheel_is_refused_with_its_path(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "w.whl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=r"cannot read .*w\.whl"):
        read_bfcl(path)


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    members = {
        m.path: bytes(i % 251 for i in range(m.size_bytes))
        for m in (bfcl._QUESTIONS, bfcl._ANSWERS)
    }
    path = wheel(tmp_path, members)
    damaged = bytearray(path.read_bytes())
    damaged[200:260] = b"\xff" * 60  # inside the first member's compressed bytes
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match="cannot read"):
        read_bfcl(path)


def test_the_schema_is_read_with_its_nesting() -> None:
    parameters = {parameter.name: parameter for parameter in ROOM.parameters}
    assert [name for name, parameter in parameters.items() if parameter.required] == [
        "city",
        "nights",
    ]
    assert parameters["kind"].choices == ("single", "double")
    assert parameters["beds"].element is not None and parameters["beds"].element.type == "float"
    assert [field.name for field in parameters["guest"].fields] == ["name", "age"]


# --- splitting ---


def calls_of(names: list[str]) -> list[BfclEntry]:
    return [call({}, {}, name=name, question=f"Question {i}") for i, name in enumerate(names)]


def test_a_split_has_exactly_the_rows_asked_and_no_function_on_both_sides() -> None:
    entries = calls_of([f"f{i // 3}" for i in range(60)] + [f"g{i}" for i in range(10)])
    for rows in (0, 1, 20, 40, 69):
        trained, held_out = split(entries, rows)
        assert len(trained) == rows and len(held_out) == 70 - rows
        assert not {c.function for c in trained} & {c.function for c in held_out}
        assert {c.question for c in trained} | {c.question for c in held_out} == {
            c.question for c in entries
        }


def test_a_split_depends_on_names_alone_and_keeps_the_order() -> None:
    names = [f"f{i}" for i in range(40)]
    trained, held_out = split(calls_of(names), 30)
    again, _ = split(calls_of(names[::-1]), 30)
    assert {c.function for c in trained} == {c.function for c in again}
    for side in (trained, held_out):
        assert [c.function for c in side] == sorted((c.function for c in side), key=names.index)
    # From the hashes of the names: changes only if the rule does, and every published figure with
    # it.
    assert [c.function for c in held_out][:3] == ["f2", "f5", "f13"]


# --- rows ---


def test_a_row_is_the_fixed_instruction_the_signature_with_the_question_and_the_call() -> None:
    system, user, assistant = to_messages(ROOM)
    assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]
    assert system["content"] == to_messages(call({}, {}))[0]["content"]
    assert user["content"].splitlines() == [signature(ROOM), ROOM.question]
    assert json.loads(assistant["content"]) == {"name": "rooms.book", "arguments": RIGHT}


def test_every_learnt_call_is_accepted() -> None:
    assert score(ROOM, answer(ROOM)) == Score(True, True, True)


def test_a_value_that_the_question_spells_out_is_learnt_and_otherwise_the_first() -> None:
    entry = call(
        {"c": {"type": "string"}}, {"c": ["Paris, France", "Paris"]}, question="Fly to Paris"
    )
    assert json.loads(answer(entry))["arguments"] == {"c": "Paris"}
    entry = call(
        {"c": {"type": "string"}}, {"c": ["CDG", "Paris"]}, question="Fly to the city of light"
    )
    assert json.loads(answer(entry))["arguments"] == {"c": "CDG"}


def test_a_required_parameter_is_learnt_even_where_the_file_lets_it_be_left_out() -> None:
    entry = call({"n": {"type": "integer"}}, {"n": ["", 2]}, required=("n",))
    assert json.loads(answer(entry))["arguments"] == {"n": 2}


def test_the_signature_is_one_line_with_types_choices_and_what_is_optional() -> None:
    text = signature(ROOM)
    assert "\n" not in text
    assert text.startswith("rooms.book(city: string, nights: integer, price: float = optional, ")
    assert '"single"|"double"' in text
    assert "[float]" in text
    assert "{name: string, age: integer}" in text
    assert "Book a room." in text and "At once" not in text


# --- scoring ---


def test_the_accepted_call_scores_in_full() -> None:
    assert accepts(ROOM, RIGHT)


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"city": "new york"}, True),
        ({"city": "New York City NY"}, True),
        ({"city": "Boston"}, False),
        ({"city": 5}, False),
        ({"nights": 3.0}, False),  # declared as a whole number
        ({"nights": True}, False),
        ({"nights": "3"}, False),
        ({"price": 80}, True),
        ({"price": 100.5}, True),
        ({"price": 81}, False),
        ({"price": float("1e308") * 10}, False),
        ({"price": 10**400}, False),
        ({"quiet": True}, True),
        ({"quiet": False}, False),
        ({"quiet": 1}, False),
        ({"kind": "single"}, True),
        ({"kind": "double"}, False),
        ({"extras": ["gym", "pool"]}, True),
        ({"extras": ["GYM", "pool."]}, True),
        ({"extras": ["gym"]}, False),
        ({"extras": "pool"}, False),
        ({"beds": [1, 2.5]}, True),  # whole numbers for floats inside lists too
        ({"beds": [True, 2.5]}, False),
        ({"beds": [2.5, 1.0]}, False),
        ({"guest": {"name": "ohara"}}, False),  # the apostrophe is not among the ignored characters
        ({"guest": {"name": 'O"Hara', "age": 40}}, True),  # but either quotation mark will do
        ({"guest": {"name": "O'Hara", "age": 41}}, False),
        ({"guest": {"age": 40}}, False),
        ({"guest": {"name": "O'Hara", "shoe": 9}}, False),
        ({"guest": "O'Hara"}, False),
        ({"unknown": 1}, False),
    ],
    ids=str,
)
def test_one_argument_decides(change: dict[str, Any], accepted: bool) -> None:
    assert accepts(ROOM, RIGHT | change) == accepted


@pytest.mark.parametrize("missing", RIGHT)
def test_an_expected_argument_that_is_missing_is_not_accepted(missing: str) -> None:
    assert not accepts(ROOM, {name: value for name, value in RIGHT.items() if name != missing})


def test_a_parameter_that_may_be_left_out_is_not_expected() -> None:
    assert not {"quiet", "kind"} & RIGHT.keys()  # RIGHT scores in full, as shown above
    assert not accepts(
        call({"n": {"type": "integer"}}, {"n": [2, ""]}, required=("n",)), {}
    )  # required


def test_a_value_of_the_accepted_ones_type_passes_another_declared_type() -> None:
    venue = call({"v": {"type": "string"}}, {"v": ["", True]})
    assert accepts(venue, {"v": True}) and not accepts(venue, {"v": "yes"})
    anything = call({"d": {"type": "any"}}, {"d": ["my_data"]})
    assert accepts(anything, {"d": "my_data"}) and not accepts(anything, {"d": 1})


def test_fields_of_objects_in_lists_each_have_their_accepted_values() -> None:
    entry = call(
        {"where": {"type": "array", "items": {"type": "dict"}}},
        {
            "where": [
                [
                    {"field": ["age"], "value": ["25", "25 years"]},
                    {"field": ["job"], "value": ["cook"]},
                ]
            ]
        },
    )
    right = [{"field": "age", "value": "25 years"}, {"field": "Job", "value": "cook"}]
    assert accepts(entry, {"where": right})
    assert not accepts(entry, {"where": right[::-1]})
    assert not accepts(entry, {"where": right[:1]})
    assert not accepts(entry, {"where": [right[0], {"field": "job"}]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I would call rooms.book.",
        '{"name": "rooms.book"}',
        '{"name": "rooms.book", "arguments": [1]}',
        '{"name": "rooms.book", "arguments": {}, "why": "because"}',
        '{"name": ["rooms.book"], "arguments": {}}',
        '[{"name": "rooms.book", "arguments": {}}]',
        '{"name": "rooms.book", "arguments": {"price": NaN}}',
        '{"name": "rooms.book", "arguments": {"price": 1}} Done.',
        "[" * 100_000,
        "9" * 10_000,
    ],
    ids=lambda text: text[:40],
)
def test_what_is_not_one_call_and_nothing_else_does_not_parse(text: str) -> None:
    assert score(ROOM, text) == Score(False, False, False)


def test_another_function_parses_but_scores_no_further() -> None:
    text = json.dumps({"name": "rooms_book", "arguments": RIGHT})
    assert score(ROOM, text) == Score(True, False, False)


def test_wrong_arguments_leave_the_function_right() -> None:
    assert score(ROOM, '{"name": "rooms.book", "arguments": {}}') == Score(True, True, False)


def test_white_space_and_one_markdown_fence_around_the_call_are_ignored() -> None:
    text = json.dumps({"name": "rooms.book", "arguments": RIGHT}, indent=2)
    assert score(ROOM, f"\n```json\n{text}\n```\n") == Score(True, True, True)
    assert score(ROOM, f"```\n{text}\n```") == Score(True, True, True)
    assert not score(ROOM, f"Here it is:\n```json\n{text}\n```").parses
