"""Calls of tools out of a text that comes in pieces, in the way that the base's own template writes them."""

import json

import pytest

from tests.tiny import tiny_tokenizer
from veneer.data.template import ChatTemplate
from veneer.serve.tools import CallReader, CallStyle, call_style

STYLE = CallStyle("<tool_call>", "</tool_call>", "name", "arguments")


def call(name, **arguments):
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


def read(pieces):
    reader = CallReader(STYLE)
    said, calls = "", []
    for text, found in [*map(reader.push, pieces), reader.end()]:
        said += text
        calls += [(each.name, json.loads(each.arguments)) for each in found]
    return said, calls


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(size):
    text = "Let me see. " + call("a", x=1) + "\n" + call("b", y="</") + " <tool"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(pieces) == ("Let me see. \n <tool", [("a", {"x": 1}), ("b", {"y": "</"})])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "a", "arguments": 3}</tool_call>',
        "<tool_call>" + "[" * 9999 + "</tool_call>",
        "<tool_call>never closed",
        "no call < at all </tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text):
    assert read([text]) == (text, [])


def test_a_call_whose_closing_mark_ended_the_answer_counts():
    assert read([call("a").removesuffix("</tool_call>")]) == ("", [("a", {})])


def test_text_is_given_as_soon_as_it_can_be_no_mark():
    reader = CallReader(STYLE)
    assert reader.push("a <") == ("a ", [])
    assert reader.push("b") == ("<b", [])


def test_the_style_is_read_off_the_template():
    tokenizer = tiny_tokenizer()
    assert call_style(ChatTemplate(tokenizer)) == STYLE
    other = tiny_tokenizer()
    other.chat_template = tokenizer.chat_template.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[/CALL]")
    assert call_style(ChatTemplate(other)) == CallStyle("[CALL]", "[/CALL]", "name", "arguments")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no') }}{% endif %}{% endfor %}{{ tools }}",
        None,
    ],
    ids=["without tools", "refusing calls", "none"],
)
def test_a_template_that_writes_no_calls_has_no_style(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert call_style(ChatTemplate(tokenizer)) is None
