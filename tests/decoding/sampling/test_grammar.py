"""An answer that has a shape is of that shape, unless it is cut; a shape that cannot be followed is
refused before."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.soak.counts import rounds
from tests.support.tiny import tiny_base
from veneer.bases.kept import cache_folder
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.grammar import Grammars
from veneer.decoding.sampling.json_check import JsonCheck
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.decoding.tool_calls.elements import ElementCalls
from veneer.decoding.tool_calls.forms import ListedCalls, ObjectCalls
from veneer.errors import ConfigError

pytest.importorskip("llguidance")
STOP = 257


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama_untied")


@pytest.fixture(scope="module")
def grammars(base):
    return Grammars(base.tokenizer, rows=base.config.vocab_size, stops=[STOP])


def ids(base, text):
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(tokenizer, tokens):
    return tokenizer.decode([t for t in tokens if t != STOP])


def sampled(grammar, draw, most, stop):
    """An answer of the shape, every token that may follow as likely as any other. None: it was
    cut."""
    follower, new = grammar(), []
    while len(new) < most:
        allowed = np.flatnonzero(follower.allowed(new))
        new.append(int(allowed[draw.randrange(len(allowed))]))
        if new[-1] == stop:
            return new[:-1]
        if follower.ended(new):
            return new
    return None


def schema(draw: random.Random, depth: int = 2) -> dict:
    """A random one, of what people write."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    kind = draw.choice(
        [*kinds, *(["object", "object", "array", "anyOf", "ref", "allOf"] if depth else [])]
    )
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(1, 6)}
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": -1, "exclusiveMaximum": draw.randint(1, 9)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {
            "enum": draw.sample(
                ["a", "é\n", 3, 2.5, None, True, {"x": 1}, [1, 2]], draw.randint(1, 4)
            )
        }
    if kind == "const":
        return {"const": draw.choice(["one", 1, [], {"k": "v"}])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": draw.choice([r"^\d{3}-[a-z]+$", "^(ja|nein)$", r"^[A-F0-9]{2,4}$"]),
        }
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "ipv4", "uuid"])}
    if kind == "array":
        least = draw.randint(0, 2)
        return {
            "type": "array",
            "items": schema(draw, depth - 1),
            "minItems": least,
            "maxItems": least + 1,
        }
    if kind == "anyOf":
        return {"anyOf": [schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "ref":
        return {"type": "object", "properties": {"r": {"$ref": "#/$defs/d"}}, "required": ["r"]}
    if kind == "allOf":
        return {
            "allOf": [{"type": "object", "properties": {"p": schema(draw, 0)}}, {"required": ["p"]}]
        }
    names = draw.sample(["name", "ü", 'a"b', "x y", "z"], draw.randint(0, 3))
    made = {
        "type": "object",
        "properties": {n: schema(draw, depth - 1) for n in names},
        "required": names[:1],
    }
    return {**made, "additionalProperties": False} if draw.random() < 0.8 else made


@pytest.fixture(scope="module")
def smollm():
    """The tokenizer of the embedded default, where it has been made."""
    for file in (cache_folder() / "gguf").glob("*/tokenizer.json"):
        found = AutoTokenizer.from_pretrained(file.parent)
        if len(found) == 49152:
            return found
    pytest.skip("smollm2-135m has not been loaded here")


@pytest.mark.parametrize("which", ["tiny", "smollm"])
def test_a_sampled_answer_is_json_of_its_schema_unless_it_was_cut(which, request, base):
    tokenizer = base.tokenizer if which == "tiny" else request.getfixturevalue("smollm")
    stop = tokenizer.eos_token_id
    grammars, ended = Grammars(tokenizer, rows=len(tokenizer), stops=[stop]), 0
    numbers = rounds("schemas", ci=200)
    for number in numbers:
        draw = random.Random(f"{which} {number}")
        wanted = {"$defs": {"d": {"type": "integer", "minimum": 0, "maximum": 99}}, **schema(draw)}
        grammar = grammars.schema(wanted)
        answer = sampled(grammar, draw, 150, stop)
        if answer is not None:
            ended += 1
            text = tokenizer.decode(answer)
            assert not grammar.faults(text), (wanted, text)
            json.loads(text)
    assert ended > len(numbers) * 0.5


def test_answers_of_an_engine_are_of_their_shapes_beside_others_that_have_none(base, grammars):
    engine = Engine(base, budget_bytes=2**22, adapters=FixedAdapters({}))
    shapes = {
        "schema": grammars.schema({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}),
        "choice": grammars.choice(["yes", "no", "ja"]),
        "regex": grammars.regex("[a-c]{2,4}[0-9]"),
        "lark": grammars.grammar('start: "a" b "c"\nb: /[xy]{1,3}/'),
        "calls": grammars.calls(
            {
                "f": {
                    "properties": {"n": {"enum": [1, 2]}},
                    "required": ["n"],
                    "additionalProperties": False,
                }
            },
            ObjectCalls("<t>", "</t>"),
        ),
        "none": None,
    }
    asked = {}
    for name, shape in shapes.items():
        for answer in engine.add(
            Request(
                prompt=(5, 9, 7),
                max_new_tokens=80,
                stops=frozenset([STOP]),
                choices=3,
                sampling=Sampling(temperature=1.0),
                constraints=shape,
                seed=3,
            )
        ):
            asked[answer] = name
    assert len(engine.run()) == len(asked)
    for answer, name in asked.items():
        shape = shapes[name]
        if shape is not None and answer.reason is FinishReason.STOP:
            assert not shape.faults(text_of(base.tokenizer, answer.new)), name
        assert answer.reason in (
            (FinishReason.STOP, FinishReason.LENGTH)
            if name in ("schema", "none")
            else (FinishReason.STOP,)
        ), name
    alone = Engine(base, budget_bytes=2**22, adapters=FixedAdapters({}))
    asks = next(a for a, name in asked.items() if name == "regex").request
    assert [a.new for a in alone.add(asks) if alone.run() or True] == [
        a.new for a, n in asked.items() if n == "regex"
    ]


def test_an_answer_ends_with_its_last_token_where_nothing_may_follow_and_else_with_a_stop_token(
    base, grammars
):
    whole = grammars.schema(
        {
            "type": "object",
            "properties": {"a": {"const": 1}},
            "required": ["a"],
            "additionalProperties": False,
        }
    )()
    text = ids(base, '{"a":1}')
    assert not whole.ended(text[:-1]) and whole.ended(text)
    number = grammars.schema({"type": "integer"})()
    twelve = ids(base, "12")
    assert not number.ended(twelve) and number.allowed(twelve)[STOP]
    assert number.ended([*twelve, STOP])
    assert not grammars.schema({"type": "integer"})().allowed([])[STOP]


def test_special_tokens_and_ids_without_a_text_are_never_allowed_inside(base, grammars):
    string = grammars.schema({"type": "string"})()
    inside = ids(base, '"a')
    allowed = string.allowed(inside)
    assert (
        len(allowed) == base.config.vocab_size and allowed.dtype == np.bool_ and allowed.sum() > 90
    )
    assert not allowed[256:].any()
    assert torch.as_tensor(allowed).dtype == torch.bool


def test_blanks_between_the_parts_of_a_value_are_bounded(base, grammars):
    follower, new = grammars.schema({"type": "object"})(), ids(base, "{")
    blank = ids(base, " ")[0]
    while follower.allowed(new)[blank]:
        new.append(blank)
        assert len(new) < 40


def test_an_answer_may_go_back_and_on_otherwise(base, grammars):
    follower = grammars.regex("a(b|c)d*")()
    there = ids(base, "abd")
    first = follower.allowed(there).copy()
    assert (follower.allowed(ids(base, "ac")) == grammars.regex("d*")().allowed([])).all()
    assert (follower.allowed(there) == first).all()
    assert not follower.allowed(ids(base, "ax")).any(), "what was never allowed leads nowhere"
    assert not follower.ended(ids(base, "ax"))


def test_each_answer_has_a_way_of_its_own(base, grammars):
    grammar = grammars.choice(["ab", "cd"])
    one, other = grammar(), grammar()
    assert (
        one.ended(ids(base, "ab"))
        and not other.ended(ids(base, "c"))
        and other.ended(ids(base, "cd"))
    )


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda g: g.schema({"type": 5}), "not a JSON schema"),
        (lambda g: g.schema("{"), "not JSON"),
        (lambda g: g.schema("[1]"), "is an object"),
        (lambda g: g.schema({"x": float("nan")}), "not JSON"),
        (lambda g: g.schema({"x": object()}), "not JSON"),
        (lambda g: g.schema({"$schema": 5}), "a draft's name is text"),
        (lambda g: g.schema({"$schema": {"a": 1}}), "a draft's name is text"),
        (lambda g: g.schema({"not": {"type": "string"}}), "not"),
        (lambda g: g.schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda g: g.schema({"$ref": "http://localhost/x"}), "localhost"),
        (lambda g: g.schema({"type": "string", "format": "horoscope"}), "horoscope"),
        (lambda g: g.schema(False), "cannot be followed"),
        (lambda g: g.schema({"type": "string", "pattern": "(?=a)b"}), "patterns"),
        (lambda g: g.schema({"type": "string", "pattern": "(a{1000}){1000}"}), "repetition"),
        (lambda g: g.schema({"description": "x" * 70_000}), "characters"),
        (
            lambda g: g.schema({"type": "object", "properties": {f"p{n}": {} for n in range(600)}}),
            "cannot be followed",
        ),
        (lambda g: g.schema(json.loads('{"items":' * 90 + "{}" + "}" * 90)), "deeper"),
        (lambda g: g.schema('{"items":' * 90 + "{}" + "}" * 90), "deeper"),
        (lambda g: g.schema({"x-guidance": {"lenient": True}, "uniqueItems": True}), "uniqueItems"),
        (lambda g: g.regex("("), "cannot be followed"),
        (lambda g: g.regex("a)|(b"), "cannot be followed"),
        (lambda g: g.regex("(a{1000}){1000}"), "repetition"),
        (lambda g: g.regex(r"(a)\1"), "cannot be followed"),
        (lambda g: g.regex("a" * 9000), "characters"),
        (lambda g: g.choice([]), "choices is empty"),
        (lambda g: g.choice(["x" * 70_000]), "characters"),
        (lambda g: g.grammar("start: nobody"), "nobody"),
        (lambda g: g.grammar("start: /(a{1000}){1000}/"), "product of the counts"),
        (lambda g: g.grammar('start: A{999}\nA: B{999}\nB: "x"'), "product of the counts"),
        (lambda g: g.grammar("root ::= a\n" + "a ::= b\n" * 500), "501 rules"),
        (lambda g: g.calls({}, ObjectCalls("<", ">")), "no tool"),
        (lambda g: g.calls({"f": {"uniqueItems": True}}, ObjectCalls("<", ">")), "uniqueItems"),
        (lambda g: g.calls({"f": {}}, ObjectCalls("<", ">"), most=99), "calls is 99"),
    ],
)
def test_a_shape_that_cannot_be_followed_is_an_error_that_says_why(grammars, ask, said):
    with pytest.raises(ConfigError) as caught:
        ask(grammars)
    assert (
        said in str(caught.value)
        and "<state>" not in str(caught.value)
        and len(str(caught.value)) < 1500
    )


