"""Where in a rendered conversation what is trained begins and ends.

The span of an assistant turn is exact by construction: it is what the template renders of the conversation up to
and including the turn, less what it renders up to it with the generation prompt. So it holds everything that the
model has to write, the token that ends the turn included. A template of which one rendering is not the beginning of
the other has no such span; that is an error which shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.data.examples import Row, TrainOn
from veneer.data.rendering import Conversation
from veneer.data.sandbox import TemplateFault
from veneer.data.tokens import Cut
from veneer.data.unfit import Unfit, check_contents, check_text, check_tools, parting

_USE_LAST = "Train on the last answer only: train_on: last"

Show = Callable[[str], str]
"""A text as people read it, hidden names in it."""


@dataclass(frozen=True)
class Plan:
    """What is known of a row before it is tokenised, in characters of `cut.text`.

    spans   [start, end) of what is trained
    roles   (role, end) of what each message rendered to, as far as it is known
    """

    cut: Cut
    spans: tuple[tuple[int, int], ...]
    roles: tuple[tuple[str, int], ...]
    control: int
    begin: tuple[int, ...] = ()  # ids in front
    end: tuple[int, ...] = ()  # ids behind, trained


def plan_chat(row: Row, chat: Conversation, control: int, train_on: TrainOn, show: Show) -> Plan:
    """chat: the row's messages and tools, rendered; control: names hidden in them. Raises Unfit, TemplateFault."""
    messages = chat.messages
    text = chat.text(len(messages), add_generation_prompt=False)
    check_text(text)
    check_tools(row.messages, row.tools, show(text))
    check_contents(messages, text)
    last = len(messages) - 1
    spans: list[tuple[int, int]] = []
    borders: list[int] = []
    roles: list[tuple[str, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            following = messages[number + 1] if number < last else None
            if following is not None and following["role"] != "assistant":
                end = _end_of(chat, number + 1, text)
                roles += [] if end is None else [(message["role"], end)]
            continue
        wanted = train_on == "assistant" or (train_on == "last" and number == last)
        learnt = wanted and row.messages[number].get("weight", 1) == 1
        turn = _turn(chat, number, text, show, must=learnt)
        if turn is None or (borders and turn[0] < borders[-1]):
            if learnt:
                raise Unfit("D202", f"message {number + 1} overlaps the answer before it as rendered", _USE_LAST)
            continue
        if number > 0:
            roles.append((messages[number - 1]["role"], turn[0]))
        roles.append(("assistant", turn[1]))
        borders += turn
        if learnt:
            spans.append(turn)
    if not roles or roles[-1][1] < len(text):
        roles.append((messages[-1]["role"], len(text)))
    if train_on == "all":
        spans = [(0, len(text))]
    marks = tuple(end for _, end in roles)
    return Plan(Cut(text, _cuts(borders, text), marks), tuple(spans), tuple(roles), control)


def _turn(chat: Conversation, number: int, text: str, show: Show, *, must: bool) -> tuple[int, int] | None:
    """Where an assistant turn begins and ends in the text. None if it has no exact place, unless it must."""
    try:
        prompt = chat.text(number, add_generation_prompt=True)
        upto = chat.text(number + 1, add_generation_prompt=False)
    except TemplateFault:
        if must:
            raise
        return None
    if upto.startswith(prompt) and text.startswith(upto):
        return len(prompt), len(upto)
    if not must:
        return None
    if not upto.startswith(prompt):
        raise Unfit(
            "D202",
            "what the chat template renders before an answer is not the beginning of what it renders with it",
            "The answers must begin as the template's generation prompt does.",
            parting("before", show(prompt), "with it", show(upto)),
        )
    raise Unfit(
        "D202",
        "the chat template renders an earlier answer differently once messages follow it",
        _USE_LAST,
        parting("as last", show(upto), "earlier", show(text)),
    )


def borders_of(chat: Conversation, text: str, show: Show) -> tuple[int, ...]:
    """The same borders in a prompt as in the row that it is the beginning of."""
    borders: list[int] = []
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            turn = _turn(chat, number, text, show, must=False)
            if turn is not None and not (borders and turn[0] < borders[-1]):
                borders += turn
    return _cuts(borders, text)


def _end_of(chat: Conversation, count: int, text: str) -> int | None:
    """Where what these messages render to ends, if the text begins with it."""
    try:
        part = chat.text(count, add_generation_prompt=False)
    except TemplateFault:  # some templates refuse what does not end in a user's message
        return None
    return len(part) if text.startswith(part) else None


def _cuts(borders: Sequence[int], text: str) -> tuple[int, ...]:
    return tuple(sorted({border for border in borders if 0 < border < len(text)}))
