"""Rows to ids and mask: equal to a slow reference, exact at every border, control tokens' names
only text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data.examples import Row, RowRef, TrainOn
from veneer.data.template import template as module
from veneer.data.template.control_names import ControlNames, TokenFault
from veneer.data.template.template import ChatTemplate
from veneer.data.template.tokens import _describe_difference
from veneer.errors import DataError

START, END, PAD = 256, 257, 258
Message = dict[str, Any]
MODES: tuple[TrainOn, ...] = ("assistant", "last", "all")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def row(*messages: Message, **more: Any) -> Row:
    return Row(RowRef("rows.jsonl", 1), list(messages), **more)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with merges that cross the end of the generation prompt ("\\n\\n") and of a turn, and
    words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ċ", "Ċ"),
        ("ĊĊ", "Ċ"),
        ("Ċ", "a"),
        ("Ġ", "a"),
        ("a", "b"),
        ("Ġa", "b"),
        ("Ġ", "Ġ"),
        ("<", "|"),
    ]
    vocabulary = {token: n for n, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return dressed(backend)


def spaced_tokenizer(prepend: str = "first") -> PreTrainedTokenizerFast:
    """As sentencepiece does: a space in front of the text's first word, spaces as ▁, rare
    characters as bytes."""
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *map(chr, range(33, 127)), "\n"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁"), ("\n", "\n")]
    tokens += [a + b for a, b in merges]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return dressed(backend)


def dressed(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {"bytes": tiny_tokenizer, "merging": merging_tokenizer, "spaced": spaced_tokenizer}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(TOKENIZERS[name]())


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


@cache
def character(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False).input_ids)


def spelled(text: str) -> list[int]:
    """One character at a time, so that no control token can come of it."""
    return [number for one in text for number in character(one)]


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


ODD = {
    "generation tag": (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration "
        "%};{% endfor %}"
    ),
    "break": (
        "{% for m in messages %}{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{%"
        " endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor"
        " %}{{ ns.n }}"
    ),
    "tojson": "{{ messages | tojson(indent=2) }}{{ dict(a='<&>') | tojson }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "absent keys": (
        "{% for m in messages %}{{ m.name is defined }}{{ 'tool_calls' in m }}{% endfor %}{{ tools "
        "is none }}"
    ),
    "whitespace control": (
        "{% for m in messages %}\n    {% if m %}\n  {{ m.content }}\n    {% endif %}\n{% endfor"
        " %}\n"
    ),
    "date": "{{ strftime_now('%d %b %Y') }}",
    "generation prompt": "{% if add_generation_prompt %}yes{% else %}no{% endif %}",
}


@pytest.mark.parametrize("source", [CHATML, *ODD.values()], ids=["chatml", *ODD])
def test_a_template_renders_as_transformers_renders_it(source: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    messages = [user("a & b"), assistant("é", name=None, reasoning="hm"), user("c"), assistant("d")]
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        assert ChatTemplate(tokenizer).render(messages, add_generation_prompt=prompt) == expected


HOSTILE = {
    "raise": "{{ raise_exception('roles must alternate') }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (messages | attr('append'))(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no arithmetic": "{{ 1 / 0 }}",
    "syntax": "{% for %}",
    "undefined": "{{ messages[0].content + nothing }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_fails_or_reaches_out_is_an_error_with_its_message(source: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(DataError, match=r"D201 rows\.jsonl:1  the chat template "):
        ChatTemplate(tokenizer).encode_row(row(user("a"), assistant("b")), train_on="assistant")


def with_template(source: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


LAST_DIFFERS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}THINK {%"
    " endif %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{%"
    " endif %}"
)


@pytest.mark.parametrize("wrong", [3, 0.5, ["a"], {"default": 3}, {"default": None}])
def test_a_template_that_is_no_text_is_refused_by_what_it_is(wrong: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = wrong
    with pytest.raises(DataError, match="is not text"):
        ChatTemplate(tokenizer)


def test_a_template_that_writes_half_a_character_is_refused() -> None:
    half = with_template(CHATML + "{{ '\\ud83d' }}")
    for ask in (
        lambda: half.encode_row(row(user("a"), assistant("b")), train_on="last"),
        lambda: half.encode_prompt([user("a")]),
        lambda: half.render([user("a")]),
    ):
        with pytest.raises(DataError, match="half a character"):
            ask()


def examples_of(
    coded: ChatTemplate, *messages: Message, train_on: TrainOn = "assistant"
) -> list[tuple[str, str]]:
    """(what stands in front, what is learnt) of each example that the row becomes, as text."""
    (found,) = coded.encode_rows([row(*messages)], train_on=train_on)
    assert isinstance(found, list)
    made = []
    for each in found:
        first = each.trained.index(True)
        assert all(each.trained[first:])
        made.append(
            (coded.tokenizer.decode(each.ids[:first]), coded.tokenizer.decode(each.ids[first:]))
        )
    return made


def test_where_a_template_changes_earlier_answers_each_is_learnt_as_it_was_answered() -> None:
    coded = with_template(LAST_DIFFERS)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    last = (
        "<user>a<|im_end|><assistant>b<|im_end|><user>c<|im_end|><assistant>",
        "THINK d<|im_end|>",
    )
    assert examples_of(coded, *messages) == [
        ("<user>a<|im_end|><assistant>", "THINK b<|im_end|>"),
        last,
    ]
    assert examples_of(coded, *messages, train_on="last") == [last]
    with pytest.raises(DataError, match="becomes 2 examples"):
        coded.encode_row(row(*messages), train_on="assistant")
    shown = examples_of(coded, user("a"), assistant("b", weight=0), *messages[2:])
    assert shown == [last]


def test_a_generation_prompt_that_the_answer_does_not_begin_with_is_refused() -> None:
    coded = with_template(
        CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>' }}{%- endif")
    )
    with pytest.raises(DataError) as error:
        coded.encode_row(row(user("a"), assistant("b")), train_on="last")
    assert ">>> '<think>'" in str(error.value)
    assert ">>> 'b<|im_end|>" in str(error.value)


def test_tools_and_contents_that_the_template_leaves_out_are_refused() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    plain = with_template("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(DataError, match="does not render tools: weather"):
        plain.encode_row(row(user("a"), assistant("b"), tools=tools), train_on="last")
    with pytest.raises(DataError, match="does not render tools: weather"):
        plain.encode_row(row(user("a"), assistant("", tool_calls=[call])), train_on="last")
    in_parts = with_template(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}"
    )
    with pytest.raises(DataError, match="leaves out the text of message 1"):
        in_parts.encode_row(row(user("abc"), assistant("b")), train_on="last")
    with pytest.raises(DataError, match="does not render tools: weather"):
        plain.encode_prompt([user("a")], tools=tools)
    with pytest.raises(DataError, match="leaves out the text of message 1"):
        in_parts.encode_prompt([user("abc")])


def test_calls_and_tools_that_are_left_out_are_refused_also_where_their_name_is_said() -> None:
    """A name that stands in the user's question is not what the template writes of the tool."""
    call = {"type": "function", "function": {"name": "search", "arguments": {"for": "boats"}}}
    tools = [{"type": "function", "function": {"name": "search"}}]
    plain = with_template(
        CHATML.partition("{%- endif %}")[2].replace("message['tool_calls'] or []", "[]")
    )
    asked = user("search for boats")
    assert plain.encode_row(row(asked, assistant("b")), train_on="last")
    with pytest.raises(DataError, match="does not render tools: search"):
        plain.encode_row(row(asked, assistant("", tool_calls=[call])), train_on="last")
    with pytest.raises(DataError, match="does not render tools: search"):
        plain.encode_row(row(asked, assistant("b"), tools=tools), train_on="last")
    with pytest.raises(DataError, match="does not render tools: search"):
        plain.encode_prompt([asked], tools=tools)
    only_tools = with_template(CHATML.replace("message['tool_calls'] or []", "[]"))
    assert only_tools.encode_prompt([asked], tools=tools)
    with pytest.raises(DataError, match="does not render tools: search"):
        only_tools.encode_row(
            row(asked, assistant("", tool_calls=[call]), tools=tools), train_on="last"
        )
    both = with_template(CHATML)
    assert both.encode_row(
        row(asked, assistant("", tool_calls=[call]), tools=tools), train_on="last"
    )


