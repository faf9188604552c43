"""Reasoning in answers: where rows hold it, and what of it an answer begins with as the template
writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from veneer.data.examples import Problem, Row
from veneer.wording import percent

Reasons = Literal["reasons", "empty", "none", "lost"]
"""reasons: the answer begins with its reasoning. empty: with a block that holds none, which is
learnt. none: with what it says. lost: the row has reasoning, and the template leaves it out."""

_THOUGHT = re.compile(r"^\s*(?:<think>)?(.*?)</think>", re.DOTALL)
_EMPTY = re.compile(r"\s*<(\w+)>\s*</\1>\s*")
_OPENED = re.compile(r"<(\w+)>\s*\Z")
_CLOSED = re.compile(r"<(\w+)>\s*</\1>\s*\Z")
_TAIL = 16  # characters by which a text is found again
_MARK = 64  # characters at the end of a prompt within which its last mark stands


def thought_in(message: Mapping[str, Any]) -> str:
    """The reasoning of an answer, as `sandbox.prepared` leaves it or in front of what it says;
    empty: none."""
    given = message.get("reasoning_content")
    if isinstance(given, str) and given.strip():
        return given.strip()
    found = (
        _THOUGHT.search(said)
        if isinstance(said := message.get("content"), str) and "</think>" in said
        else None
    )
    return found[1].strip() if found else ""


def opens_reasoning(prompt: str) -> bool:
    """Whether it ends in the mark that reasoning begins with."""
    return bool(opening_mark(prompt))


def opening_mark(prompt: str) -> str:
    """That mark, with the space behind it; empty: there is none."""
    found = _OPENED.search(prompt[-_MARK:])
    return found[0] if found else ""


def forbids_reasoning(prompt: str) -> bool:
    """Whether it ends in an empty block of it."""
    return _CLOSED.search(prompt[-_MARK:]) is not None


def with_reasoning(prompt: str, upto: str, message: Mapping[str, Any]) -> str | None:
    """An answer as it was given, where the prompt opens its reasoning and the template leaves that
    out afterwards: behind the prompt the reasoning, its closing mark, and what was rendered. None:
    that is not so.

    What stands in the row between the marks is kept as it is; a field of its own stands on lines of
    its own.
    """
    opened = _OPENED.search(prompt[-_MARK:])
    start = len(prompt) - (len(opened[0]) if opened else 0)
    if opened is None or upto[:start] != prompt[:start]:
        return None
    said = message.get("content") or ""
    block, mark, _ = said.partition(f"</{opened[1]}>")
    if mark and block.startswith(opened[0]):
        blank = said[len(block + mark) :]
        return (
            prompt[:start] + block + mark + blank[: len(blank) - len(blank.lstrip())] + upto[start:]
        )
    return f"{prompt}{thought_in(message)}\n</{opened[1]}>\n\n{upto[start:]}"


def reasons_of(message: Mapping[str, Any], written: str) -> Reasons:
    """written: the answer as it is learnt."""
    if thought := thought_in(message):
        return "reasons" if thought[-_TAIL:] in written else "lost"
    return "empty" if _EMPTY.match(written) else "none"


def reasoning_problems(
    file: str, reasons: Mapping[str, int], unreasoned: Sequence[Row], several: Sequence[Row]
) -> list[Problem]:
    """What these rows teach of reasoning, where that is not plain. file: what the set is called.

    reasons      answers that are learnt, by kind
    unreasoned   rows with answers whose reasoning the template leaves out
    several      rows that became several examples
    """
    message = "an answer's reasoning is left out by the chat template: it would not be learnt"
    step = (
        "Take a base whose template writes it, or leave it out of the rows (map:"
        " {reasoning_content: null})."
    )
    problems = [Problem("D219", row.ref.file, message, (row.ref.line,), step) for row in unreasoned]
    message = (
        "earlier answers are rendered otherwise once messages follow: each is learnt as it was"
        " answered"
    )
    problems += [
        Problem("D222", row.ref.file, message, (row.ref.line,), fatal=False) for row in several
    ]
    reasoned, empty, none = (reasons.get(kind, 0) for kind in ("reasons", "empty", "none"))
    answers = reasoned + empty + none
    if reasoned and reasoned < answers:
        message = (
            f"{reasoned:,} of {answers:,} answers ({percent(reasoned, answers)}) begin with"
            " reasoning"
        )
        rest = "an empty block of it" if empty >= none else "what they say"
        message += (
            f", the others with {rest}: the model will do either, and nothing in the prompt says"
            " which"
        )
        step = (
            "Split them into two sets, each with its own template variables, if it should be told."
        )
        problems.append(Problem("D220", file, message, next_step=step, fatal=False))
    elif empty:
        message = (
            f"{empty:,} answers begin with an empty block of reasoning, which is learnt: the model"
            " stops to reason"
        )
        step = (
            "If it is to be told instead, let the prompt supply it: template: {variables:"
            " {enable_thinking: false}}."
        )
        problems.append(Problem("D221", file, message, next_step=step, fatal=False))
    return problems
