"""The fields that require a shape of an answer: OpenAI's response_format, vLLM's
structured_outputs and guided_ fields."""

from typing import Annotated, Any, Literal

from pydantic import Field

from veneer.serve.limits import MOST_TEXTS
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    Body,
    Length,
    NotSupported,
    Object,
    OneOf,
)
from veneer.serve.protocols.request import AnswerShape, ShapeKind
from veneer.serve.refusals import Fault, refuse

Pattern = Annotated[str, Length(1, 10_000)]
GrammarText = Annotated[str, Length(1, 100_000)]
ChoiceTexts = Annotated[list[Annotated[str, Length(1, 1000)]], Length(1, MOST_TEXTS)]
Schema = Annotated[Object | GrammarText, BY_TYPE]
"""A JSON schema, as an object or as its text."""


ANY_OBJECT: Object = {"type": "object"}


class _PlainFormat(Body):
    type: Literal["text", "json_object"]


class NamedSchema(Body):
    """A JSON schema as OpenAI's clients send it."""

    name: Annotated[str, Length(1, 64)]
    schema_: Annotated[Object, Field(alias="schema")]
    description: Annotated[str, Length(0, 10_000), NO_EFFECT] = ""
    strict: Annotated[bool, NO_EFFECT] = False
    """answers always follow the schema"""


class _SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class _FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


ResponseFormat = Annotated[_PlainFormat | _SchemaFormat, OneOf("type")]
FlatFormat = Annotated[_PlainFormat | _FlatSchemaFormat, OneOf("type")]
"""The form of /v1/responses, without an inner object."""


class StructuredOutputs(Body):
    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool = False
    regex: Pattern | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None


class ShapedBody(Body):
    """The fields that say which shape an answer must have."""

    response_format: ResponseFormat | None = None
    """the answer is JSON, or follows a JSON schema"""
    structured_outputs: StructuredOutputs | None = None
    """one of json, json_object, regex, choice, grammar"""
    guided_json: Schema | None = None
    """as structured_outputs.json"""
    guided_regex: Pattern | None = None
    """as structured_outputs.regex"""
    guided_choice: ChoiceTexts | None = None
    """as structured_outputs.choice"""
    guided_grammar: GrammarText | None = None
    """as structured_outputs.grammar"""
    guided_decoding_backend: NotSupported = None
    """there is only one"""
    guided_whitespace_pattern: NotSupported = None
    """up to 32 blanks between the parts of a value are allowed"""

    def shapes(self) -> list[AnswerShape | None]:
        """Returns the shape that each field requires; None for a format of any text."""
        outputs = self.structured_outputs or StructuredOutputs()
        any_object = ANY_OBJECT if outputs.json_object else None
        fields: tuple[tuple[ShapeKind, str, Any], ...] = (
            ("schema", "structured_outputs.json", outputs.json_),
            ("schema", "structured_outputs.json_object", any_object),
            ("regex", "structured_outputs.regex", outputs.regex),
            ("choice", "structured_outputs.choice", outputs.choice),
            ("grammar", "structured_outputs.grammar", outputs.grammar),
            ("schema", "guided_json", self.guided_json),
            ("regex", "guided_regex", self.guided_regex),
            ("choice", "guided_choice", self.guided_choice),
            ("grammar", "guided_grammar", self.guided_grammar),
        )
        shapes = [AnswerShape(kind, name, spec) for kind, name, spec in fields if spec is not None]
        return [format_shape(self.response_format, "response_format"), *shapes]


def only_shape(*required: AnswerShape | None) -> AnswerShape | None:
    """Returns the shape that an answer must have, of all that its request requires; None: any.

    Refusal: 400 if there are several.
    """
    shapes = [shape for shape in required if shape is not None]
    if len(shapes) > 1:
        first, *others = (shape.param for shape in shapes)
        reason = f"cannot be used with {first}: an answer has one shape"
        raise refuse([Fault(other, reason) for other in others])
    return shapes[0] if shapes else None


def format_shape(
    response_format: ResponseFormat | NamedSchema | None, param: str
) -> AnswerShape | None:
    """Returns the shape that a response format of either form requires. param: its field."""
    if isinstance(response_format, _SchemaFormat):
        response_format = response_format.json_schema
    if isinstance(response_format, NamedSchema):
        schema = response_format.schema_
    elif response_format is not None and response_format.type == "json_object":
        schema = ANY_OBJECT
    else:
        return None
    return AnswerShape("schema", param, schema)
