"""Layouts to messages."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from veneer.data.examples import Format, RowFault, RowRef
from veneer.data.files.formats import to_row
from veneer.data.files.layouts import detect
from veneer.data.files.preferences import make_row

REF = RowRef("rows.jsonl", 1)
ASK = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


LAYOUTS: dict[str, tuple[dict[str, Any], Format, list[dict[str, Any]]]] = {
    "chat": ({"messages": [ASK, ANSWER]}, "chat", [ASK, ANSWER]),
    "chat as JSON text": (
        {"messages": '[{"role":"user","content":"2 + 2?"},{"role":"assistant","content":"4"}]'},
        "chat",
        [ASK, ANSWER],
    ),
    "chat with parts": (
        {"messages": [{"role": "user", "content": parts("2 ", "+ 2?")}, ANSWER]},
        "chat",
        [ASK, ANSWER],
    ),
    "chat with a system column": (
        {"messages": [ASK, ANSWER], "system": "Be brief."},
        "chat",
        [SYSTEM, ASK, ANSWER],
    ),
    "chat with nulls": (
        {"messages": [{**ASK, "name": None}, {**ANSWER, "tool_calls": None}]},
        "chat",
        [ASK, ANSWER],
    ),
    "tool calls": (
        {"messages": [ASK, CALLS, RESULT, ANSWER]},
        "chat",
        [ASK, CALLS, RESULT, ANSWER],
    ),
    "one call a message, as promised": (
        {"messages": [ASK, CALLS, RESULT, ANSWER], "parallel_tool_calls": False},
        "chat",
        [ASK, CALLS, RESULT, ANSWER],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": "4"},
            ]
        },
        "sharegpt",
        [SYSTEM, ASK, ANSWER],
    ),
    "prompt and completion": (
        {"prompt": "2 + 2?", "completion": "4"},
        "prompt_completion",
        [ASK, ANSWER],
    ),
    "a prompt of messages is not learnt": (
        {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
        "prompt_completion",
        [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER],
    ),
    "alpaca": ({"instruction": "2 + 2?", "output": "4"}, "alpaca", [ASK, ANSWER]),
    "alpaca with an empty input": (
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        "alpaca",
        [ASK, ANSWER],
    ),
    "alpaca with an input": (
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "### Add"},
        "alpaca",
        [{"role": "user", "content": "Add.\n\n2, 2"}, ANSWER],
    ),
}


@pytest.mark.parametrize(("record", "format", "messages"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_recognised_and_becomes_messages(
    record: dict[str, Any], format: Format, messages: list[dict[str, Any]]
) -> None:
    assert detect(frozenset(record)) == format
    row = to_row(record, REF, format)
    assert (row.messages, row.text, row.format) == (messages, None, format)


def test_text_is_recognised_beside_columns_about_its_origin_only() -> None:
    record = {"text": "Once.", "url": "x", "id": 3}
    assert detect(frozenset(record)) == "text"
    assert (to_row(record, REF, "text").text, to_row(record, REF, "text").messages) == ("Once.", [])
    with pytest.raises(RowFault, match="would leave out label") as fault:
        detect(frozenset({"text", "label"}))
    assert "--objective classify" in fault.value.next_step


def test_rows_that_fit_two_layouts_are_refused() -> None:
    with pytest.raises(RowFault, match="fit chat and alpaca"):
        detect(frozenset({"messages", "instruction", "output"}))


def test_arguments_given_as_json_text_become_the_object_that_templates_expect() -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    bare = {"name": "add", "arguments": {"a": 2}}
    record = {
        "messages": [ASK, {**CALLS, "tool_calls": [call, bare]}, RESULT, ANSWER],
        "tools": '[{"name": "add"}]',
    }
    row = to_row(record, REF, "chat")
    assert [call["function"] for call in row.messages[1]["tool_calls"]] == [bare, bare]
    assert row.tools == [{"name": "add"}]


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "empty answer": ("D101", {"messages": [ASK, {**ANSWER, "content": " \n"}]}),
    "null answer": ("D101", {"messages": [ASK, {**ANSWER, "content": None}]}),
    "empty completion": ("D101", {"prompt": "a", "completion": ""}),
    "empty text": ("D101", {"text": " "}),
    "half a character": ("D102", {"text": "\ud83d"}),
    "bad JSON text": ("D103", {"messages": "[{"}),
    "number as completion": ("D109", {"prompt": "a", "completion": 4}),
    "no messages": ("D109", {"messages": []}),
    "messages that are strings": ("D109", {"messages": ["a", "b"]}),
    "weight": ("D109", {"messages": [ASK, {**ANSWER, "weight": 0.5}]}),
    "unknown role": ("D110", {"messages": [{**ASK, "role": "bot"}, ANSWER]}),
    "unknown speaker": (
        "D110",
        {"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ),
    "two systems": ("D111", {"messages": [SYSTEM, ASK, SYSTEM, ANSWER]}),
    "system message and column": ("D111", {"messages": [SYSTEM, ASK, ANSWER], "system": "a"}),
    "assistant first": ("D111", {"messages": [SYSTEM, ANSWER, ASK, ANSWER]}),
    "two answers": ("D111", {"messages": [ASK, ANSWER, ANSWER]}),
    "tool result without a call": ("D111", {"messages": [ASK, ANSWER, RESULT, ANSWER]}),
    "no answer": ("D112", {"messages": [ASK, ANSWER, ASK]}),
    "call without a name": (
        "D113",
        {"messages": [ASK, {**CALLS, "tool_calls": [{"function": {}}]}, RESULT, ANSWER]},
    ),
    "arguments that are not JSON": (
        "D113",
        {"messages": [ASK, {**CALLS, "tool_calls": [{"name": "f", "arguments": "{a"}]}]},
    ),
    "arguments that are a list": (
        "D113",
        {"messages": [ASK, {**CALLS, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
    ),
    "a tool whose function is a word": (
        "D113",
        {"messages": [ASK, ANSWER], "tools": [{"function": "x"}]},
    ),
    "a tool whose name is a number": (
        "D113",
        {"messages": [ASK, ANSWER], "tools": [{"function": {"name": 3}}]},
    ),
    "half a character in a call": (
        "D102",
        {"messages": [ASK, {**CALLS, "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}]},
    ),
    "half a character in a key": ("D102", {"messages": [ASK, {**ANSWER, "more": {"\udc00": 1}}]}),
    "half a character in a tool": (
        "D102",
        {"messages": [ASK, ANSWER], "tools": [{"name": "\ud83d"}]},
    ),
    "half a character in escaped arguments": (
        "D102",
        {
            "messages": [
                ASK,
                {**CALLS, "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud83d"}'}]},
            ]
        },
    ),
    "half a character in the system column": (
        "D102",
        {"messages": [ASK, ANSWER], "system": "\ud83d"},
    ),
    "messages that are brackets": ("D103", {"messages": "[" * 100_000}),
    "messages nested in text": ("D103", {"messages": "[" * 600 + "]" * 600}),
    "NaN in messages that are text": (
        "D103",
        {"messages": '[{"role": "user", "content": "a", "n": NaN}]'},
    ),
    "arguments nested in text": (
        "D113",
        {
            "messages": [
                ASK,
                {
                    **CALLS,
                    "tool_calls": [{"name": "f", "arguments": '{"a":' * 600 + "1" + "}" * 600}],
                },
            ]
        },
    ),
    "tools nested in text": ("D113", {"messages": [ASK, ANSWER], "tools": "[" * 600 + "]" * 600}),
    "a value that is no JSON": ("D109", {"messages": [ASK, {**ANSWER, "at": date(2026, 1, 1)}]}),
    "calls at once where one at a time is promised": (
        "D113",
        {"messages": [ASK, {**CALLS, "tool_calls": [CALL, CALL]}], "parallel_tool_calls": False},
    ),
    "parallel_tool_calls that is a text": (
        "D113",
        {"messages": [ASK, ANSWER], "parallel_tool_calls": "no"},
    ),
    "tools that are no list": ("D113", {"messages": [ASK, ANSWER], "tools": {"name": "f"}}),
    "an image part": (
        "D114",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
    ),
    "an images column": ("D114", {"messages": [ASK, ANSWER], "images": ["a.png"]}),
    "empty question": ("D115", {"messages": [{**ASK, "content": ""}, ANSWER]}),
    "empty prompt": ("D115", {"prompt": "", "completion": "a"}),
}


@pytest.mark.parametrize(("code", "record"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_learnt_from_is_a_fault(code: str, record: dict[str, Any]) -> None:
    with pytest.raises(RowFault) as fault:
        to_row(record, REF, detect(frozenset(record)))
    assert fault.value.code == code


@pytest.mark.parametrize(
    "text", ['[{"role": "user", "content": "a"}]', " [ {'content': 'a', 'role': 'user'} ] "]
)
def test_messages_that_were_written_as_text_are_not_learnt_as_text(text: str) -> None:
    for column in ("prompt", "completion", "chosen"):
        answers = ["completion"] if column != "chosen" else ["chosen", "rejected"]
        record = {"prompt": "a", **dict.fromkeys(answers, "b"), column: text}
        with pytest.raises(RowFault, match=f"'{column}' is a text that holds messages"):
            make_row(record, REF, "pairs" if column == "chosen" else "prompt_completion")
    row = to_row({"messages": [ASK, {**ANSWER, "content": text}]}, REF, "chat")
    assert row.messages[1]["content"] == text
    to_row({"prompt": f"{text} Is this polite?", "completion": "[1]"}, REF, "prompt_completion")


def test_a_csv_says_true_false_and_nothing_in_text() -> None:
    row = {"prompt": "a", "completion": "b", "parallel_tool_calls": ""}
    for text, unfinished in (("", False), ("False", False), ("true", True)):
        assert (
            to_row({**row, "unfinished": text}, REF, "prompt_completion").unfinished is unfinished
        )
    for name in ("unfinished", "parallel_tool_calls"):
        with pytest.raises(RowFault, match=name):
            to_row({**row, name: "yes"}, REF, "prompt_completion")


def test_a_named_format_says_which_column_is_missing() -> None:
    with pytest.raises(
        RowFault, match="format alpaca needs instruction, output; here output is missing"
    ):
        to_row({"instruction": "a"}, REF, "alpaca")


def bad_call(function: Any) -> dict[str, Any]:
    return {"messages": [ASK, {**CALLS, "tool_calls": [CALL, function]}, RESULT, ANSWER]}


SAID: list[tuple[str, dict[str, Any]]] = [
    ("message 2 has the unknown role 'bot'", {"messages": [ASK, {**ANSWER, "role": "bot"}]}),
    ("message 2 has no role", {"messages": [ASK, {"content": "4"}]}),
    (
        "the role of message 1 is a list, not text",
        {"messages": [{**ASK, "role": ["user"]}, ANSWER]},
    ),
    (
        "message 1 has the unknown role 'Mensch'",
        {"conversations": [{"from": "Mensch", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ),
    (
        "assistant turn is empty (message 2): nothing to learn",
        {"messages": [ASK, {**ANSWER, "content": " "}]},
    ),
    ("user turn is empty (message 1)", {"messages": [{**ASK, "content": ""}, ANSWER]}),
    (
        "weight of message 2 is 0.5; 0 and 1 are read",
        {"messages": [ASK, {**ANSWER, "weight": 0.5}]},
    ),
    (
        "weight of message 2 is True; 0 and 1 are read",
        {"messages": [ASK, {**ANSWER, "weight": True}]},
    ),
    ("'content of message 2' is a number, not text", {"messages": [ASK, {**ANSWER, "content": 4}]}),
    (
        "'part of message 1' is null, not text",
        {"messages": [{**ASK, "content": [{"type": "text"}]}, ANSWER]},
    ),
    (
        "tool_calls of message 2 is an object, not a list",
        {"messages": [ASK, {**CALLS, "tool_calls": CALL}]},
    ),
    ("a tool call of message 2 has no function name", bad_call({"function": {}})),
    ("a tool call of message 2 has no function name", bad_call("add")),
    (
        "arguments of f in message 2 are a list, not an object",
        bad_call({"name": "f", "arguments": [1]}),
    ),
    (
        "'tools' is an object, not a list of objects",
        {"messages": [ASK, ANSWER], "tools": {"name": "f"}},
    ),
    (
        "'tools' is a list, not a list of objects",
        {"messages": [ASK, ANSWER], "tools": [*TOOLS, "f"]},
    ),
    (
        "the function of tool 2 is of type str, not an object",
        {"messages": [ASK, ANSWER], "tools": [*TOOLS, {"function": "f"}]},
    ),
    (
        "the name of tool 2 is a number, not text",
        {"messages": [ASK, ANSWER], "tools": [*TOOLS, {"name": 3}]},
    ),
    (
        "'references' is of type str, not a list of texts",
        {"messages": [ASK, ANSWER], "references": "4"},
    ),
    (
        "'references' is a list, not a list of texts",
        {"messages": [ASK, ANSWER], "references": ["4", 4]},
    ),
    (
        "'unfinished' is of type str; true and false are read",
        {"messages": [ASK, ANSWER], "unfinished": "no"},
    ),
    ("'unfinished' is a number; true and false are read", {"text": "a", "unfinished": 1}),
    (
        "message 2 is a system message, which can only come first",
        {"messages": [ASK, SYSTEM, ANSWER]},
    ),
    (
        "message 2 is the assistant's, with no user message before it",
        {"messages": [SYSTEM, ANSWER]},
    ),
    ("messages 2 and 3 are both the assistant's", {"messages": [ASK, ANSWER, ANSWER]}),
    (
        "message 3 is a tool's, with no tool call before it",
        {"messages": [ASK, ANSWER, RESULT, ANSWER]},
    ),
    (
        "the last message is the user's, not the assistant's: nothing to learn",
        {"messages": [ASK, ANSWER, ASK]},
    ),
    ("'output' is empty: nothing to learn", {"instruction": "2 + 2?", "output": " "}),
    ("'instruction' is empty", {"instruction": "", "output": "4"}),
    (
        "format prompt_completion needs prompt, completion; here completion is missing or null",
        {"prompt": "a", "completion": None},
    ),
    ("'text' holds half a character (U+D83D): cut off in an escape", {"text": "é\ud83d"}),
]


@pytest.mark.parametrize("name", [name for name, (code, _) in FAULTS.items() if code == "D111"])
def test_each_fault_of_the_order_says_what_to_do(name: str) -> None:
    record = FAULTS[name][1]
    with pytest.raises(RowFault) as fault:
        to_row(record, REF, detect(frozenset(record)))
    assert fault.value.next_step


@pytest.mark.parametrize(("said", "record"), SAID)
def test_a_fault_names_its_place_counted_from_one_and_what_stands_there(
    said: str, record: dict[str, Any]
) -> None:
    with pytest.raises(RowFault) as fault:
        to_row(record, REF, detect(frozenset(record)))
    assert fault.value.message == said


def test_tool_results_may_follow_one_another_and_a_weight_of_0_or_1_is_kept() -> None:
    calls = {**CALLS, "tool_calls": [CALL, CALL]}
    for weight in (0, 1):
        messages = [ASK, calls, RESULT, RESULT, {**ANSWER, "weight": weight}]
        assert to_row({"messages": messages}, REF, "chat").messages == messages


@pytest.mark.parametrize(
    ("columns", "maps"),
    [
        ({"prompt", "chosen", "rejected"}, "--map chosen=completion --map rejected=null"),
        ({"chosen", "rejected", "score"}, "--map chosen=messages --map rejected=null"),
    ],
)
def test_preference_pairs_are_refused_with_how_to_learn_the_good_answers(columns, maps) -> None:
    with pytest.raises(RowFault, match="pairs of a good and a bad answer") as fault:
        detect(frozenset(columns))
    assert fault.value.next_step.endswith(maps)


def test_columns_that_fit_nothing_are_shown_shortened_with_what_to_rename() -> None:
    with pytest.raises(RowFault) as fault:
        detect(frozenset({"question", "answer"}))
    assert "rename column 'question' to 'prompt' and 'answer' to 'completion'" in str(
        fault.value.next_step
    )
    with pytest.raises(RowFault) as fault:
        detect(frozenset({"prompt", "answer"}))
    assert "rename column 'answer' to 'completion'." in str(fault.value.next_step)
    with pytest.raises(RowFault) as fault:
        detect(frozenset({"anything", "output"}))
    assert "rename column 'anything' to 'prompt' and 'output' to 'completion'" in str(
        fault.value.next_step
    )
    with pytest.raises(RowFault) as fault:
        detect(frozenset({"anything", "something", "output"}))
    assert str(fault.value.next_step).startswith("Name the column with the question 'prompt'")
    columns = [f"{number:02d}" + "x" * 50 for number in range(13)]
    with pytest.raises(RowFault) as fault:
        detect(frozenset(columns))
    assert (
        f"columns {', '.join(name[:39] + '…' for name in columns[:12])}, … are not recognised"
        in fault.value.message
    )
    with pytest.raises(RowFault) as fault:
        detect(frozenset(columns[:12]))
    assert f", {columns[11][:39]}… are not recognised" in fault.value.message


@pytest.mark.parametrize(
    ("record", "code", "said"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "function_call": {"name": "f"}},
                ]
            },
            "D113",
            "outdated form of tool_calls",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": "I look.",
                        "function_call": {"name": "f", "arguments": "{}"},
                    },
                ]
            },
            "D113",
            "outdated form of tool_calls",
        ),
        (
            {
                "functions": [{"name": "f"}],
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
            },
            "D107",
            "'functions' would not be trained on",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["what came", "before"]]},
            "D107",
            "'history' would not be trained on",
        ),
        ({}, "D107", "no columns with values"),
    ],
)
def test_what_other_layouts_say_is_not_left_out_silently(
    record: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(RowFault, match=said) as fault:
        to_row(record, RowRef("rows.jsonl", 1), detect(frozenset(record)))
    assert fault.value.code == code


def test_an_empty_history_is_no_history() -> None:
    record = {"instruction": "a", "input": "", "output": "b", "history": []}
    assert len(to_row(record, RowRef("rows.jsonl", 1), "alpaca").messages) == 2