def test_what_lies_at_a_limit_is_followed_and_what_lies_beyond_is_not(grammars):
    def counted(source):
        return lambda g: g.grammar(source)

    def called(most):
        return lambda g: g.calls({"f": {}}, ObjectCalls("<", ">"), most=most)

    for within, beyond in [
        (counted("start: /(a{100}){100}/"), counted("start: /(a{100}){101}/")),
        (counted('start: "x"~1..10000'), counted('start: "x"~1..10001')),
        (lambda g: g.schema({"title": "x" * 65_523}), lambda g: g.schema({"title": "x" * 65_524})),
        (lambda g: g.regex("a" * 8192), lambda g: g.regex("a" * 8193)),
        (called(16), called(17)),
        (called(1), called(0)),
    ]:
        within(grammars)
        with pytest.raises(ConfigError):
            beyond(grammars)


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_as_many_calls_are_made_as_may_be(grammars, listed, most):
    tools = {"f": {"type": "object", "additionalProperties": False}}
    style = ListedCalls("<calls>") if listed else ObjectCalls("<call>", "</call>")
    grammar = grammars.calls(tools, style, most=most)
    one = '{"name": "f", "arguments": {}}'
    for count in range(most + 2):
        several = ", ".join([one] * count)
        text = f"<calls>[{several}]" if listed else "\n".join([f"<call>\n{one}\n</call>"] * count)
        assert grammar.accepts(text) == (1 <= count <= most)


