"""What an answer's text must be: response_format as OpenAI has it, vLLM's structured_outputs and
guided_ fields."""

from __future__ import annotations

from typing import Any, Literal

from veneer.serve.limits import MOST_TEXTS
from veneer.serve.protocols.fields import (
    AnyObject,
    Either,
    Field,
    Flag,
    Listed,
    Refused,
    Table,
    Tagged,
    Text,
)
from veneer.serve.protocols.request import AnswerShape
from veneer.serve.refusals import Fault, refuse

_PATTERN = Text(10_000, 1)
_GRAMMAR = Text(100_000, 1)
_CHOICES = Listed(Text(1000, 1), MOST_TEXTS, 1)
SCHEMA = Either((AnyObject(), _GRAMMAR))
"""A JSON schema, as an object or as its text."""

RESPONSE_FORMAT = Field(
    "response_format",
    Tagged(
        "type",
        {
            "text": (),
            "json_object": (),
            "json_schema": (
                Field(
                    "json_schema",
                    Table(
                        (
                            Field("name", Text(64, 1), "", required=True),
                            Field("schema", AnyObject(), "", required=True),
                            Field("description", Text(10_000), "", no_effect=True),
                            Field("strict", Flag(), "answers always keep to it", no_effect=True),
                        )
                    ),
                    "",
                    required=True,
                ),
            ),
        },
    ),
    "the answer is JSON, or JSON of a schema",
)
STRUCTURED = (
    Field(
        "structured_outputs",
        Table(
            (
                Field("json", SCHEMA, ""),
                Field("json_object", Flag(), ""),
                Field("regex", _PATTERN, ""),
                Field("choice", _CHOICES, ""),
                Field("grammar", _GRAMMAR, ""),
            )
        ),
        "one of json, json_object, regex, choice, grammar",
    ),
    Field("guided_json", SCHEMA, "as structured_outputs.json"),
    Field("guided_regex", _PATTERN, "as structured_outputs.regex"),
    Field("guided_choice", _CHOICES, "as structured_outputs.choice"),
    Field("guided_grammar", _GRAMMAR, "as structured_outputs.grammar"),
    Field("guided_decoding_backend", Refused("there is one"), ""),
    Field(
        "guided_whitespace_pattern",
        Refused("up to 32 blanks may stand between the parts of a value"),
        "",
    ),
)
_KINDS: dict[str, Literal["json", "schema", "regex", "choice", "grammar"]] = {
    "json": "schema",
    "json_object": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def shape_of(values: dict[str, Any]) -> AnswerShape | None:
    """Of a body that these fields passed. Refusal: 400, two of them at once."""
    asked: list[tuple[str, AnswerShape]] = []
    given = values.get("response_format") or {}
    if given.get("type") == "json_object":
        asked.append(("response_format", AnswerShape("json", "response_format")))
    elif given.get("type") == "json_schema":
        asked.append(
            (
                "response_format",
                AnswerShape("schema", "response_format", given["json_schema"]["schema"]),
            )
        )
    named = [
        ("structured_outputs." + name, name, v)
        for name, v in (values.get("structured_outputs") or {}).items()
    ]
    named += [
        (f"guided_{name}", name, values[f"guided_{name}"])
        for name in _KINDS
        if f"guided_{name}" in values
    ]
    for field, name, spec in named:
        if spec is not None and spec is not False:
            asked.append(
                (field, AnswerShape(_KINDS[name], field, None if name == "json_object" else spec))
            )
    if len(asked) > 1:
        raise refuse(
            [Fault(asked[1][0], f"and {asked[0][0]} are both given: an answer has one shape")]
        )
    return asked[0][1] if asked else None
