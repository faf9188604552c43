"""Bodies against their tables: every field is honoured or refused by name, and all faults are told
at once."""

import json
from itertools import combinations
from random import Random
from typing import Annotated, Literal

import pytest
from pydantic import create_model

from tests.serve.protocols.generated import BODIES, body, mutated
from veneer.bounds import TEMPERATURE, TOKEN
from veneer.serve.http.json_body import parsed
from veneer.serve.limits import MOST_FAULTS
from veneer.serve.protocols import chat, completions, faults, messages, responses
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    AsSent,
    Body,
    Length,
    NotSupported,
    Num,
    Object,
    OneOf,
)
from veneer.serve.refusals import Fault, Refusal

MODULES = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
}
ASK = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/messages": {
        "model": "m",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "hi"}],
    },
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def refused(path, changes):
    with pytest.raises(Refusal) as caught:
        MODULES[path].PROTOCOL.read({**ASK[path], **changes})
    assert caught.value.status == 400
    return caught.value


class Switch(Body):
    a: bool


class Option(Body):
    type: Literal["x"]
    a: bool = False


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            Annotated[float, Num(TEMPERATURE)],
            [0, 0.5, 100],
            [True, "0.5", -1, float("nan"), 10**400, []],
        ),
        (bool, [True, False], [0, 1, "true"]),
        (Annotated[str, Length(1, 3)], ["a", "abc"], ["", "abcd", 1, "\ud800", ["a"]]),
        (Annotated[Literal[False, "auto"], NO_EFFECT], [False, "auto"], [True, 0, 0.0, "Auto"]),
        (Annotated[Literal[True], NO_EFFECT], [True], [False, 1, 1.0]),
        (Annotated[list[bool], Length(1, 2)], [[True], [True, False]], [[], [1], [True] * 3, {}]),
        (
            Annotated[list[Annotated[int, Num(TOKEN)]], Length(0, 3)],
            [[], [0, 5], [1, 2.0]],
            [[5, -1], [True, 1], [1, 2**31], [1, "1"], [1, [1]], [1] * 4],
        ),
        (
            Annotated[dict[Annotated[str, Length(0, 2)], bool], Length(0, 1)],
            [{}, {"a": True}],
            [{"abc": True}, {"a": 1}, {"a": True, "b": True}, []],
        ),
        (Switch, [{"a": True}], [{}, {"a": None}, {"a": True, "b": 1}, 3]),
        (
            Annotated[Option, OneOf("type")],
            [{"type": "x"}, {"type": "x", "a": None}],
            [{}, {"type": "y"}, {"type": []}, "x", {"type": "x", "a": 1}],
        ),
        (
            Annotated[Object, AsSent(Option)],
            [{"type": "x"}, {"a": True, "type": "x"}],
            [{}, {"type": "y"}, "x", {"type": "x", "a": 1}],
        ),
        (
            Annotated[Annotated[list[bool], Length(0, 1)] | Annotated[str, Length(0, 1)], BY_TYPE],
            [[True], "a", []],
            ["ab", 1, [1]],
        ),
        (NotSupported, [], [1, {}, "a"]),
    ],
)
def test_a_field_takes_what_it_says_and_nothing_else(kind, good, bad):
    model = create_model("Model", __base__=Body, x=(kind, ...))
    for value in good:
        assert model.read({"x": value}).model_fields_set == {"x"}
    for value in bad:
        with pytest.raises(Refusal) as caught:
            model.read({"x": value})
        assert caught.value.param.startswith("x") and caught.value.message.isprintable(), value


def test_all_faults_are_told_with_their_paths():
    path = "/v1/chat/completions"
    fault = refused(
        path,
        {
            "temprature": 1,
            "top_p": 2,
            "messages": [{"role": "user", "content": 3}, {"role": "pirate", "content": ""}],
            "functions": [],
            "logit_bias": {"5": 1e9},
        },
    )
    for said in (
        "temprature: is not a field of this request. Did you mean temperature?",
        "top_p: 2 is not a number from 0 to 1",
        "messages[0].content: 3 is not text",
        "messages[1].role: 'pirate' is not system",
        "functions: is not supported: use tools",
        "logit_bias.5: 1000000000.0 is not",
    ):
        assert said in fault.message
    assert fault.param == "temprature"
    assert fault.body["error"].keys() == {"message", "type", "param", "code"}


