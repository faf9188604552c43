"""Which tokens of a rendered conversation are answers, and which rows are refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from tests.support.templates import (
    END,
    MODES,
    PAD,
    TOKENIZERS,
    Message,
    assistant,
    row,
    spelled,
    template,
    user,
    with_template,
)
from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data.examples import Row, RowRef, TrainOn
from veneer.data.template.template import ChatTemplate
from veneer.errors import DataError

LAST_DIFFERS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}THINK {%"
    " endif %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{%"
    " endif %}"
)


def examples_of(
    coded: ChatTemplate, *messages: Message, train_on: TrainOn = "assistant"
) -> list[tuple[str, str]]:
    """(what stands in front, what is learnt) of each example that the row becomes, as text."""
    (found,) = coded.encode_rows([row(*messages)], train_on=train_on)
    assert isinstance(found, list)
    made = []
    for example in found:
        first = example.trained.index(True)
        assert all(example.trained[first:])
        made.append(
            (
                coded.tokenizer.decode(example.ids[:first]),
                coded.tokenizer.decode(example.ids[first:]),
            )
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
