"""Finds where the answers of a long prompt begin and end, in time proportional to its text.

The exact search (turns.py) renders every beginning of the conversation, so its time grows with the
square of the number of answers. A prompt beyond a bound is searched in windows: short conversations
of neighbouring messages, each rendered separately. A window holds if the text after its first
messages occurs in the whole text at the next position. If every window holds up to the end of the
text, and the exact search agrees for answers spread over the conversation, the windows' positions
are used. A template that renders a window differently, for example one that counts the turns, is
searched exactly within the bound and refused beyond it: ids never differ from those of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.template.rendering import Conversation, PrefixSpec, beginnings, render_all
from veneer.data.template.sandbox import TemplateFault
from veneer.data.template.turns import borders_of, merge_borders, turn_of
from veneer.files.nesting import walk

MOST_RENDERED = 2**16
"""Most messages that are rendered to find the borders of one prompt's answers."""
MOST_RENDERED_CHARACTERS = 2**25
"""The same bound in characters."""
_WINDOW = 6
"""Least messages of a window."""
_CHECKED = 5
"""Answers that the exact search checks as well."""

Turns = dict[int, tuple[int, int] | None]
_PLACEHOLDER = {"role": "user", "content": "a"}
"""Replaces the user message before answers and tool replies, which may be long."""


@dataclass(frozen=True)
class _Window:
    """Neighbouring messages as a separate conversation.

    first    number of the chat's first message in the prompt, as if no message were left out
    before   messages of the chat that overlap with the previous window, and those in front of them
    last     True if the prompt ends with it
    """

    chat: Conversation
    first: int
    before: int
    last: bool

    @property
    def answers(self) -> list[int]:
        """Returns the numbers of the answers in the chat."""
        numbered = enumerate(self.chat.messages)
        return [n for n, message in numbered if n >= self.before and message["role"] == "assistant"]

    @property
    def cuts(self) -> list[PrefixSpec]:
        cuts: list[PrefixSpec] = [(len(self.chat.messages), self.last)] + (
            [(self.before, False)] if self.before else []
        )
        return [*cuts, *(cut for n in self.answers for cut in ((n, True), (n + 1, False)))]


def prompt_borders(chat: Conversation, text: str) -> tuple[int, ...]:
    """Finds the borders of the answers in a prompt's text. Raises RowFault if it is too
    long."""
    exact = beginnings(chat.messages, prompt=True)
    if _within_bounds([(chat, exact)]):
        render_all([(chat, exact)])
        return borders_of(chat, text)
    windows = _windows(chat)
    if not _within_bounds([(window.chat, window.cuts) for window in windows]):
        raise _too_long(chat, "its tools, or the messages between two answers, are too long")
    turns = _turns_in(windows, text)
    if turns is None or not _exact_search_agrees(chat, text, turns):
        raise _too_long(
            chat,
            "the chat template renders a message differently depending on the messages around it",
        )
    return merge_borders([turns[number] for number in sorted(turns)], text)


def _within_bounds(searched: Sequence[tuple[Conversation, Sequence[PrefixSpec]]]) -> bool:
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
        next_role = messages[number + 1]["role"] if number + 1 < count else None
        is_end = (
            messages[number]["role"] in ("user", "tool")
            and next_role == "assistant"
            and number + 1 >= end + _WINDOW
        )
        if not is_end and next_role is not None:
            continue
        leading = [] if start == 0 else list(messages[:lead])
        if start > 0 and messages[start]["role"] != "user":
            leading.append(_PLACEHOLDER)
        window = Conversation(
            chat.template, [*leading, *messages[start : number + 1]], chat.tools, chat.variables
        )
        before = 0 if start == 0 else len(leading) + end - start
        windows.append(_Window(window, start - len(leading), before, last=next_role is None))
        start, end = number, number + 1
        while start > 0 and messages[start]["role"] not in ("user", "assistant"):
            start -= 1
    return windows


def _turns_in(windows: Sequence[_Window], text: str) -> Turns | None:
    """Finds each answer in the text. Returns None if a window does not hold."""
    render_all([(window.chat, window.cuts) for window in windows])
    turns: Turns = {}
    position = 0  # end of the text of the windows so far
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
        if not whole.startswith(before) or not text.startswith(whole[len(before) :], position):
            return None
        shift = position - len(before)
        for number in window.answers:
            turn = turn_of(window.chat, number, whole)
            turns[window.first + number] = (
                None if turn is None else (turn[0] + shift, turn[1] + shift)
            )
        position += len(whole) - len(before)
    return turns if position == len(text) else None


def _exact_search_agrees(chat: Conversation, text: str, turns: Turns) -> bool:
    """Whether the exact search agrees with the windows."""
    numbers = sorted(turns)
    sample = (
        {numbers[(len(numbers) - 1) * part // (_CHECKED - 1)] for part in range(_CHECKED)}
        if numbers
        else set()
    )
    cuts = [
        (len(chat.messages), True),
        *(cut for n in sorted(sample) for cut in ((n, True), (n + 1, False))),
    ]
    render_all([(chat, cuts)])
    return all(turn_of(chat, number, text) == turns[number] for number in sample)


def _too_long(chat: Conversation, reason: str) -> RowFault:
    answers = sum(message["role"] == "assistant" for message in chat.messages)
    return RowFault(
        "D202",
        f"a conversation with {answers:,} answers is too long to find the borders of each answer:"
        f" {reason}",
        "Remove the oldest turns, or start a new conversation.",
    )
