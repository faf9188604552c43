"""Finds reasoning in answers, and what the template renders of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from veneer.data.examples import Problem, Row
from veneer.wording import percent

Reasons = Literal["reasons", "empty", "none", "lost"]
"""reasons: the answer begins with its reasoning. empty: it begins with an empty reasoning block,
which is trained. none: it has no reasoning. lost: the row has reasoning, and the template leaves it
out."""

_THOUGHT = re.compile(r"^\s*(?:<think>)?(.*?)</think>", re.DOTALL)
_EMPTY = re.compile(r"\s*<(\w+)>\s*</\1>\s*")
_OPENED = re.compile(r"<(\w+)>\s*\Z")
_CLOSED = re.compile(r"<(\w+)>\s*</\1>\s*\Z")
_TAIL = 16  # last characters by which a text is recognised
_MARK = 64  # characters at the end of a prompt that are searched for its last mark


def thought_in(message: Mapping[str, Any]) -> str:
    """Returns the reasoning of an answer, from its own field or before its text; empty if none."""
    field = message.get("reasoning_content")
    if isinstance(field, str) and field.strip():
        return field.strip()
    match = (
        _THOUGHT.search(content)
        if isinstance(content := message.get("content"), str) and "</think>" in content
        else None
    )
    return match[1].strip() if match else ""


def opening_mark(prompt: str) -> str:
    """Returns the mark that opens reasoning at the end of the prompt, with the space after it;
    empty if none."""
    match = _OPENED.search(prompt[-_MARK:])
    return match[0] if match else ""


def forbids_reasoning(prompt: str) -> bool:
    """Whether the prompt ends with an empty reasoning block."""
    return _CLOSED.search(prompt[-_MARK:]) is not None


def with_reasoning(prompt: str, upto: str, message: Mapping[str, Any]) -> str | None:
    """Returns an answer with its reasoning, if the prompt opens it and the template drops it
    afterwards.

    The text is the prompt, the reasoning, its closing mark, and the rendered answer. Text of the
    row between the marks is kept as it is; reasoning from its own field gets lines of its own.
    Returns None if the prompt does not open the reasoning.
    """
    opening = _OPENED.search(prompt[-_MARK:])
    start = len(prompt) - (len(opening[0]) if opening else 0)
    if opening is None or upto[:start] != prompt[:start]:
        return None
    content = message.get("content") or ""
    block, mark, _ = content.partition(f"</{opening[1]}>")
    if mark and block.startswith(opening[0]):
        blank = content[len(block + mark) :]
        return (
            prompt[:start] + block + mark + blank[: len(blank) - len(blank.lstrip())] + upto[start:]
        )
    return f"{prompt}{thought_in(message)}\n</{opening[1]}>\n\n{upto[start:]}"


def reasons_of(message: Mapping[str, Any], written: str) -> Reasons:
    """Classifies the reasoning at the start of an answer. written: the trained text of the
    answer"""
    if thought := thought_in(message):
        return "reasons" if thought[-_TAIL:] in written else "lost"
    return "empty" if _EMPTY.match(written) else "none"


def reasoning_problems(
    file: str, reasons: Mapping[str, int], unreasoned: Sequence[Row], several: Sequence[Row]
) -> list[Problem]:
    """Reports reasoning that is lost or inconsistent. file: name of the set

    reasons      trained answers, by kind
    unreasoned   rows with answers whose reasoning the template leaves out
    several      rows that became several examples
    """
    message = "an answer's reasoning is left out by the chat template: it would not be trained on"
    step = (
        "Choose a base whose template renders it, or remove it from the rows (map:"
        " {reasoning_content: null})."
    )
    problems = [row.ref.problem("D219", message, step) for row in unreasoned]
    message = (
        "earlier answers are rendered differently once messages follow: each is trained as it was"
        " first rendered"
    )
    problems += [row.ref.problem("D222", message, fatal=False) for row in several]
    reasoned, empty, none = (reasons.get(kind, 0) for kind in ("reasons", "empty", "none"))
    answers = reasoned + empty + none
    if reasoned and reasoned < answers:
        message = (
            f"{reasoned:,} of {answers:,} answers ({percent(reasoned, answers)}) begin with"
            " reasoning"
        )
        rest = "an empty block of it" if empty >= none else "their text"
        message += (
            f", the others with {rest}: the model will do either, and nothing in the prompt decides"
            " which"
        )
        step = (
            "Split them into two sets, each with its own template variables, if the prompt should"
            " decide."
        )
        problems.append(Problem("D220", file, message, next_step=step, fatal=False))
    elif empty:
        message = (
            f"{empty:,} answers begin with an empty block of reasoning, which is trained: the model"
            " stops reasoning"
        )
        step = (
            "If the prompt should decide instead, let it supply the block: template: {variables:"
            " {enable_thinking: false}}."
        )
        problems.append(Problem("D221", file, message, next_step=step, fatal=False))
    return problems
