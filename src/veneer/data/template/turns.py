"""Finds the trained spans in a rendered conversation.

The span of an assistant turn is exact by construction: the rendering of the conversation including
the turn, without the rendering before it with the generation prompt. So it holds everything that
the model has to write, including the token that ends the turn. If one rendering is not the
beginning of the other, there is no such span; the error shows both.

Some templates render an answer differently once messages follow it: they drop its reasoning. Then a
row becomes several texts, each up to an answer, so that every answer is trained after exactly the
text that the model will see before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from veneer.data.examples import Row, RowFault, TrainOn
from veneer.data.template.reasoning import (
    Reasons,
    forbids_reasoning,
    opening_mark,
    reasons_of,
    thought_in,
    with_reasoning,
)
from veneer.data.template.rendering import Conversation
from veneer.data.template.sandbox import TemplateFault
from veneer.data.template.tokens import MarkedText
from veneer.data.template.unfit import check_contents, check_text, check_tools, show_difference

Show = Callable[[str], str]
"""Replaces sentinels by the names they hide."""


@dataclass(frozen=True)
class RenderedRow:
    """A rendered row before it is tokenised; positions are characters of `cut.text`.

    spans   [start, end) of the trained text
    roles   (role, end) of each message's rendering, as far as it is known
    upto    number of messages in it; None: all messages of the row
    reasons kind of reasoning at the start of each trained answer
    """

    cut: MarkedText
    spans: tuple[tuple[int, int], ...]
    roles: tuple[tuple[str, int], ...]
    control: int
    begin: tuple[int, ...] = ()  # ids in front of the text
    end: tuple[int, ...] = ()  # trained ids after the text
    upto: int | None = None
    reasons: tuple[Reasons, ...] = ()


def plan_chat(
    row: Row, chat: Conversation, control: int, train_on: TrainOn, show: Show
) -> list[RenderedRow]:
    """Renders the examples of a chat row. Raises RowFault, TemplateFault.

    chat: the row's messages and tools; control: number of control names hidden in them. The first
    examples are the row's earlier answers that the whole text renders differently.
    """
    messages = chat.messages
    whole = chat.text(len(messages), add_generation_prompt=False)
    check_text(whole)
    check_tools(row.messages, row.tools, show(whole), chat.template)
    check_contents(messages, whole)
    if train_on == "all":
        return [_rendered_row(chat, len(messages), whole, {}, control, whole_text=True)]
    texts: list[tuple[int, str, dict[int, tuple[int, int]]]] = [(len(messages), whole, {})]
    for number in reversed(_trained_answers(row, train_on)):
        turn, upto = _trained_turn(chat, number, show)
        turns_of_text = next((turns for _, text, turns in texts if text.startswith(upto)), None)
        if turns_of_text is None:
            check_text(upto)
            turns_of_text = {}
            texts.append((number + 1, upto, turns_of_text))
        turns_of_text[number] = turn
    with_turns = [entry for entry in texts if entry[2]] or texts
    return [
        _rendered_row(chat, count, text, turns, control)
        for count, text, turns in reversed(with_turns)
    ]


def _trained_answers(row: Row, train_on: TrainOn) -> list[int]:
    """Returns the numbers of the answers to train on."""
    last = len(row.messages) - 1
    return [
        number
        for number, message in enumerate(row.messages)
        if message["role"] == "assistant"
        and message.get("weight", 1) == 1
        and train_on in ("assistant", "last")
        if train_on == "assistant" or number == last
    ]


def _rendered_row(
    chat: Conversation,
    count: int,
    text: str,
    trained: Mapping[int, tuple[int, int]],
    control: int,
    *,
    whole_text: bool = False,
) -> RenderedRow:
    """Describes the text of the first `count` messages. trained: the turns of trained answers"""
    messages = chat.messages[:count]
    borders: list[int] = []
    roles: list[tuple[str, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            next_message = messages[number + 1] if number < count - 1 else None
            if next_message is not None and next_message["role"] != "assistant":
                end = _end_of_messages(chat, number + 1, text)
                roles += [] if end is None else [(message["role"], end)]
            continue
        turn = trained.get(number) or turn_of(chat, number, text)
        if turn is None or (borders and turn[0] < borders[-1]):
            if number in trained:
                raise RowFault(
                    "D202", f"message {number + 1} overlaps the answer before it as rendered"
                )
            continue
        if number > 0:
            roles.append((messages[number - 1]["role"], turn[0]))
        roles.append(("assistant", turn[1]))
        borders += turn
    if not roles or roles[-1][1] < len(text):
        roles.append((messages[-1]["role"], len(text)))
    spans = [(0, len(text))] if whole_text else [trained[number] for number in sorted(trained)]
    marks = tuple(end for _, end in roles)
    reasons = tuple(
        reasons_of(messages[number], text[slice(*trained[number])]) for number in sorted(trained)
    )
    marked = MarkedText(text, _inner_borders(borders, text), marks)
    return RenderedRow(marked, tuple(spans), tuple(roles), control, upto=count, reasons=reasons)


def _trained_turn(chat: Conversation, number: int, show: Show) -> tuple[tuple[int, int], str]:
    """Finds a trained answer in the rendering up to it. Returns its span and that text."""
    prompt = chat.text(number, add_generation_prompt=True)
    upto = chat.text(number + 1, add_generation_prompt=False)
    if upto.startswith(prompt):
        return (len(prompt), len(upto)), upto
    thought = thought_in(chat.messages[number])
    if (
        thought
        and (with_thought := with_reasoning(prompt, upto, chat.messages[number])) is not None
    ):
        return (len(prompt), len(with_thought)), with_thought
    step = "The answers must begin like the template's generation prompt."
    if thought and forbids_reasoning(prompt):
        step += (
            " This one reasons, and the prompt forbids it: template: {variables: {enable_thinking:"
            " true}}?"
        )
    elif not thought and opening_mark(prompt):
        step += (
            " This one does not reason, and the prompt opens it: template: {variables:"
            " {enable_thinking: false}}?"
        )
    raise RowFault(
        "D202",
        "the chat template's text before an answer is not the beginning of its text with the"
        " answer",
        step,
        show_difference("before", show(prompt), "with it", show(upto)),
    )


def turn_of(chat: Conversation, number: int, text: str) -> tuple[int, int] | None:
    """Finds an assistant turn in the text. Returns None if it has no exact span."""
    try:
        prompt = chat.text(number, add_generation_prompt=True)
        upto = chat.text(number + 1, add_generation_prompt=False)
    except TemplateFault:
        return None
    return (len(prompt), len(upto)) if upto.startswith(prompt) and text.startswith(upto) else None


def borders_of(chat: Conversation, text: str) -> tuple[int, ...]:
    """Finds the borders of the answers in a prompt, equal to those in the training row."""
    answers = [
        number for number, message in enumerate(chat.messages) if message["role"] == "assistant"
    ]
    return merge_borders([turn_of(chat, number, text) for number in answers], text)


def merge_borders(turns: Sequence[tuple[int, int] | None], text: str) -> tuple[int, ...]:
    """Returns the borders of all turns. An answer that overlaps the previous one is skipped."""
    borders: list[int] = []
    for turn in turns:
        if turn is not None and not (borders and turn[0] < borders[-1]):
            borders += turn
    return _inner_borders(borders, text)


def _end_of_messages(chat: Conversation, count: int, text: str) -> int | None:
    """Returns where the rendering of these messages ends, if the text begins with it."""
    try:
        part = chat.text(count, add_generation_prompt=False)
    except TemplateFault:  # some templates require a user message at the end
        return None
    return len(part) if text.startswith(part) else None


def _inner_borders(borders: Sequence[int], text: str) -> tuple[int, ...]:
    return tuple(sorted({border for border in borders if 0 < border < len(text)}))