def test_a_bias_is_of_a_tokens_number():
    for key in ("word", "-1", "1.5", "٣", str(2**33)):
        said = refused("/v1/completions", {"prompt": "x", "logit_bias": {"7": 1, key: 1}}).message
        assert f"logit_bias.{key}: is not a token id" in said and "logit_bias.7" not in said


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/v1/completions", {"prompt": [-1] * 10**6}),
        ("/v1/completions", {"prompt": [[-1] * 10**5] * 10}),
        ("/v1/completions", {f"temperatur{n}": 1 for n in range(10**5)}),
        ("/v1/completions", {"logit_bias": {str(n): "x" for n in range(1024)}}),
        ("/v1/chat/completions", {"messages": [{"role": "pirate"}] * 4096}),
        ("/v1/chat/completions", {"chat_template_kwargs": {f"-{n}": 1 for n in range(10**5)}}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}] * 1024}] * 4096},
        ),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{}] * 1024}] * 4096}),
    ],
)
def test_faults_beyond_a_bound_are_neither_told_nor_searched_for(path, wrong, monkeypatch):
    made = []

    class Counted(Fault):
        def __init__(self, *told):
            made.append(told)
            super().__init__(*told)

    monkeypatch.setattr(faults, "Fault", Counted)
    looked_up = []
    near = faults.difflib.get_close_matches
    monkeypatch.setattr(
        faults.difflib, "get_close_matches", lambda *a, **k: looked_up.append(a) or near(*a, **k)
    )
    fault = refused(path, wrong)
    assert len(fault.message) < 5000 and fault.message.count(";") <= MOST_FAULTS
    one = "chat_template_kwargs" in wrong  # whose number alone is wrong
    assert fault.message.endswith("; and more") != one and fault.message.count(";") == (
        0 if one else MOST_FAULTS
    )
    assert len(made) <= 10 * MOST_FAULTS and len(looked_up) <= MOST_FAULTS + 1


@pytest.mark.parametrize("path", BODIES)
def test_every_field_that_acts_has_a_description(path):
    for name, field in BODIES[path].model_fields.items():
        assert field.description or NO_EFFECT in field.metadata, name


@pytest.mark.parametrize("path", BODIES)
def test_bodies_of_the_schema_are_valid_and_null_is_a_field_that_is_absent(path):
    random = Random(path)
    model = BODIES[path]
    for _ in range(60):
        sent = body(random, path, ["m"])
        assert model.read(sent).model_fields_set <= set(sent)
        nulls = {
            name: None for name, field in model.model_fields.items() if not field.is_required()
        }
        required = {name: value for name, value in sent.items() if name not in nulls}
        if path != "/tokenize":
            assert model.read({**nulls, **required}) == model.read(required)


@pytest.mark.parametrize("path", MODULES)
def test_a_body_is_asked_or_refused_and_nothing_else_happens(path):
    random = Random(path)
    passed = 0
    for _ in range(300):
        made = body(random, path, ["m"])
        for text in (json.dumps(made).encode(), mutated(random, made)):
            try:
                MODULES[path].PROTOCOL.read(parsed(text))
                passed += 1
            except Refusal as fault:
                assert fault.status == 400 and fault.message
    assert passed > 40


@pytest.mark.parametrize("path", MODULES)
@pytest.mark.parametrize(
    "field", ["guided_jsn", "chat_template", "prompt_logprobs", "best_of_n", "lora_request"]
)
def test_what_is_not_honoured_is_refused_by_its_name(path, field):
    assert refused(path, {field: {}}).param == field


