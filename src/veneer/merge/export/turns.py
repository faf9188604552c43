"""A chat template as turns: fixed words around each content, and words that open an answer.

Most templates have this form. The words are found by rendering known contents and cutting them out.
Then the turns are compared with the template on several conversations. Knows nothing of other
programs' template languages (ollama.py).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

from veneer.data.template.template import ChatTemplate
from veneer.errors import DataError, RefusedError

Messages = list[dict[str, str]]
_SYSTEM, _ASKED, _ANSWER, _AGAIN = "Zsystem1", "Zasked2", "Zanswer3", "Zagain4"
_LONG = (
    "First line.\n\nThen {{ braces }}, {% more %}, naïve größe 漢字 🙂 and 1234 + 5.\n\tIndented."
)


@dataclass(frozen=True)
class TurnTemplate:
    """Holds the words of a template. around: role -> (words before its content, words after it).

    bare: start of a conversation without a system turn. opens: words before an answer. folds: the
    system's text is inside the first user's turn, whose words before it belong to the system's.
    """

    around: Mapping[str, tuple[str, str]]
    bare: str
    opens: str
    folds: bool = False

    def render(self, messages: Messages) -> str:
        """Renders a conversation up to the start of the answer. KeyError: a role without words."""
        text, previous_role = "" if messages[0]["role"] == "system" else self.bare, ""
        for message in messages:
            prefix, suffix = self.around[message["role"]]
            open_already = self.folds and (previous_role, message["role"]) == ("system", "user")
            text += ("" if open_already else prefix) + message["content"] + suffix
            previous_role = message["role"]
        return text + self.opens


def turns_of(template: ChatTemplate) -> tuple[TurnTemplate, list[str]]:
    """Returns the template as turns, and what they do not express, in words.

    RefusedError: it is not a sequence of turns, for conversations of user and assistant, with or
    without a system turn.
    """
    if not template.source:
        raise RefusedError(
            "this base has no chat template, so there is none to translate", [], INSTEAD
        )
    if template.writes_date:
        raise RefusedError(
            "the chat template writes today's date, which other programs cannot", [], INSTEAD
        )
    try:
        turns = _cut_out(template)
    except (DataError, ValueError) as fault:
        raise RefusedError(
            "this chat template is not a sequence of turns", [str(fault)], INSTEAD
        ) from None
    if wrong := [
        name
        for name, messages in _needed("system" in turns.around)
        if not _same(turns, template, messages)
    ]:
        raise RefusedError(
            "this chat template is not a sequence of turns",
            [f"it differs on {name}" for name in wrong],
            INSTEAD,
        )
    notes = (
        []
        if "system" in turns.around
        else ["the base's template takes no system turn: one is left out"]
    )
    for name, messages in _BEYOND:
        if _known(turns, messages) and not _same(turns, template, messages):
            notes.append(f"not as the base's template: {name}")
    return turns, notes


INSTEAD = "veneer export --to llamacpp --merged writes a file that carries the base's own template."


def _cut_out(template: ChatTemplate) -> TurnTemplate:
    """Cuts the words out of rendered texts. ValueError: they are not where turns would have
    them.
    """
    tokens = {
        token.content: chr(_WHOLE + n)
        for n, token in template.tokenizer.added_tokens_decoder.items()
    }

    def between(messages: Messages) -> list[str]:
        """Returns the text before each content, and after the last; a token stays whole."""
        text, parts = template.render(messages, add_generation_prompt=True), []
        for message in messages:
            before, mark, text = text.partition(message["content"])
            if not mark:
                raise ValueError(
                    f"the {message['role']}'s text is not written as it stands, or not in its place"
                )
            parts.append(before)
        return [_exchanged(part, tokens) for part in [*parts, text]]

    talk = [_turn("user", _ASKED), _turn("assistant", _ANSWER)]
    front, to_answer, to_next, to_open = between([*talk, _turn("user", _AGAIN)])
    *_, answered = between(talk)
    before_system, to_user = "", front
    with suppress(DataError):  # a template may refuse a system turn
        before_system, to_user, *_ = between([_turn("system", _SYSTEM), *talk])
    user = _common_end(front, to_next)
    folds = (
        bool(before_system and user)
        and before_system.startswith(front)
        and not to_user.endswith(user)
    )
    user = user if folds else _common_end(user, to_user)
    behind_answer = _without_end(to_next, user)
    opens = _without_start(answered, behind_answer)
    if not to_open.endswith(opens):
        raise ValueError("what opens an answer depends on what stands in front of it")
    behind_user = _without_end(to_open, opens)
    words = {
        "user": (user, behind_user),
        "assistant": (_without_start(to_answer, behind_user), behind_answer),
    }
    bare = _without_end(front, user)
    if before_system:
        words["system"] = (before_system, to_user if folds else _without_end(to_user, user))
        ending = _ending([user, words["assistant"][0], opens], before_system[0]) if bare else ""
        words = {
            role: (a if role == "system" else a[len(ending) :], b + ending)
            for role, (a, b) in words.items()
        }
        bare, opens = bare + ending, opens[len(ending) :]
    back = {character: token for token, character in tokens.items()}
    around = {role: (_exchanged(a, back), _exchanged(b, back)) for role, (a, b) in words.items()}
    return TurnTemplate(around, _exchanged(bare, back), _exchanged(opens, back), folds)


def _ending(begins: Sequence[str], turn: str) -> str:
    """Returns the common start of these words before the character that begins a turn: it ends the
    turn before.
    """
    end, _, _ = begins[0].partition(turn)
    return end if all(begin.startswith(end + turn) for begin in begins) else ""


_WHOLE = 0xF0000
"""First of the private characters that stand for tokens."""


def _exchanged(text: str, words: Mapping[str, str]) -> str:
    for word in sorted(words, key=len, reverse=True):
        text = text.replace(word, words[word])
    return text


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("what stands behind a turn depends on the next one")
    return text[len(start) :]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _common_end(a: str, b: str) -> str:
    alike = list(
        takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False))
    )
    return a[len(a) - len(alike) :]


def _without_end(text: str, end: str) -> str:
    return text[: len(text) - len(end)]


def _needed(system: bool) -> list[tuple[str, Messages]]:
    talk = [_turn("user", _LONG), _turn("assistant", _LONG), _turn("user", "And?")]
    conversations = [
        ("a question", talk[2:]),
        ("a conversation", talk),
        ("a long conversation", [*talk[:2], *talk[:2], *talk]),
    ]
    return conversations + (
        [
            (f"{name} behind a system turn", [_turn("system", _LONG), *messages])
            for name, messages in conversations
        ]
        if system
        else []
    )


_BEYOND: Sequence[tuple[str, Messages]] = [
    ("spaces around what a user says", [_turn("user", "  spaced \n")]),
    (
        "spaces around an earlier answer",
        [_turn("user", "a"), _turn("assistant", "\n spaced "), _turn("user", "b")],
    ),
    ("spaces around a system turn", [_turn("system", " spaced \n"), _turn("user", "a")]),
    ("an answer that is to go on", [_turn("user", "a"), _turn("assistant", "b")]),
    ("a later system turn", [_turn("user", "a"), _turn("system", "b"), _turn("user", "c")]),
    (
        "reasoning in earlier answers",
        [_turn("user", "a"), _turn("assistant", "<think>\nb\n</think>\n\nc"), _turn("user", "d")],
    ),
]


def _known(turns: TurnTemplate, messages: Messages) -> bool:
    return all(message["role"] in turns.around for message in messages)


def _same(turns: TurnTemplate, template: ChatTemplate, messages: Messages) -> bool:
    try:
        return turns.render(messages) == template.render(messages, add_generation_prompt=True)
    except DataError:
        return False