def test_the_grammar_of_a_call_names_a_tool_and_takes_the_arguments_of_that_one(base, grammars):
    tools = {
        "add": {
            "properties": {"n": {"$ref": "#/$defs/d"}},
            "required": ["n"],
            "$defs": {"d": {"type": "integer"}},
            "additionalProperties": False,
        },
        "say": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    }
    one = grammars.calls(tools, ObjectCalls("<tool_call>", "</tool_call>"))
    right = '<tool_call>\n{"name": "add", "arguments": {"n": 3}}\n</tool_call>'
    assert one.accepts(right) and not one.faults(right)
    wrong = {
        right.replace("3", '"3"'): "is not of type 'integer'",
        right.replace("add", "sub"): "a tool that the request does not have",
        right.replace("add", "say"): "'text' is a required property",
        right + right: "",
        "text " + right: "beside the calls",
        "": "there is no call",
    }
    for text, said in wrong.items():
        assert not one.accepts(text) and said in "".join(one.faults(text)), text
    two = grammars.calls(
        tools, ObjectCalls("<tool_call>", "</tool_call>", name="tool", arguments="input"), most=2
    )
    right = right.replace("name", "tool").replace("arguments", "input")
    assert two.accepts(right) and two.accepts(right + "\n" + right) and not two.accepts(right * 3)
    assert not two.faults(right + "\n" + right)