def test_settings_of_all_protocols_come_out_the_same():
    same = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.1,
        "seed": -1,
        "min_tokens": 2,
    }
    for path, module in MODULES.items():
        asked = module.PROTOCOL.read({**ASK[path], **same})
        drawn = asked.sampling
        found = (
            drawn.temperature,
            drawn.top_p,
            drawn.top_k,
            drawn.min_p,
            asked.seed,
            asked.min_new_tokens,
        )
        assert found == (0.5, 0.25, 3, 0.1, 2**32 - 1, 2), path
        assert module.PROTOCOL.read({**ASK[path], "top_k": -1}).sampling.top_k == 0
        weighted = module.PROTOCOL.read(
            {**ASK[path], "adapters": [{"name": "a"}, {"name": "b", "weight": -0.5}]}
        )
        assert weighted.adapters == (("a", 1.0), ("b", -0.5))


def test_a_tool_reaches_the_template_with_its_keys_in_the_order_of_the_client():
    tool = {"function": {"parameters": {}, "strict": True, "name": "weather"}, "type": "function"}
    (prompt,) = chat.PROTOCOL.read({**ASK["/v1/chat/completions"], "tools": [tool]}).prompts
    assert json.dumps(prompt.tools) == json.dumps([tool])


def test_an_answer_without_a_token_is_an_echo_alone():
    path = "/v1/completions"
    assert refused(path, {"max_tokens": 0}).param == "max_tokens"
    asked = completions.PROTOCOL.read({**ASK[path], "max_tokens": 0, "echo": True})
    assert asked.prompt_only and asked.repeats_prompt and asked.max_new_tokens == 1
    assert refused("/v1/chat/completions", {"echo": True}).param == "echo"


def test_stops_logprobs_and_lengths_are_where_each_protocol_has_them():
    path = "/v1/chat/completions"
    asked = chat.PROTOCOL.read(
        {**ASK[path], "stop": "x", "logprobs": True, "max_completion_tokens": 7.0}
    )
    assert (asked.stops, asked.sampling.logprobs, asked.max_new_tokens) == (("x",), 0, 7)
    assert refused(path, {"max_tokens": 1, "max_completion_tokens": 2}).param == "max_tokens"
    assert refused(path, {"top_logprobs": 2}).param == "top_logprobs"
    assert refused(path, {"stream_options": {"include_usage": True}}).param == "stream_options"
    completed = completions.PROTOCOL.read(
        {"model": "m", "prompt": [[1, 2], [3]], "logprobs": 2, "stop": ["a", "b"], "n": 2}
    )
    assert [prompt.ids for prompt in completed.prompts] == [(1, 2), (3,)]
    assert (completed.stops, completed.sampling.logprobs, completed.max_new_tokens) == (
        ("a", "b"),
        2,
        16,
    )
    assert refused("/v1/completions", {"best_of": 3}).param == "best_of"
    said = messages.PROTOCOL.read({**ASK["/v1/messages"], "stop_sequences": ["END"]})
    assert (said.stops, said.max_new_tokens) == (("END",), 4)
    assert (
        responses.PROTOCOL.read({**ASK["/v1/responses"], "max_output_tokens": 9}).max_new_tokens
        == 9
    )


def test_one_conversation_with_tools_is_the_same_in_three_protocols():
    arguments = {"city": "Bern"}
    function = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps(arguments)},
    }
    spoken = chat.PROTOCOL.read(
        {
            "model": "m",
            "tools": [{"type": "function", "function": function}],
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Rain"}, {"type": "text", "text": "?"}],
                },
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [call],
                    "refusal": None,
                    "annotations": [],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "yes"},
            ],
        }
    )
    responded = responses.PROTOCOL.read(
        {
            "model": "m",
            "instructions": "Be brief.",
            "tools": [{"type": "function", **function}],
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
                {
                    "type": "function_call",
                    "call_id": "c1",
                    "name": "weather",
                    "arguments": json.dumps(arguments),
                },
                {"type": "function_call_output", "call_id": "c1", "output": "yes"},
            ],
        }
    )
    sent = messages.PROTOCOL.read(
        {
            "model": "m",
            "max_tokens": 3,
            "system": [
                {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
            ],
            "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "c1", "name": "weather", "input": arguments}
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "yes"}],
                },
            ],
        }
    )

    def plain(asked):
        (prompt,) = asked.prompts
        kept = []
        for message in prompt.messages:
            calls = [each["function"] for each in message.get("tool_calls", [])]
            kept.append((message["role"], message["content"], calls, message.get("name")))
        return kept, prompt.tools

    assert plain(spoken) == plain(responded) == plain(sent)
    assert [role for role, *_ in plain(spoken)[0]] == ["system", "user", "assistant", "tool"]
    assert spoken.tools and responded.tools and sent.tools


