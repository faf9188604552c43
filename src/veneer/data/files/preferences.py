"""Rows of answers that somebody preferred or rated, in the layouts of TRL and OpenAI.

pairs         prompt, chosen, rejected: strings, or lists of messages; without prompt, chosen and
              rejected are whole conversations that begin with the same messages
openai_pairs  input: {messages, tools?}, preferred_output, non_preferred_output: lists of messages
ranked        prompt, ranked: a list of answers, the best first
ratings       prompt, completion, label: true for a good answer, false for a bad one

Each answer becomes a conversation as in layout prompt_completion (formats.py), so only the answers
are trained on. Knows nothing of tokens or losses.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from veneer.data.examples import Format, Row, RowFault, RowRef
from veneer.data.files.columns import rating_of
from veneer.data.files.formats import parse_messages, require_columns, to_row

Record = dict[str, Any]


def make_row(record: Record, ref: RowRef, format: Format) -> Row:
    """Converts the record to a Row. Raises RowFault with the first fault in it."""
    if format not in ("pairs", "openai_pairs", "ranked", "ratings"):
        return to_row(record, ref, format)
    require_columns(record, format)
    if format == "ratings":
        return _rated_row(record, ref)
    if format == "openai_pairs":
        question = record["input"]
        if not isinstance(question, dict) or "messages" not in question:
            raise RowFault("D109", "'input' is not an object with messages")
        columns = ("preferred_output", "non_preferred_output")
        own = {name: value for name, value in record.items() if name not in (*columns, "input")}
        shared = {name: question.get(name) for name in ("tools", "parallel_tool_calls")}
        base = {**shared, **own, "prompt": question["messages"]}
        return _row_of_answers(base, [(name, record[name]) for name in columns], ref, format)
    if format == "ranked":
        ranked = record["ranked"]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise RowFault("D109", "'ranked' is not a list of two answers or more")
        answers = [(f"ranked[{number}]", answer) for number, answer in enumerate(ranked)]
        return _row_of_answers(record, answers, ref, format)
    return _row_of_answers(*_with_prompt(record), ref, format)


def _rated_row(record: Record, ref: RowRef) -> Row:
    rating = rating_of(record["label"])
    if not isinstance(rating, bool):
        raise RowFault(
            "D109", "'label' is neither true nor false", "Rate every answer, or leave the row out."
        )
    return replace(to_row(record, ref, "prompt_completion"), format="ratings", liked=rating)


def _with_prompt(record: Record) -> tuple[Record, list[tuple[str, Any]]]:
    """Splits chosen and rejected into their prompt and the answers, if they hold both."""
    answers = {name: record[name] for name in ("chosen", "rejected")}
    whole = {
        name: parse_messages(answer, name)
        for name, answer in answers.items()
        if isinstance(answer, list)
        and answer
        and not (isinstance(answer[0], dict) and answer[0].get("role") == "assistant")
    }
    prompt = record.get("prompt")
    if len(whole) < 2:
        if whole:
            raise RowFault(
                "D117", f"'{next(iter(whole))}' is a whole conversation, the other is an answer"
            )
        if prompt is None:
            raise RowFault(
                "D117",
                "'chosen' and 'rejected' have no prompt",
                "Add a column 'prompt', or write both as whole conversations of messages.",
            )
        return record, list(answers.items())
    common = _common_messages(*whole.values())
    if isinstance(prompt, list) and prompt:
        asked = parse_messages(prompt, "prompt")
        is_asked = common[-len(asked) :] == asked
    else:
        is_asked = not isinstance(prompt, str) or [prompt] == [m["content"] for m in common[-1:]]
    if not common or not is_asked:
        raise RowFault(
            "D117",
            "'chosen' and 'rejected' begin with different messages"
            if not common
            else "'prompt' is not the question in 'chosen' and 'rejected'",
            "Both must answer the same prompt: correct the row, or leave it out.",
        )
    return (
        {**record, "prompt": common},
        [(name, messages[len(common) :]) for name, messages in whole.items()],
    )


def _common_messages(chosen: Sequence[Record], rejected: Sequence[Record]) -> list[Record]:
    """Returns the messages that both begin with; each keeps an answer of its own."""
    count, limit = 0, min(len(chosen), len(rejected)) - 1
    while count < limit and chosen[count] == rejected[count]:
        count += 1
    while count and chosen[count]["role"] != "assistant":
        count -= 1
    return list(chosen[:count])


def _row_of_answers(
    record: Record, answers: Sequence[tuple[str, Any]], ref: RowRef, format: Format
) -> Row:
    """Makes one row of several answers. answers: by column, the best first"""
    rows = []
    for name, answer in answers:
        if answer is None:
            raise RowFault("D109", f"'{name}' is null")
        try:
            rows.append(to_row({**record, "completion": answer}, ref, "prompt_completion"))
        except RowFault as fault:
            message = fault.message.replace("'completion'", f"'{name}'")
            message = message if f"'{name}'" in message else f"{message} ('{name}')"
            raise RowFault(fault.code, message, fault.next_step) from None
    best, *others = rows
    return replace(best, format=format, others=tuple(row.messages for row in others))