# the check


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "2", "5"),
        (
            {"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
            '{"ab": 1}',
            '{"b": 1}',
        ),
        ({"patternProperties": {"^a": {"type": "integer"}}}, '{"b": "x"}', '{"ab": "x"}'),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "null"}},
            '{"a": 1, "b": null}',
            '{"b": 1}',
        ),
        ({"pattern": r"^\d+$"}, '"12"', '"1x"'),
        (
            {
                "$ref": "#/$defs/x",
                "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
            },
            "[[], [[]]]",
            "[1]",
        ),
        ({"const": {"pattern": "("}}, '{"pattern": "("}', "1"),
        (True, "1", "{"),
    ],
)
def test_the_last_word_is_the_whole_schemas(schema, right, wrong):
    check = JsonCheck(schema)
    assert check.faults(right) == [] and check.faults(wrong)


@pytest.mark.parametrize(
    ("schema", "made", "wrong"),
    [
        ({"items": {"enum": list(range(20_000))}}, lambda n: [19_999] * n, [20_000]),
        (
            {"items": {"enum": [{"a": [k]} for k in range(9_000)]}},
            lambda n: [{"a": [8_999]}] * n,
            [{"a": [True]}],
        ),
        ({"uniqueItems": True}, lambda n: [{"a": k} for k in range(n)], [{"a": 1}, {"a": 1.0}]),
        (
            {"uniqueItems": True},
            lambda n: [[k] if k % 2 else {"a": k} for k in range(n)],
            [[[0]], [[0]]],
        ),
    ],
)
def test_a_value_is_looked_up_among_many_and_not_compared_with_each(
    schema, made, wrong, monkeypatch
):
    compared = []
    monkeypatch.setattr("jsonschema._keywords.equal", lambda *of: compared.append(of))
    check = JsonCheck(schema)
    assert check.value_faults(made(5_000)) == [] and check.value_faults(wrong)
    assert compared == []


def test_values_are_equal_as_json_says():
    check = JsonCheck({"enum": [1, "1", True, None, [0], {"a": 1.5}]})
    assert not any(
        check.value_faults(value) for value in (1, 1.0, "1", True, None, [0], [0.0], {"a": 1.5})
    )
    assert all(
        check.value_faults(value) for value in (0, False, "", [False], {"a": 1}, {}, [], "true")
    )
    assert not JsonCheck({"uniqueItems": True}).value_faults(
        [1, True, "1", None, [1], [True], 0, False]
    )


