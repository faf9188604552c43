"""Prompts of many turns: what is rendered, tokenised and looked for grows in proportion, and the
ids stay the same."""

from __future__ import annotations

import asyncio
from datetime import date
from itertools import accumulate
from random import Random
from typing import Any

import pytest

from tests.support.templates import TOKENIZERS, assistant, row, template, user
from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data.template import long_turns, tokens
from veneer.data.template import template as template_module
from veneer.data.template.long_turns import _turns_in
from veneer.data.template.rendering import Conversation
from veneer.data.template.template import ChatTemplate
from veneer.data.template.tokens import TextTokenizer
from veneer.data.template.unfit import _missing_parts
from veneer.errors import DataError, DoesNotFitError
from veneer.serve.engine import prompts as prompts_module
from veneer.serve.engine.prompts import Prompts
from veneer.serve.protocols.request import ChatPrompt

SAID = [
    "\n\nhello",
    " a",
    "<|im_end|>",
    "b<|im_end|>\n<|im_start|>c",
    "d\n",
    "<think>e</think>f",
    "ünï",
    "aa ab",
]


def talk(turns: int, random: Random, words: list[str] = SAID) -> list[dict[str, Any]]:
    """An odd number of messages, the last one the user's."""
    return [
        (assistant if n % 2 else user)(random.choice(words) + random.choice(words))
        for n in range(turns)
    ]


@pytest.mark.parametrize("name", ["bytes", "merging", "spaced"])
def test_pieces_that_begin_at_an_anchor_have_the_ids_of_pieces_that_begin_at_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [template(name).encode_prompt(talk(9, Random(seed))) for seed in range(30)]
    monkeypatch.setattr(
        TextTokenizer, "_from_last_anchor", lambda self, text, start, border, ids: (start, 0)
    )
    assert made == [template(name).encode_prompt(talk(9, Random(seed))) for seed in range(30)]


def test_a_text_with_names_of_control_tokens_is_tokenised_once_and_not_once_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, own = [0], TextTokenizer.ids

    def ids(self: TextTokenizer, texts: Any) -> Any:
        read[0] += sum(map(len, texts))
        return own(self, texts)

    coded = template("bytes")
    monkeypatch.setattr(TextTokenizer, "ids", ids)
    characters = []
    for count in (21, 121):
        messages = [*talk(count, Random(1)), assistant("x"), user("y<|im_end|>" * 20)]
        before = read[0]
        coded.encode_prompt(messages)
        characters.append(
            (read[0] - before) / len(coded.render(messages, add_generation_prompt=True))
        )
    assert max(characters) < 12 and characters[1] < 1.5 * characters[0]


PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\nA:{% else %}{{ m.content"
    " }}\n{% endif %}{% endfor %}"
)
THINKING = (  # as many do: reasoning is written where no user's message follows
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last"
    " = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if"
    " m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n{% endif %}{{"
    " m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
    " endif %}"
)
COUNTING = PLAIN.replace("Q:", "Q{{ loop.index }}:")
WORDS = ["hello", "what?", " a b", "b\n", "ab\n\n", "\na"]


def coded(source: str, name: str = "merging") -> ChatTemplate:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def row_ids(coded: ChatTemplate, messages: list[dict[str, Any]]) -> list[int]:
    return coded.encode_row(row(*messages), train_on="last")[0]


@pytest.mark.parametrize("source", [PLAIN, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize("answers", [3, 95, 200])
def test_a_prompt_has_the_ids_of_the_row_and_shares_those_of_the_prompt_before(
    source: str, answers: int
) -> None:
    messages = talk(2 * answers, Random(answers), WORDS)
    chat = coded(source)
    prompt, earlier = chat.encode_prompt(messages[:-1]), chat.encode_prompt(messages[:-3])
    ids = row_ids(chat, messages)
    assert ids[: len(prompt)] == prompt
    assert prompt[: len(earlier)] == earlier


@pytest.mark.parametrize("name", ["bytes", "merging", "spaced"])
def test_a_text_that_is_tokenised_in_parts_has_the_same_ids(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = coded(PLAIN, name)
    talks = [talk(12, Random(seed), [*WORDS, "b<|im_end|>\n"]) for seed in range(10)]
    whole = [(chat.encode_prompt(messages[:-1]), row_ids(chat, messages)) for messages in talks]
    monkeypatch.setattr(tokens, "MOST_REPEATED", 20)
    assert len(chat._tokens._part_starts(tokens.MarkedText("a" * 90, tuple(range(5, 90, 5))))) > 3
    assert [
        (chat.encode_prompt(messages[:-1]), row_ids(chat, messages)) for messages in talks
    ] == whole


@pytest.mark.parametrize("source", [PLAIN, CHATML, THINKING, "{{ bos_token }}" + PLAIN])
@pytest.mark.parametrize("kind", ["turns", "calls"])
def test_windows_find_the_borders_that_the_exact_search_finds(
    source: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "system", "content": "s"}, *talk(81, Random(5), WORDS)]
    if kind == "calls":  # a single request, then answers and replies of tools
        messages[3::2] = [{"role": "tool", "content": f"r{n}"} for n in range(len(messages[3::2]))]
        source = source.replace("{% if m.role == 'user' %}Q", "{% if m.role != 'assistant' %}Q")
    chat = coded(source)
    conversation = chat._conversation(messages, None)
    text = conversation.text(len(messages), add_generation_prompt=True)
    exact = long_turns.prompt_borders(conversation, text)
    monkeypatch.setattr(long_turns, "MOST_RENDERED", 2500)
    searched = []
    monkeypatch.setattr(
        long_turns, "_turns_in", lambda *given, own=_turns_in: searched.append(1) or own(*given)
    )
    assert long_turns.prompt_borders(conversation, text) == exact
    assert searched and bool(exact) == (source is not THINKING or kind == "calls")


def test_a_long_conversation_whose_windows_do_not_hold_is_refused_by_name() -> None:
    chat = coded(COUNTING)
    messages = talk(2 * 95, Random(1), WORDS)
    assert row_ids(chat, messages)[: len(prompt := chat.encode_prompt(messages[:-1]))] == prompt
    with pytest.raises(
        DataError,
        match=r"with 300 answers is too long.*the chat template renders a message differently",
    ):
        chat.encode_prompt(talk(601, Random(1), WORDS))


@pytest.mark.parametrize("source", [PLAIN, CHATML], ids=["plain", "chatml"])
def test_the_work_for_1200_answers_is_in_proportion_to_their_text(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered, read = [0], [0]
    own_request, own_ids = Conversation.request, TextTokenizer.ids

    def request(self: Conversation, cuts: Any) -> bytes:
        rendered[0] += sum(count for count, _ in cuts)
        return own_request(self, cuts)

    def ids(self: TextTokenizer, texts: Any) -> Any:
        read[0] += sum(map(len, texts))
        return own_ids(self, texts)

    chat = coded(source)
    monkeypatch.setattr(Conversation, "request", request)
    monkeypatch.setattr(TextTokenizer, "ids", ids)
    work = []
    for answers in (300, 1200):
        messages = talk(2 * answers + 1, Random(1), WORDS)
        rendered[0] = read[0] = 0
        chat.encode_prompt(messages)
        work.append((rendered[0], read[0]))
    (few, short), (many, long) = work
    assert many < 5 * few and many < long_turns.MOST_RENDERED
    assert long < 8 * short and long < 2**22


def test_a_row_of_1200_answers_begins_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = talk(2400, Random(2), WORDS)
    monkeypatch.setattr(template_module, "beginnings", lambda messages: [(len(messages), False)])
    for source, opens in ((PLAIN, ""), (CHATML, "<|im_start|>assistant\n")):
        chat = coded(source)
        prompt, earlier = chat.encode_prompt(messages[:-1]), chat.encode_prompt(messages[:-3])
        assert prompt[: len(earlier)] == earlier
        rendered = {str(message): chat.render([message]) for message in messages[:200]}
        parts = [rendered.get(str(message)) or chat.render([message]) for message in messages]
        whole, ends = "".join(parts), [0, *accumulate(map(len, parts))]
        assert whole == chat.render(messages)

        def text(  # 2,400 renderings of up to 2,400 messages take a minute
            self: Conversation,
            count: int,
            *,
            add_generation_prompt: bool,
            whole=whole,
            ends=ends,
            opens=opens,
        ) -> str:
            return whole[: ends[count]] + opens * add_generation_prompt

        with monkeypatch.context() as patched:
            patched.setattr(Conversation, "text", text)
            assert row_ids(chat, messages)[: len(prompt)] == prompt


def test_a_rendered_prompt_that_cannot_fit_is_not_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coded = template("bytes")
    monkeypatch.setattr(TextTokenizer, "encode", None)

    def refuse_long(text: str) -> None:
        raise DoesNotFitError(f"{text.count('x')} characters")

    with pytest.raises(DoesNotFitError, match="300"):
        coded.encode_prompt([user("x" * 300)], refuse_long=refuse_long)


def test_parts_that_stand_in_a_text_in_their_order_are_found_in_one_pass() -> None:
    class Counted(str):
        read = 0

        def find(self, part: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
            found = super().find(part, start)
            Counted.read += (len(self) if found < 0 else found + len(part)) - start
            return found

    parts = [f"part {n};" for n in range(2000)] * 2
    text = Counted("".join(parts))
    assert _missing_parts(parts, text, most=5) == []
    assert Counted.read < 3 * len(text)
    lost = [f"none {n}" for n in range(2000)]
    assert _missing_parts([*lost, *parts], text, most=5) == lost[:5]
    assert Counted.read < 20 * len(text)
    assert _missing_parts(["part 9;", "part 3;", "x", "part 5;"], text, most=5) == ["x"]


def test_a_server_that_runs_over_midnight_writes_the_new_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        (ids,) = asyncio.run(prompts.encoded([ChatPrompt([user("a")])]))
        return ChatTemplate(tokenizer).tokenizer.decode(ids)[:11]

    assert written() == "31 Jan 2026"
    day[0] = date(2026, 2, 1)
    assert written() == written() == "01 Feb 2026"
    prompts.close()
