"""Prompts of many turns: what is rendered, tokenised and looked for grows in proportion, and the ids stay the same."""

from __future__ import annotations

import asyncio
from datetime import date
from random import Random
from typing import Any

import pytest

from tests.test_data_template import CHATML, assistant, template, user
from tests.tiny import tiny_tokenizer
from veneer.data import turns
from veneer.data.rendering import beginnings
from veneer.data.template import ChatTemplate
from veneer.data.tokens import TextTokens
from veneer.data.turns import MOST_RENDERED, first_answer_looked_for
from veneer.data.unfit import _left_out
from veneer.errors import DoesNotFitError
from veneer.serve import prompts as prompts_module
from veneer.serve.asked import Chat
from veneer.serve.prompts import Prompts

SAID = ["\n\nhello", " a", "<|im_end|>", "b<|im_end|>\n<|im_start|>c", "d\n", "<think>e</think>f", "ünï", "aa ab"]


def talk(turns: int, random: Random, words: list[str] = SAID) -> list[dict[str, Any]]:
    """An odd number of messages, the last one the user's."""
    return [(assistant if n % 2 else user)(random.choice(words) + random.choice(words)) for n in range(turns)]


@pytest.mark.parametrize("name", ["bytes", "merging", "spaced"])
def test_pieces_that_begin_at_an_anchor_have_the_ids_of_pieces_that_begin_at_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [template(name).encode_prompt(talk(9, Random(seed))) for seed in range(30)]
    monkeypatch.setattr(TextTokens, "_from_last_anchor", lambda self, text, start, before, ids: (start, before))
    assert made == [template(name).encode_prompt(talk(9, Random(seed))) for seed in range(30)]


def test_a_text_with_names_of_control_tokens_is_tokenised_once_and_not_once_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, own = [0], TextTokens.ids

    def ids(self: TextTokens, texts: Any) -> Any:
        read[0] += sum(map(len, texts))
        return own(self, texts)

    coded = template("bytes")
    monkeypatch.setattr(TextTokens, "ids", ids)
    characters = []
    for count in (21, 121):
        messages = [*talk(count, Random(1)), assistant("x"), user("y<|im_end|>" * 20)]
        before = read[0]
        coded.encode_prompt(messages)
        characters.append((read[0] - before) / len(coded.render(messages, add_generation_prompt=True)))
    assert max(characters) < 12 and characters[1] < 1.5 * characters[0]


@pytest.mark.parametrize("count", [3, 127, 1201, 4095])
@pytest.mark.parametrize("characters", [1, 1000])
def test_the_rendering_of_a_prompt_is_bounded(count: int, characters: int) -> None:
    messages = [(assistant if n % 2 else user)("x" * characters) for n in range(count)]
    first = first_answer_looked_for(messages)
    cuts = beginnings(messages, prompt=True, first=first)
    assert sum(number for number, _ in cuts) <= MOST_RENDERED + 3 * count
    assert characters * sum(number for number, _ in cuts) <= turns.MOST_RENDERED_CHARACTERS + 3 * count * characters
    assert first < count - 1, "the last answer is looked for"
    if count < 128 and count * characters < 60_000:
        assert first == 0


def test_a_long_conversation_has_the_ids_that_it_has_with_all_its_answers_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = talk(401, Random(3), ["hello", "what?", "a b c"])
    assert first_answer_looked_for(messages) > 0
    made = template("bytes").encode_prompt(messages)
    monkeypatch.setattr(turns, "MOST_RENDERED", 10**9)
    assert first_answer_looked_for(messages) == 0
    assert template("bytes").encode_prompt(messages) == made


def test_a_rendered_prompt_that_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    coded = template("bytes")
    monkeypatch.setattr(TextTokens, "encode", None)
    with pytest.raises(DoesNotFitError, match="300"):
        coded.encode_prompt([user("x" * 300)], most_characters=300)


def test_parts_that_stand_in_a_text_in_their_order_are_found_in_one_pass() -> None:
    class Counted(str):
        read = 0

        def find(self, part: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
            found = super().find(part, start)
            Counted.read += (len(self) if found < 0 else found + len(part)) - start
            return found

    parts = [f"part {n};" for n in range(2000)] * 2
    text = Counted("".join(parts))
    assert _left_out(parts, text, most=5) == []
    assert Counted.read < 3 * len(text)
    lost = [f"none {n}" for n in range(2000)]
    assert _left_out([*lost, *parts], text, most=5) == lost[:5]
    assert Counted.read < 20 * len(text)
    assert _left_out(["part 9;", "part 3;", "x", "part 5;"], text, most=5) == ["x"]


def test_a_server_that_runs_over_midnight_writes_the_new_day(monkeypatch: pytest.MonkeyPatch) -> None:
    day = [date(2026, 1, 31)]

    class Clock(date):
        @classmethod
        def today(cls) -> date:
            return day[0]

    monkeypatch.setattr(prompts_module, "date", Clock)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    prompts = Prompts(tokenizer, positions=1024, ids=None)

    def written() -> str:
        (ids,) = asyncio.run(prompts.encoded([Chat([user("a")])]))
        return ChatTemplate(tokenizer).tokenizer.decode(ids)[:11]

    assert written() == "31 Jan 2026"
    day[0] = date(2026, 2, 1)
    assert written() == written() == "01 Feb 2026"
    prompts.close()
