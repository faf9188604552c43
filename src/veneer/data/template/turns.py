"""Where in a rendered conversation what is trained begins and ends.

The span of an assistant turn is exact by construction: it is what the template renders of the
conversation up to and including the turn, less what it renders up to it with the generation prompt.
So it holds everything that the model has to write, the token that ends the turn included. A
template of which one rendering is not the beginning of the other has no such span; that is an error
which shows both.

Some templates render an answer otherwise once messages follow it: its reasoning is left out. Then a
row becomes several texts, each up to an answer, so that every answer is learnt behind exactly what
the model will see in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from veneer.data.examples import Row, TrainOn
from veneer.data.template.reasoning import (
    Reasons,
    forbids_reasoning,
    opens_reasoning,
    reasons_of,
    thought_in,
    with_reasoning,
)
from veneer.data.template.rendering import Conversation
from veneer.data.template.sandbox import TemplateFault
from veneer.data.template.tokens import Cut
from veneer.data.template.unfit import Unfit, check_contents, check_text, check_tools, parting

Show = Callable[[str], str]
"""A text as people read it, hidden names in it."""


@dataclass(frozen=True)
class Plan:
    """What is known of a row before it is tokenised, in characters of `cut.text`.

    spans   [start, end) of what is trained
    roles   (role, end) of what each message rendered to, as far as it is known
    upto    messages in it; None: all of the row's
    reasons what of reasoning each learnt answer begins with
    """

    cut: Cut
    spans: tuple[tuple[int, int], ...]
    roles: tuple[tuple[str, int], ...]
    control: int
    begin: tuple[int, ...] = ()  # ids in front
    end: tuple[int, ...] = ()  # ids behind, trained
    upto: int | None = None
    reasons: tuple[Reasons, ...] = ()


def plan_chat(
    row: Row, chat: Conversation, control: int, train_on: TrainOn, show: Show
) -> list[Plan]:
    """chat: the row's messages and tools, rendered; control: names hidden in them. Raises Unfit,
    TemplateFault.

    The first plans are of the row's earlier answers, where the whole text does not hold them as
    they were answered.
    """
    messages = chat.messages
    whole = chat.text(len(messages), add_generation_prompt=False)
    check_text(whole)
    check_tools(row.messages, row.tools, show(whole), chat.template)
    check_contents(messages, whole)
    if train_on == "all":
        return [_plan(chat, len(messages), whole, {}, control, all_of_it=True)]
    texts: list[tuple[int, str, dict[int, tuple[int, int]]]] = [(len(messages), whole, {})]
    for number in reversed(_learnt(row, train_on)):
        turn, upto = _answer(chat, number, show)
        home = next((turns for _, text, turns in texts if text.startswith(upto)), None)
        if home is None:
            check_text(upto)
            home = {}
            texts.append((number + 1, upto, home))
        home[number] = turn
    learns = [each for each in texts if each[2]] or texts
    return [_plan(chat, count, text, turns, control) for count, text, turns in reversed(learns)]


def _learnt(row: Row, train_on: TrainOn) -> list[int]:
    """Numbers of the answers that are learnt."""
    last = len(row.messages) - 1
    return [
        number
        for number, message in enumerate(row.messages)
        if message["role"] == "assistant"
        and message.get("weight", 1) == 1
        and train_on in ("assistant", "last")
        if train_on == "assistant" or number == last
    ]


def _plan(
    chat: Conversation,
    count: int,
    text: str,
    learnt: Mapping[int, tuple[int, int]],
    control: int,
    *,
    all_of_it: bool = False,
) -> Plan:
    """Of the text of the first `count` messages. learnt: the turns of the answers that are."""
    messages = chat.messages[:count]
    borders: list[int] = []
    roles: list[tuple[str, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            following = messages[number + 1] if number < count - 1 else None
            if following is not None and following["role"] != "assistant":
                end = _end_of(chat, number + 1, text)
                roles += [] if end is None else [(message["role"], end)]
            continue
        turn = learnt.get(number) or turn_of(chat, number, text)
        if turn is None or (borders and turn[0] < borders[-1]):
            if number in learnt:
                raise Unfit(
                    "D202", f"message {number + 1} overlaps the answer before it as rendered"
                )
            continue
        if number > 0:
            roles.append((messages[number - 1]["role"], turn[0]))
        roles.append(("assistant", turn[1]))
        borders += turn
    if not roles or roles[-1][1] < len(text):
        roles.append((messages[-1]["role"], len(text)))
    spans = [(0, len(text))] if all_of_it else [learnt[number] for number in sorted(learnt)]
    marks = tuple(end for _, end in roles)
    reasons = tuple(
        reasons_of(messages[number], text[slice(*learnt[number])]) for number in sorted(learnt)
    )
    cut = Cut(text, _cuts(borders, text), marks)
    return Plan(cut, tuple(spans), tuple(roles), control, upto=count, reasons=reasons)


def _answer(chat: Conversation, number: int, show: Show) -> tuple[tuple[int, int], str]:
    """Where an answer that is learnt stands in what is rendered up to it, and that text."""
    prompt = chat.text(number, add_generation_prompt=True)
    upto = chat.text(number + 1, add_generation_prompt=False)
    if upto.startswith(prompt):
        return (len(prompt), len(upto)), upto
    thought = thought_in(chat.messages[number])
    if thought and (written := with_reasoning(prompt, upto, chat.messages[number])) is not None:
        return (len(prompt), len(written)), written
    step = "The answers must begin as the template's generation prompt does."
    if thought and forbids_reasoning(prompt):
        step += (
            " This one reasons, and the prompt forbids it: template: {variables: {enable_thinking:"
            " true}}?"
        )
    elif not thought and opens_reasoning(prompt):
        step += (
            " This one does not reason, and the prompt opens it: template: {variables:"
            " {enable_thinking: false}}?"
        )
    raise Unfit(
        "D202",
        "what the chat template renders before an answer is not the beginning of what it renders"
        " with it",
        step,
        parting("before", show(prompt), "with it", show(upto)),
    )


def turn_of(chat: Conversation, number: int, text: str) -> tuple[int, int] | None:
    """Where an assistant turn begins and ends in the text. None if it has no exact place."""
    try:
        prompt = chat.text(number, add_generation_prompt=True)
        upto = chat.text(number + 1, add_generation_prompt=False)
    except TemplateFault:
        return None
    return (len(prompt), len(upto)) if upto.startswith(prompt) and text.startswith(upto) else None


def borders_of(chat: Conversation, text: str) -> tuple[int, ...]:
    """The same borders in a prompt as in the row that it is the beginning of."""
    answers = [
        number for number, message in enumerate(chat.messages) if message["role"] == "assistant"
    ]
    return joined([turn_of(chat, number, text) for number in answers], text)


def joined(turns: Sequence[tuple[int, int] | None], text: str) -> tuple[int, ...]:
    """Returns the borders of the answers of a text. An answer that overlaps the one before it has
    none."""
    borders: list[int] = []
    for turn in turns:
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
