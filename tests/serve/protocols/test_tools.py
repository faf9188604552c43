"""Calls of tools out of a text that comes in pieces, in the way that the base's own template writes
them."""

import dataclasses
import json

import pytest

from tests.serve.protocols.tool_templates import TEMPLATES
from tests.serve.server import BASE, made_base, running
from tests.support.tiny import tiny_tokenizer
from veneer.data.template.template import ChatTemplate
from veneer.decoding.tool_calls.call_style import call_style
from veneer.decoding.tool_calls.calls import CallReader
from veneer.decoding.tool_calls.forms import (
    MOST_NAME,
    BareCall,
    ListedCalls,
    NamedCalls,
    ObjectCalls,
)
from veneer.library.library import Library
from veneer.serve.protocols.tools import NamedTool, required_call
from veneer.serve.refusals import Refusal

STYLE = ObjectCalls("<tool_call>", "</tool_call>")
BARE = BareCall("", arguments="parameters")
FIELDS = {"n": {"enum": [1, 2]}}
TOOL = {
    "name": "f",
    "parameters": {"properties": FIELDS, "required": ["n"], "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": TOOL}]
SIZES = pytest.mark.parametrize("size", [1, 2, 7, 1000])
EACH = pytest.mark.parametrize("written", TEMPLATES.values(), ids=TEMPLATES)


def call(name, **arguments):
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


def read(pieces, style=STYLE, tools=None):
    reader = CallReader(style, tools or {"f": TOOL["parameters"]})
    said, calls = "", []
    for text, found in [*map(reader.push, pieces), reader.end()]:
        said += text
        calls += [(name, json.loads(arguments)) for name, arguments in found]
    return said, calls


def cut(text, size):
    return [text[at : at + size] for at in range(0, len(text), size)]


@SIZES
def test_calls_are_found_however_the_text_is_cut(size):
    text = "Let me see. " + call("a", x=1) + "\n" + call("b", y="</") + " <tool"
    assert read(cut(text, size)) == ("Let me see.  <tool", [("a", {"x": 1}), ("b", {"y": "</"})])


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
    reader = CallReader(STYLE, {})
    assert reader.push("a <") == ("a ", [])
    assert reader.push("b") == ("<b", [])


def test_a_name_and_an_id_may_be_long_and_a_text_without_arguments_is_given_after_as_much():
    style = NamedCalls("[CALL]", id_mark="[ID]", between="[ARGS]")
    name, call_id = "f" * MOST_NAME, "9" * MOST_NAME
    written = f"[CALL]{name}[ID]{call_id}[ARGS]" + '{"n": 1}'
    assert read(cut(written, 1), style) == ("", [(name, {"n": 1})])
    assert read([written.replace(name, name + "f")], style) == (
        written.replace(name, name + "f"),
        [],
    )
    reader, text = CallReader(style, {}), "[CALL]" + "f" * style.most_ahead
    assert reader.push(text) == ("", []) and reader.push("f") == (text + "f", [])


@EACH
@SIZES
def test_each_form_is_read_off_its_template_and_out_of_its_answers(written, size):
    style = call_style(ChatTemplate(written.tokenizer()))
    assert style is not None and dataclasses.replace(style, special=()) == written.style
    assert read(cut(written.answer, size), style) == ("", [("f", {"n": 1})])
    if written.two and not isinstance(style, ListedCalls):
        assert read(cut(written.answer * 2, size), style) == ("", [("f", {"n": 1})] * 2)
    if style.opens:
        text = f"I look.{written.answer}\nDone [ < "
        assert read(cut(text, size), style) == ("I look.\nDone [ < ", [("f", {"n": 1})])


SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "integer"},
        "flag": {"type": "boolean"},
        "list": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"enum": ["1", "2"]},
        "shape": {"$ref": "#/$defs/shape"},
        "deep": {"anyOf": [{"oneOf": [{"allOf": [{"$ref": "#/$defs/shape"}]}]}]},
        "itself": {"$ref": "#/$defs/itself"},
        "many": {"$ref": "#/$defs/many"},
        "nowhere": {"$ref": "#/$defs/nowhere"},
    },
    "$defs": {
        "shape": {"type": "object"},
        "itself": {"$ref": "#/$defs/itself"},
        "many": {"anyOf": [{"$ref": "#/$defs/many"}] * 100 + [{"type": "integer"}]},
    },
}
SAID = {
    "text": "two\n lines: </parameter> and <parameter=x>, </arg_value>, 12",
    "number": "12",
    "flag": "True",
    "list": '["a", {"b": null}]',
    "maybe": "None",
    "either": "1",
    "shape": '{"w": 1.5}',
    "deep": '{"w": 2}',
    "itself": "5",
    "many": "6",
    "nowhere": "7",
    "unknown": "3",
}
MEANT = SAID | {
    "number": 12,
    "flag": True,
    "list": ["a", {"b": None}],
    "maybe": None,
    "shape": {"w": 1.5},
    "deep": {"w": 2},
}


@pytest.mark.parametrize("name", ["qwen 3 coder", "glm"])
@SIZES
def test_values_without_quotes_are_what_the_tools_schema_says(name, size):
    style = TEMPLATES[name].style
    elements = [
        style.key_opens + key + style.key_ends + value + style.value_ends
        for key, value in SAID.items()
    ]
    text = style.opens + "g" + style.name_ends + "".join(elements) + style.tail + style.closes
    assert read(cut(text, size), style, {"g": SCHEMA}) == ("", [("g", MEANT)])
    none = style.opens + "g" + style.name_ends + style.tail + style.closes
    assert read(cut(none, size), style) == ("", [("g", {})])
    assert read([text.removesuffix(style.closes)], style, {"g": SCHEMA}) == ("", [("g", MEANT)])


