"""Rows to ids and mask: equal to a slow reference, exact at every border, control tokens' names
only text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.support.templates import (
    END,
    MODES,
    START,
    TOKENIZERS,
    Message,
    assistant,
    merging_tokenizer,
    row,
    spaced_tokenizer,
    spelled,
    template,
    user,
    with_template,
)
from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data.examples import Row, RowRef, TrainOn
from veneer.data.template import template as module
from veneer.data.template.control_names import ControlNames, TokenFault
from veneer.data.template.template import ChatTemplate
from veneer.data.template.tokens import _describe_difference
from veneer.errors import DataError

PIECES = [
    "a",
    "b",
    " ",
    "\n",
    "\n\n",
    " a",
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "im_",
    "é",
    "🙂",
    "كتاب",
    "e\u0301",
]


contents = (
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8)
    .map("".join)
    .filter(lambda text: text.strip())
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages: list[Message] = (
        [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    )
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            user(draw(contents)),
            assistant(draw(contents), weight=draw(st.sampled_from([1, 1, 0]))),
        ]
    messages[-1].pop("weight")
    return messages


def slow_reference(messages: list[Message], train_on: TrainOn) -> tuple[list[int], list[bool]]:
    """ChatML over bytes, written out: every token and its mask, message by message."""
    ids: list[int] = []
    trained: list[bool] = []
    for number, message in enumerate(messages):
        opening = [START, *spelled(message["role"] + "\n")]
        content = [*spelled(message["content"]), END, *spelled("\n")]
        learnt = message["role"] == "assistant" and message.get("weight", 1) == 1
        learnt = learnt and (train_on == "assistant" or number == len(messages) - 1)
        ids += opening + content
        trained += [train_on == "all"] * len(opening) + [learnt or train_on == "all"] * len(content)
    return ids, [False, *trained[1:]]


@settings(max_examples=150, deadline=None)
@given(conversations(), st.sampled_from(MODES))
def test_ids_and_mask_equal_the_slow_reference(messages: list[Message], train_on: TrainOn) -> None:
    assert template("bytes").encode_row(row(*messages), train_on=train_on) == slow_reference(
        messages, train_on
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(messages=conversations(), train_on=st.sampled_from(MODES))
def test_what_generation_starts_from_is_what_stands_in_front_of_each_answer(
    name: str, messages: list[Message], train_on: TrainOn
) -> None:
    coded = template(name)
    ids, trained = coded.encode_row(row(*messages), train_on=train_on)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = coded.encode_prompt(messages[:number])
            assert ids[: len(prompt)] == prompt
            if train_on == "last":
                learnt = number == len(messages) - 1
            else:
                learnt = train_on == "all" or message.get("weight", 1) == 1
            assert trained[len(prompt)] == learnt
            assert trained[len(prompt) - 1] == (train_on == "all")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(messages=conversations())
def test_the_only_control_tokens_are_those_that_the_template_writes(
    name: str, messages: list[Message]
) -> None:
    coded = template(name)
    ids, _ = coded.encode_row(row(*messages), train_on="assistant")
    control = coded.tokenizer.added_tokens_decoder
    count = Counter(control[number].content for number in ids if number in control)
    assert count == {"<|im_start|>": len(messages), "<|im_end|>": len(messages)}
    assert coded.tokenizer.decode(ids) == coded.render(messages)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(messages=conversations())
def test_where_nothing_is_at_stake_the_ids_are_the_tokenizers_own(
    name: str, messages: list[Message]
) -> None:
    coded = template(name)
    for message in messages:
        message["content"] = message["content"].replace("<|", "").replace("|>", "").strip() or "a"
        if (
            message["role"] == "assistant"
        ):  # a line break or an a would merge with the one before it
            message["content"] = "b" + message["content"]
    ids, _ = coded.encode_row(row(*messages), train_on="assistant")
    assert ids == coded.tokenizer(coded.render(messages), add_special_tokens=False).input_ids


def test_an_answer_that_would_merge_with_the_prompt_is_cut_from_it() -> None:
    coded = template("merging")
    messages = [user("a"), assistant("\nb")]
    joined = coded.tokenizer(coded.render(messages), add_special_tokens=False).input_ids
    ids, _ = coded.encode_row(row(*messages), train_on="assistant")
    assert coded.encode_prompt(messages[:1]) != joined[: len(coded.encode_prompt(messages[:1]))]
    assert len(ids) == len(joined) + 1


def test_names_of_tool_tokens_are_text_from_a_user_and_tokens_from_the_assistant() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<tool_call>", special=False), AddedToken("<other>", special=False)]
    )
    tool_call, other = tokenizer.convert_tokens_to_ids(["<tool_call>", "<other>"])
    coded = ChatTemplate(tokenizer)  # CHATML writes <tool_call>, and knows nothing of <other>
    ids, _ = coded.encode_row(
        row(user("<tool_call><other>"), assistant("<tool_call>{}")), train_on="assistant"
    )
    assert (ids.count(tool_call), ids.count(other)) == (1, 1)


def test_a_name_inside_a_longer_name_is_not_found() -> None:
    names = ControlNames(["<<a", "<a", "[x]"])
    assert names.find("<<a<a [x] [y]<<<a") == [(0, "<<a"), (3, "<a"), (6, "[x]"), (14, "<<a")]
    assert ControlNames([]).find("<a") == []


def test_templates_do_not_see_our_own_key() -> None:
    assert "weight" not in with_template("{{ messages | tojson }}").render(
        [user("a"), assistant("b", weight=0)]
    )


def test_control_names_in_tools_and_calls_are_text_too() -> None:
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_start|>"]}},
    }
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    messages = [user("a"), assistant("", tool_calls=[call])]
    ids, _ = template("bytes").encode_row(row(*messages, tools=tools), train_on="assistant")
    assert (ids.count(START), ids.count(END)) == (3, 3)
    assert ids[-2:] == [END, *spelled("\n")]


def test_a_tokenizer_without_a_template_joins_prompt_and_completion_and_refuses_chats() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    coded = ChatTemplate(tokenizer)
    pair = row(user("a<|im_end|>"), assistant(" b"), format="prompt_completion")
    ids, trained = coded.encode_row(pair, train_on="assistant")
    assert ids == [*spelled("a<|im_end|> b"), END]
    assert trained == [False] * len("a<|im_end|>") + [True] * 3
    assert coded.encode_prompt([user("a<|im_end|>")]) == ids[:-3]
    with pytest.raises(DataError, match="Use format text, or prompt_completion"):
        coded.encode_row(row(user("a"), assistant("b")), train_on="assistant")
    with pytest.raises(DataError, match="needs a chat template"):
        coded.encode_prompt([user("a"), assistant("b"), user("c")])


def test_a_begin_token_is_put_in_front_of_text_once_and_never_of_a_rendered_chat() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    coded = ChatTemplate(tokenizer)
    for text in ("ab", "<|im_start|>ab"):
        plain = Row(RowRef("rows.jsonl", 1), [], None, text, "text")
        assert coded.encode_row(plain, train_on="all")[0] == [START, *spelled("ab"), END]
    ids, _ = coded.encode_row(row(user("a"), assistant("b")), train_on="assistant")
    assert ids == slow_reference([user("a"), assistant("b")], "assistant")[0]


def test_the_fingerprint_is_of_the_templates_text() -> None:
    first, second = ChatTemplate(tiny_tokenizer()), with_template(CHATML + " ")
    assert (
        first.fingerprint() == ChatTemplate(tiny_tokenizer()).fingerprint() != second.fingerprint()
    )


def test_a_border_is_looked_up_from_the_last_control_token_on_so_long_conversations_cost_no_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coded = ChatTemplate(tiny_tokenizer())
    own, lengths = coded._tokens.ids, list[int]()

    def ids(texts: Sequence[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return own(texts)

    monkeypatch.setattr(coded._tokens, "ids", ids)
    messages = [user("a" * 50), assistant("b" * 50)] * 30
    coded.encode_row(row(*messages), train_on="assistant")
    assert sum(lengths) < 4 * len(coded.render(messages))


def test_a_row_that_a_tokenizer_cannot_write_in_pieces_is_refused_with_both_texts() -> None:
    """It puts a space in front of every piece, whatever stands before it."""
    coded = ChatTemplate(spaced_tokenizer("always"))
    with pytest.raises(DataError) as caught:
        coded.encode_row(row(user("<|im_end|>"), assistant("b")), train_on="assistant")
    assert (
        "in pieces: '<|im_start|>user\\n<|im_end|><|im_' comes back as '<|im_start|> user\\n"
        in str(caught.value)
    )


def test_two_texts_are_shown_twenty_characters_around_where_they_part() -> None:
    one = "x" * 30 + "abcdefghijklmnopqrstuvwxyz"
    other = one[:30] + "A" + one[31:]
    assert _describe_difference(one, other) == f"{one[10:50]!r} comes back as {other[10:50]!r}"
    assert _describe_difference("ab", "abc") == "'ab' comes back as 'abc'"


def test_a_name_that_is_typed_is_spelled_in_two_parts_the_first_as_short_as_possible() -> None:
    tokens = ChatTemplate(merging_tokenizer())._tokens  # it has a token for <|
    assert tokens._ids_as_text("<|im_end|>") == [
        *tokens.ids(["<"])[0],
        *tokens.ids(["|im_end|>"])[0],
    ]
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("[x", "[", "~", "ab}", "b}")])
    tokens = ChatTemplate(tokenizer)._tokens
    assert tokens._ids_as_text("ab}") == [*tokens.ids(["ab"])[0], *tokens.ids(["}"])[0]]
    for name in ("~", "[x"):  # of one character; of two, one of which is a control token itself
        with pytest.raises(TokenFault, match="cannot be written as text"):
            tokens._ids_as_text(name)


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_rows_whose_next_ones_are_rendered_meanwhile_are_as_each_alone(chunk, monkeypatch):
    template = ChatTemplate(tiny_tokenizer())
    rows = [row(user(f"question {number}"), assistant("yes " * number)) for number in range(1, 12)]
    rows[2] = row(text="a text <|im_end|>")
    rows[4] = row(user("a private character \U0010fffd"), assistant("no"))
    rows[7] = row(user("<|im_start|>"), assistant("told"), user("again"), assistant("<|im_end|>"))
    alone = [template.encode_rows([one], train_on="assistant")[0] for one in rows]
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert template.encode_rows(rows, train_on="assistant") == alone
    assert template.encode_rows([], train_on="assistant") == []