def test_the_search_for_patterns_in_names_is_bounded():
    schema = {"patternProperties": {f"^x{k}$": {} for k in range(300)}, "additionalProperties": {}}
    entangled = ["the schema is too complex to be checked"]
    assert JsonCheck(schema).value_faults({f"p{k}": k for k in range(100)}) == entangled
    assert JsonCheck(schema).value_faults({f"p{k}": k for k in range(5)}) == []


def test_a_check_fails_on_no_keyword_of_any_type_in_any_draft():
    from jsonschema import validators

    drafts = [
        "",
        "http://json-schema.org/draft-03/schema#",
        "http://json-schema.org/draft-04/schema#",
    ]
    keywords = {
        "$schema",
        "$id",
        "id",
        "$anchor",
        "$dynamicAnchor",
        "$vocabulary",
        "$defs",
        "definitions",
    }
    odd = [
        5,
        None,
        "a",
        "http://[",
        "#/%",
        [],
        [1],
        {"": 1},
        {"a": 5},
        -1,
        1e300,
        10**400,
        True,
        "(",
        {"$ref": 5},
    ]
    for draft in drafts:
        kind = validators.validator_for({"$schema": draft}, default=validators.Draft202012Validator)
        for keyword in sorted(keywords | set(kind.VALIDATORS)):
            for value in odd:
                try:
                    check = JsonCheck(
                        {"$schema": draft, keyword: value, "$ref": "x"}
                        if draft
                        else {keyword: value}
                    )
                except ConfigError:
                    continue
                for text in ('{"a": 1}', "[1, 1]"):
                    assert all(isinstance(fault, str) for fault in check.faults(text))


def test_a_check_ends_whatever_the_schema_and_asks_nobody():
    chain = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    entangled = JsonCheck({"$ref": "#/$defs/d0", "$defs": {**chain, "d40": {}}})
    assert entangled.faults("1") == ["the schema is too complex to be checked"]
    assert JsonCheck({"$ref": "#"}).faults("1") == ["the schema is too complex to be checked"]
    (fault,) = JsonCheck({"$ref": "http://localhost:1/x"}).faults("1")
    assert "is not found in it" in fault
    assert not JsonCheck({"pattern": "^(a+)+$"}).faults(json.dumps("a" * 30_000))
    assert JsonCheck({"pattern": "^(a+)+$"}).faults(json.dumps("a" * 30_000 + "b"))
    assert "nested deeper" in JsonCheck({}).faults("[" * 1000 + "]" * 1000)[0]


def test_without_the_extra_the_error_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ConfigError, match=r"veneer\[grammar\]"):
        Grammars(base.tokenizer, rows=272, stops=[STOP])


def test_values_without_quotes_end_at_their_mark(grammars):
    style = ElementCalls(
        "<tool_call>",
        "</tool_call>",
        name_ends="\n",
        key_opens="<k>",
        key_ends="</k><v>",
        value_ends="</v>\n",
    )
    fields = {"said": {"type": "string"}, "n": {"type": "integer"}, "one": {"enum": ["a", "b", 3]}}
    made = grammars.calls(
        {"f": {"properties": fields, "required": ["said"], "additionalProperties": False}}, style
    )

    def call(**values):
        return (
            "<tool_call>f\n"
            + "".join(f"<k>{k}</k><v>{v}</v>\n" for k, v in values.items())
            + "</tool_call>"
        )

    for values in (
        {"said": 'two\nlines, "<v>" & </'},
        {"said": "", "n": 12},
        {"said": "x", "n": -1, "one": "b"},
    ):
        assert made.accepts(call(**values)) and made.faults(call(**values)) == []
    for values in (
        {},
        {"n": 12},
        {"said": "x", "n": "x"},
        {"said": "x", "one": "c"},
        {"said": "x", "other": 1},
    ):
        assert not made.accepts(call(**values))
    assert made.faults(call(said="x", n="x"))