@SIZES
def test_a_list_has_several_calls_and_values_hold_brackets_and_quotes(size):
    style = TEMPLATES["mistral"].style
    calls = [("f", {"s": '}]"\\'}), ("g", {"deep": [[{"a": []}]]}), ("h", {})]
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    assert read(cut(f"[TOOL_CALLS]{text} and text", size), style) == (" and text", calls)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("mistral", "[TOOL_CALLS] no list"),
        ("mistral", '[TOOL_CALLS] [{"name": "f"}, 3] and on'),
        ("mistral", "[TOOL_CALLS] [[[["),
        ("mistral with [ARGS]", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]no object"),
        ("mistral with [ARGS]", "[TOOL_CALLS]" + "f" * 5000 + "[ARGS]{}"),
        ("mistral with [ARGS]", "[TOOL_CALLS]f and nothing"),
        ("qwen 3 coder", "<tool_call>\n<function=f>\n<parameter=n>\n1\n</function>\n</tool_call>"),
        (
            "qwen 3 coder",
            "<tool_call>\n<function=f>\n<parameter=n\n1\n</parameter>\n</function>\n</tool_call>",
        ),
        ("qwen 3 coder", "<tool_call>\n<function=>\n</function>\n</tool_call>"),
        ("glm", "<tool_call>f\n<arg_key>n</arg_key>\n1\n</tool_call>"),
        ("glm", "<tool_call>" + "<arg_key>a" * 3000 + "</tool_call>"),
        ("llama 3", '{"name": "f", "parameters": 3}'),
        ("llama 3", '{"name": "somebody", "parameters": {}}'),
        ("llama 3", '{"answer": 42} is what I say'),
        ("llama 3", 'I say {"name": "f", "parameters": {}}'),
        ("llama 3", '{"name": "f", '),
    ],
)
@SIZES
def test_what_is_no_call_in_these_forms_stays_text(style, text, size):
    assert read(cut(text, size), TEMPLATES[style].style) == (text, [])


def test_an_answer_that_is_no_json_is_given_as_it_comes_where_calls_have_no_marks():
    reader = CallReader(BARE, {"f": {}})
    assert reader.push("  ") == ("", [])
    assert reader.push("I") == ("  I", [])
    assert reader.push(' say {"') == (' say {"', [])


def test_a_long_value_is_not_read_anew_with_every_piece():
    reader = CallReader(BARE, {"f": {}})
    reader.push('{"name": "f", "parameters": {"s": "')
    for _ in range(20_000):
        assert reader.push("x{") == ("", [])
    name, arguments = reader.push('"}}')[1][0]
    assert name == "f" and len(json.loads(arguments)["s"]) == 40_000


def test_the_tool_that_must_be_called_is_one_of_those_that_are_given():
    two = [{"function": {"name": name, "parameters": {}}} for name in ("f", "g")]

    def wanted(choice, tools=two):
        return required_call(tools, choice)

    assert [wanted(choice) for choice in (None, "none", "auto")] == [None] * 3
    assert wanted("none", tools=[]) is None
    required, named = wanted("required"), wanted(NamedTool(name="g"))
    assert [tool["name"] for tool in required.spec] == ["f", "g"] and required.most > 1
    assert [tool["name"] for tool in named.spec] == ["g"] and named.most == 1
    for choice, tools, said in (
        (NamedTool(name="h"), two, "none of the tools: f, g"),
        ("required", [], "only for requests with tools"),
        ("auto", [*two, two[0]], "f is there twice"),
    ):
        with pytest.raises(Refusal, match=said) as refused:
            wanted(choice, tools)
        assert refused.value.status == 400


@EACH
def test_a_call_that_is_required_is_made_in_the_form_of_the_template(written, tmp_path):
    """The grammar draws marks as the tokens that they are, and what it draws is read as a call."""
    base = made_base()
    base.tokenizer = written.tokenizer()
    with running(Library(tmp_path / "adapters"), base=base) as server:
        client = server.openai()
        asked = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "tools": TOOLS}
        asked["max_tokens"] = 8 * len(written.answer) + 60
        for stream in (False, True):
            found = client.chat.completions.create(
                **asked, tool_choice="required", temperature=0, stream=stream
            )
            if stream:
                calls = [
                    call
                    for chunk in found
                    for c in chunk.choices
                    for call in c.delta.tool_calls or ()
                ]
            else:
                calls = found.choices[0].message.tool_calls
                assert (
                    found.choices[0].finish_reason == "tool_calls"
                    and not found.choices[0].message.content
                )
            assert {call.function.name for call in calls} == {"f"}
            assert all(json.loads(call.function.arguments)["n"] in (1, 2) for call in calls)
        free = client.chat.completions.create(**asked)
        assert free.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
        (
            "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no') }}{% endif %}{%"
            " endfor %}{{ tools }}"
        ),
        None,
    ],
    ids=["without tools", "refusing calls", "none"],
)
def test_a_template_that_writes_no_calls_has_no_style(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert call_style(ChatTemplate(tokenizer)) is None