def test_a_template_that_joins_arguments_to_text_gets_them_as_text() -> None:
    """As DeepSeek's does; most want the object, and one that takes both gets it."""
    call = {
        "type": "function",
        "function": {"name": "weather", "arguments": {"in": "Köln<|im_end|>"}},
    }
    messages = [user("a"), assistant("", tool_calls=[call])]
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids, trained = with_template(source).encode_row(row(*messages), train_on="last")
    learnt = [number for number, on in zip(ids, trained, strict=True) if on]
    assert (
        with_template(source).tokenizer.decode(learnt)
        == 'weather {"in": "Köln<|im_end|>"}<|im_end|>'
    )
    assert learnt.count(END) == 1
    assert '"arguments": {"in": "Köln' in template("bytes").render(messages)


def test_a_template_may_leave_out_the_reasoning_of_earlier_answers() -> None:
    shown = "m.content if loop.last else (m.content.split('</think>') | last)"
    coded = with_template(
        "{% for m in messages %}<{{ m.role }}>{{ "
        + shown
        + " }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [
        user("a"),
        assistant("<think>hm</think>b"),
        user("c"),
        assistant("<think>oh</think>d"),
    ]
    first, last = examples_of(coded, *messages)
    assert first == ("<user>a<|im_end|><assistant>", "<think>hm</think>b<|im_end|>")
    assert last == (
        "<user>a<|im_end|><assistant>b<|im_end|><user>c<|im_end|><assistant>",
        "<think>oh</think>d<|im_end|>",
    )