def test_a_drawn_body_is_its_numbers_alone():
    def drawn(seed):
        random = Random(seed)
        path = random.choice(list(BODIES))
        return mutated(random, body(random, path, ["m"]))

    before = [drawn(seed) for seed in range(60)]
    for seed in range(60, 600):
        drawn(seed)
    assert [drawn(seed) for seed in range(60)] == before


def test_a_response_repeats_what_was_asked_and_names_what_was_not():
    tools = [{"type": "function", **TOOL["function"]}]
    sent = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "temperature": 0.25,
        "top_p": 0.5,
        "tool_choice": "none",
        "tools": tools,
        "metadata": {"ticket": "7"},
        "text": {"format": {"type": "json_object"}},
    }
    assert responses.PROTOCOL.read({**ASK["/v1/responses"], **sent}).echo == sent
    bare = responses.PROTOCOL.read(ASK["/v1/responses"]).echo
    assert bare.keys() == sent.keys() and bare["instructions"] is bare["max_output_tokens"] is None
    assert (bare["tool_choice"], bare["tools"], bare["metadata"]) == ("auto", [], {})
    assert bare["text"] == {"format": {"type": "text"}}


@pytest.mark.parametrize(
    ("path", "tool", "none"),
    [
        ("/v1/chat/completions", TOOL, "none"),
        ("/v1/responses", {"type": "function", **TOOL["function"]}, "none"),
        ("/v1/messages", {"name": "weather", "input_schema": {"type": "object"}}, {"type": "none"}),
    ],
)
def test_an_answer_is_read_for_calls_where_tools_are_given_and_may_be_called(path, tool, none):
    def reads(**changes):
        return MODULES[path].PROTOCOL.read({**ASK[path], **changes}).tools

    assert reads(tools=[tool]) and not reads() and not reads(tools=[])
    assert not reads(tools=[tool], tool_choice=none)
    assert path == "/v1/messages" or not reads(tool_choice=none)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]},
            "messages[0].tool_call_id",
        ),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"store": True}, "store"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_its_field(changes, param):
    assert refused("/v1/chat/completions", changes).param == param


def test_tools_and_variables_of_a_tokenised_prompt_are_refused_and_those_of_messages_are_read():
    messages = {"messages": [{"role": "user", "content": "a"}]}
    settings = {"tools": [TOOL], "chat_template_kwargs": {"a": 1}}
    for name, value in settings.items():
        assert BODIES["/tokenize"].read({**messages, name: value}).model_fields_set > {name}
        with pytest.raises(Refusal, match="are for messages") as refusal:
            BODIES["/tokenize"].read({"prompt": "a", name: value})
        assert refusal.value.param == name


def test_variables_of_the_template_reach_the_prompt():
    path = "/v1/chat/completions"
    for variables in ({"enable_thinking": False}, {}):
        asked = {**ASK[path], "chat_template_kwargs": variables}
        (prompt,) = MODULES[path].PROTOCOL.read(asked).prompts
        assert prompt.variables == variables
        asked = {"messages": ASK[path]["messages"], "chat_template_kwargs": variables}
        assert BODIES["/tokenize"].read(asked).prompt_to_encode().variables == variables


