"""Finds where the answers of a long prompt begin and end, in time proportional to its text.

The exact search (turns.py) renders every beginning of the conversation, so its time grows with the
square of the number of answers. A prompt beyond a bound is searched in windows: short conversations
of neighbouring messages, each rendered alone. A window holds if what it writes behind its first
messages stands in the whole text at the next place. If every window holds up to the end of the
text, and the exact search finds the same for answers spread over the conversation, the answers
stand where the windows have them. A template that writes other text in a window, for example one
that counts the turns, is searched exactly within the bound and refused beyond it: ids that differ
from those of training are never given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from veneer.data.template.rendering import Conversation, Cut, beginnings, render_all
from veneer.data.template.sandbox import TemplateFault
from veneer.data.template.turns import borders_of, joined, turn_of
from veneer.data.template.unfit import Unfit
from veneer.files.nesting import walk

MOST_RENDERED = 2**16
"""Messages that are rendered to find the borders of one prompt's answers."""
MOST_RENDERED_CHARACTERS = 2**25
"""The same bound in characters."""
_WINDOW = 6
"""Messages of a window, at least, before the next one begins."""
_CHECKED = 5
"""Answers whose place is searched exactly as well."""

Turns = dict[int, tuple[int, int] | None]
_STAND_IN = {"role": "user", "content": "a"}
"""Stands for the request that answers and replies of tools follow, which may be long."""


@dataclass(frozen=True)
class _Window:
    """Neighbouring messages as a conversation of their own.

    first    the number in the prompt of the chat's message number 0, as if no message were left out
    before   messages of the chat that the window before ends with, and what leads to them
    last     True if the prompt ends with it
    """

    chat: Conversation
    first: int
    before: int
    last: bool

    @property
    def answers(self) -> list[int]:
        """Numbers in the chat."""
        numbered = enumerate(self.chat.messages)
        return [n for n, message in numbered if n >= self.before and message["role"] == "assistant"]

    @property
    def cuts(self) -> list[Cut]:
        cuts: list[Cut] = [(len(self.chat.messages), self.last)] + (
            [(self.before, False)] if self.before else []
        )
        return [*cuts, *(cut for n in self.answers for cut in ((n, True), (n + 1, False)))]


def prompt_borders(chat: Conversation, text: str) -> tuple[int, ...]:
    """Finds the borders of the answers in the text of a prompt. Raises Unfit for one that is too
    long."""
    exact = beginnings(chat.messages, prompt=True)
    if _fits([(chat, exact)]):
        render_all([(chat, exact)])
        return borders_of(chat, text)
    windows = _windows(chat)
    if not _fits([(window.chat, window.cuts) for window in windows]):
        raise _too_long(chat, "its tools, or the messages between two answers, are too long")
    turns = _turns_in(windows, text)
    if turns is None or not _checked(chat, text, turns):
        raise _too_long(
            chat, "the chat template writes a message otherwise where other messages are around it"
        )
    return joined([turns[number] for number in sorted(turns)], text)


def _fits(searched: Sequence[tuple[Conversation, Sequence[Cut]]]) -> bool:
    """Whether these renderings are within the bounds."""
    messages = characters = 0
    for chat, cuts in searched:
        tools = _characters(chat.tools or [])
        ends = [0, *accumulate(_characters([message]) for message in chat.messages)]
        messages += sum(count for count, _ in cuts)
        characters += sum(ends[count] + tools for count, _ in cuts)
    return messages <= MOST_RENDERED and characters <= MOST_RENDERED_CHARACTERS


def _characters(values: list[Any]) -> int:
    return sum(len(value) for value, _ in walk(values) if isinstance(value, str))


def _windows(chat: Conversation) -> list[_Window]:
    messages = chat.messages
    count = len(messages)
    lead = next(
        (n for n, message in enumerate(messages) if message["role"] not in ("system", "developer")),
        count,
    )
    windows: list[_Window] = []
    start = end = 0
    for number in range(count):
        behind = messages[number + 1]["role"] if number + 1 < count else None
        ends = (
            messages[number]["role"] in ("user", "tool")
            and behind == "assistant"
            and number + 1 >= end + _WINDOW
        )
        if not ends and behind is not None:
            continue
        front = [] if start == 0 else list(messages[:lead])
        if start > 0 and messages[start]["role"] != "user":
            front.append(_STAND_IN)
        window = Conversation(
            chat.template, [*front, *messages[start : number + 1]], chat.tools, chat.variables
        )
        before = 0 if start == 0 else len(front) + end - start
        windows.append(_Window(window, start - len(front), before, last=behind is None))
        start, end = number, number + 1
        while start > 0 and messages[start]["role"] not in ("user", "assistant"):
            start -= 1
    return windows


def _turns_in(windows: Sequence[_Window], text: str) -> Turns | None:
    """Where each answer stands in the text. Returns None if a window does not hold."""
    render_all([(window.chat, window.cuts) for window in windows])
    turns: Turns = {}
    place = 0  # where the text of the windows so far ends
    for window in windows:
        try:
            whole = window.chat.text(len(window.chat.messages), add_generation_prompt=window.last)
            before = (
                window.chat.text(window.before, add_generation_prompt=False)
                if window.before
                else ""
            )
        except TemplateFault:
            return None
        if not whole.startswith(before) or not text.startswith(whole[len(before) :], place):
            return None
        shift = place - len(before)
        for number in window.answers:
            turn = turn_of(window.chat, number, whole)
            turns[window.first + number] = (
                None if turn is None else (turn[0] + shift, turn[1] + shift)
            )
        place += len(whole) - len(before)
    return turns if place == len(text) else None


def _checked(chat: Conversation, text: str, turns: Turns) -> bool:
    """Whether the exact search finds answers where the windows have them."""
    numbers = sorted(turns)
    spread = (
        {numbers[(len(numbers) - 1) * part // (_CHECKED - 1)] for part in range(_CHECKED)}
        if numbers
        else set()
    )
    cuts = [
        (len(chat.messages), True),
        *(cut for n in sorted(spread) for cut in ((n, True), (n + 1, False))),
    ]
    render_all([(chat, cuts)])
    return all(turn_of(chat, number, text) == turns[number] for number in spread)


def _too_long(chat: Conversation, reason: str) -> Unfit:
    answers = sum(message["role"] == "assistant" for message in chat.messages)
    return Unfit(
        "D202",
        f"a conversation with {answers:,} answers is too long to find where each of them begins and"
        f" ends: {reason}",
        "Leave out the oldest turns, or begin a new conversation.",
    )