def test_the_date_that_a_template_writes_is_fixed() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    coded = ChatTemplate(tokenizer, today=date(2024, 7, 26))
    assert coded.render([user("a")]).startswith("26 Jul 2024<|im_start|>")
    assert coded.writes_date
    assert not ChatTemplate(tiny_tokenizer()).writes_date


def test_the_token_that_ends_an_answer_is_found_beside_the_end_token() -> None:
    assert ChatTemplate(tiny_tokenizer()).stop_ids == (END,)
    assert with_template(CHATML.replace("<|im_end|>", "<|endoftext|>")).stop_ids == (END, PAD)
    assert with_template(
        CHATML.replace("<|im_end|>\\n' }}{%- endfor", "\\n' }}{%- endfor")
    ).stop_ids == (END,)


def test_each_token_is_ascribed_to_the_message_it_was_rendered_from() -> None:
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("bb")]
    ((found,),) = template("bytes").encode_rows([row(*messages)], train_on="assistant")
    lengths = [1 + len(m["role"]) + 1 + len(m["content"]) + 2 for m in messages]
    opening = len("|assistant\n")  # what opens the answer is counted with what it answers
    ends = [lengths[0], lengths[0] + lengths[1] + opening, sum(lengths)]
    assert [(run.role, run.end) for run in found.roles] == list(
        zip(["system", "user", "assistant"], ends, strict=True)
    )


def test_plain_text_is_learnt_whole_with_the_end_token_and_control_tokens_as_they_stand() -> None:
    plain = Row(RowRef("rows.jsonl", 1), [], None, "ab<|endoftext|>", "text")
    ids, trained = template("bytes").encode_row(plain, train_on="assistant")
    assert ids == [*spelled("ab"), PAD, END]
    assert trained == [False, True, True, True]
    ended = Row(RowRef("rows.jsonl", 1), [], None, "ab<|im_end|>", "text")
    assert template("bytes").encode_row(ended, train_on="assistant")[0] == [*spelled("ab"), END]


def test_that_an_unfinished_row_ends_where_it_does_is_not_learnt() -> None:
    """What stops the last answer, or the text, has no target; all else of the row is as it was."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    joined = tiny_tokenizer()
    joined.chat_template = None
    rows: list[tuple[ChatTemplate, Row]] = [(template(name), row(*turns)) for name in TOKENIZERS]
    rows.append((template("bytes"), Row(RowRef("rows.jsonl", 1), [], None, "ab", "text")))
    rows.append((ChatTemplate(joined), row(user("a"), assistant(" b"), format="prompt_completion")))
    for coded, whole in rows:
        for train_on in MODES:
            ids, trained = coded.encode_row(whole, train_on=train_on)
            cut_ids, cut_trained = coded.encode_row(
                replace(whole, unfinished=True), train_on=train_on
            )
            stop = max(
                n
                for n, number in enumerate(ids)
                if number == coded.tokenizer.convert_tokens_to_ids("<|im_end|>")
            )
            assert cut_ids == ids and trained[stop]
            assert cut_trained == [*trained[:stop], *[False] * (len(ids) - stop)] and any(
                cut_trained
            )


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