def test_shapes_of_answers_are_read_from_each_dialect():
    schema = {"type": "object"}
    for changes, kind, spec in [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema},
                }
            },
            "schema",
            schema,
        ),
        ({"response_format": {"type": "json_object"}}, "schema", {"type": "object"}),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json_object": True}}, "schema", {"type": "object"}),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"guided_json": schema}, "schema", schema),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool", [TOOL["function"]]),
    ]:
        shape = chat.PROTOCOL.read({**ASK["/v1/chat/completions"], **changes}).shape
        assert (shape.kind, shape.spec) == (kind, spec)
    form = {"type": "json_schema", "name": "x", "schema": schema}
    shape = responses.PROTOCOL.read({**ASK["/v1/responses"], "text": {"format": form}}).shape
    assert (shape.kind, shape.spec) == ("schema", schema)
    for none in (
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"json_object": False}},
    ):
        assert chat.PROTOCOL.read({**ASK["/v1/chat/completions"], **none}).shape is None


CALL = {"tools": [TOOL], "tool_choice": "required"}
SHAPES = {
    "tool_choice": CALL,
    "response_format": {"response_format": {"type": "json_object"}},
    "structured_outputs.json": {"structured_outputs": {"json": {}}},
    "structured_outputs.json_object": {"structured_outputs": {"json_object": True}},
    "structured_outputs.regex": {"structured_outputs": {"regex": "a"}},
    "structured_outputs.choice": {"structured_outputs": {"choice": ["a"]}},
    "structured_outputs.grammar": {"structured_outputs": {"grammar": "root ::= 'a'"}},
    "guided_json": {"guided_json": {}},
    "guided_regex": {"guided_regex": "a"},
    "guided_choice": {"guided_choice": ["a"]},
    "guided_grammar": {"guided_grammar": "root ::= 'a'"},
}
"""Fields that require a shape of an answer, in the order in which an error names them."""


@pytest.mark.parametrize(("first", "second"), list(combinations(SHAPES, 2)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_two_shapes_of_an_answer_are_refused_with_both_names(path, first, second):
    if path == "/v1/completions" and first == "tool_choice":
        return  # it has no tools
    changes = {}
    for name in (first, second):
        for key, value in SHAPES[name].items():
            changes[key] = {**changes.get(key, {}), **value} if isinstance(value, dict) else value
    refusal = refused(path, changes)
    assert (refusal.status, refusal.param) == (400, second) and first in refusal.message


def test_a_format_beside_a_required_call_is_refused_in_responses_too():
    tool = {"type": "function", **TOOL["function"]}
    named = {"type": "function", "name": TOOL["function"]["name"]}
    schema = {"type": "json_schema", "name": "x", "schema": {}}
    for choice in ("required", named):
        for form in ({"type": "json_object"}, schema):
            changes = {"tools": [tool], "tool_choice": choice, "text": {"format": form}}
            refusal = refused("/v1/responses", changes)
            assert (refusal.status, refusal.param) == (400, "text.format")
            assert "tool_choice" in refusal.message
    changes = {"tools": [tool], "text": {"format": {"type": "json_object"}}}
    shape = responses.PROTOCOL.read({**ASK["/v1/responses"], **changes}).shape
    assert (shape.kind, shape.param) == ("schema", "text.format")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            b"{" + b",".join(b'"k%d": 0' % n for n in range(60_000)) + b', "k7": 0}',
            "the key 'k7' stands there twice",
        ),
        (b"", "is not JSON: Expecting value"),
        (b"[]", "is not a JSON object"),
        (b"3", "is not a JSON object"),
        (b"{", "is not JSON: Expecting property name"),
        (b'{"a": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"a": 1e999}', "is not JSON: 1e999 is too large for a number"),
        (b'{"a": 1, "b": {"c": 2, "d": 2, "d": 3}}', "is not JSON: the key 'd' stands there twice"),
        (b"\xff", "is not JSON: 'utf-8' codec can't decode"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "is nested deeper than 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    ],
)
def test_a_body_that_is_no_json_object_within_the_limits_is_refused_and_told_why(text, said):
    with pytest.raises(Refusal) as caught:
        parsed(text)
    assert caught.value.status == 400 and said in caught.value.message
