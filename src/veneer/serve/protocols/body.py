"""The base of all request bodies: pydantic models with error messages of our own.

    class Ping(Body):
        model: Annotated[str, Length(1, 200)]
        '''which adapter answers'''
        n: Annotated[int, Num(CHOICES)] = 1
        '''answers to each prompt'''

    Ping.read({"model": "tickets"})      a Ping, or a Refusal that names every wrong field

One definition of a field validates it, fills its row in docs/serve.md and describes it in
/openapi.json. Nothing that a client sends is ignored: a field acts, has NO_EFFECT, or is refused by
name. null means that the field is absent. Validation stops after MOST_FAULTS faults, so that a body
with a million faults costs no more than a good one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticOmit, core_schema

from veneer.bounds import Number
from veneer.serve.limits import MOST_FAULTS
from veneer.serve.protocols.faults import (
    Location,
    invalid,
    known_faults,
    refusal_for,
    unknown_field,
)
from veneer.serve.refusals import Fault, as_json, brief


class Body(BaseModel):
    """A JSON object with known fields, read strictly: "1" is not 1."""

    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, serialize_by_alias=True
    )

    _by_alias: ClassVar[dict[str, FieldInfo]]
    """The fields by the names that clients send."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls._by_alias = {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def read(cls, body: Any) -> Self:
        """Validates a request's body. Refusal: 400 with the first MOST_FAULTS faults."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise refusal_for(error) from None

    def conflicts(self) -> Iterator[Fault]:
        """Yields fields that are valid alone but not together."""
        return iter(())

    @model_validator(mode="wrap")
    @classmethod
    def _gather_faults(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, dict):
            raise invalid([((), f"{brief(value)} is not an object")])
        fields = cls._by_alias
        unknown = (name for name in value if name not in fields)
        faults = [unknown_field(name, fields) for name in islice(unknown, MOST_FAULTS + 1)]
        try:
            body = validate({k: v for k, v in value.items() if v is not None and k in fields})
        except ValidationError as error:
            for place, what in known_faults(error):
                field = fields[str(place[0])]
                is_described = len(place) == 1 and _WITH_DESCRIPTION.intersection(
                    map(type, field.metadata)
                )
                hint = f": {field.description}" if is_described and field.description else ""
                faults.append((place, what + hint))
        else:
            faults += [((fault.param or "",), fault.what) for fault in body.conflicts()]
            if not faults:
                return body
        raise invalid(faults)


@dataclass(frozen=True)
class Num:
    """A number within bounds. A whole number may come as 4.0."""

    bounds: Number

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        low = "exclusiveMinimum" if self.bounds.above else "minimum"
        high = "exclusiveMaximum" if self.bounds.below else "maximum"
        kind = "integer" if self.bounds.kind is int else "number"
        return {"type": kind, low: self.bounds.least, high: self.bounds.most}

    def _check(self, value: Any) -> Any:
        number = value
        if self.bounds.kind is int and isinstance(value, float) and value.is_integer():
            number = int(value)
        if not self.bounds.holds(number):
            raise invalid([((), f"{brief(value)} is not {self.bounds.description}")])
        return number


@dataclass(frozen=True)
class Length:
    """Bounds of the number of characters of a text, or of entries of a list or an object."""

    least: int
    most: int

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema: Any = handler(source)
        if schema["type"] == "str":
            schema["min_length"], schema["max_length"] = self.least, self.most
            return schema
        entries = list if schema["type"] == "list" else dict
        if entries is list:
            schema["fail_fast"] = True
        item = get_args(get_args(source)[0])
        numbers = [mark.bounds for mark in item if isinstance(mark, Num)]

        def check(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, entries) and not self.least <= len(value) <= self.most:
                reason = f"it has {len(value):,} entries: should be {self.least:,} to {self.most:,}"
                raise invalid([((), reason)])
            if entries is dict or not isinstance(value, list):
                return validate(value)
            if numbers and numbers[0].holds_ints(value):  # a prompt's ids: thousands
                return value
            return _check_entries(value, validate)

        return core_schema.no_info_wrap_validator_function(check, schema)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler(schema)
        names = {"array": ("minItems", "maxItems"), "object": ("minProperties", "maxProperties")}
        if described["type"] in names:
            low, high = names[described["type"]]
            described |= {low: self.least, high: self.most}
        return described


class AsSent:
    """A JSON object that a model accepts, kept as the client sent it."""

    def __init__(self, model: type[Body]) -> None:
        self._model = model

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any) -> Any:
            self._model.model_validate(value)
            return value

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(self._model.__pydantic_core_schema__)


class OneOf:
    """Chooses a member of a union: by a tag, or by the JSON type of the value.

    tag: the field of an object whose value chooses the model. Without a tag the type chooses; for a
    list, the type of its first entry. default: the value if an object lacks the field. hint: added
    to the error for other values.
    """

    def __init__(self, tag: str = "", *, default: str | None = None, hint: str = "") -> None:
        self._tag, self._default = tag, default
        self._hint = f": {hint}" if hint else ""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        members = get_args(source) or (source,)
        names = self._tags(members) if self._tag else _json_types(members)
        choices = {name: handler.generate_schema(member) for name, member in names.items()}
        expected = " or ".join(_TYPE_WORDS.get(name, name) for name in choices) + self._hint

        def choose(value: Any) -> Any:
            if isinstance(value, Body):  # pydantic serialises it
                return getattr(value, self._tag, "dict")
            if self._tag:
                return value.get(self._tag, self._default) if isinstance(value, dict) else None
            name = _value_type(value)
            return name if name in choices else name.partition("[")[0]

        def check(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
            name = choose(value)
            if not isinstance(name, str) or name not in choices:
                if not self._tag:
                    raise invalid([((), f"{brief(value)} is not {expected}")])
                if not isinstance(value, dict):
                    raise invalid([((), f"{brief(value)} is not an object")])
                raise invalid([((self._tag,), f"{brief(name)} is not {expected}")])
            try:
                return validate(value)
            except ValidationError as error:  # pydantic puts the choice in front of the path
                raise invalid([(place[1:], what) for place, what in known_faults(error)]) from None

        return core_schema.no_info_wrap_validator_function(
            check, core_schema.tagged_union_schema(choices, choose)
        )

    def _tags(self, models: Sequence[type[Body]]) -> dict[str, Any]:
        return {
            value: model
            for model in models
            for value in get_args(model.model_fields[self._tag].annotation)
        }


class _NoEffect:
    """Marks a field that is accepted and not read."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        if get_origin(source) is not Literal:
            return schema
        values = get_args(source)

        def check(value: Any) -> Any:
            if not any(type(value) is type(known) and value == known for known in values):
                raise invalid([((), f"{brief(value)} is not {' or '.join(map(as_json, values))}")])
            return value

        return core_schema.no_info_before_validator_function(check, schema)


class _NotSupported:
    """Marks a field of other servers; the field's description says what to do instead."""

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def refuse_value(value: Any) -> Any:
            raise invalid([((), "is not supported")])

        return core_schema.no_info_plain_validator_function(refuse_value)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        raise PydanticOmit


BY_TYPE = OneOf()
NO_EFFECT = _NoEffect()
NotSupported = Annotated[Any, _NotSupported()]
OnlyFalse = Annotated[Literal[False], NO_EFFECT]
OnlyTrue = Annotated[Literal[True], NO_EFFECT]
EmptyList = Annotated[list[Any], Length(0, 0), NO_EFFECT]
Object = dict[str, Any]
"""An object of any content; the size of the body bounds it."""
_WITH_DESCRIPTION = {_NoEffect, _NotSupported}
"""Marks of fields whose description is added to an error."""
_TYPE_WORDS = {
    "str": "text",
    "dict": "an object",
    "list": "a list",
    "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers",
    "list[list]": "a list of lists",
}


def _check_entries(entries: list[Any], validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
    """Validates all entries, going on after a wrong one until there are more than MOST_FAULTS."""
    faults: list[tuple[Location, str]] = []
    start = 0
    while len(faults) <= MOST_FAULTS:
        try:
            valid = validate(entries[start:])
        except ValidationError as error:
            index = 0
            for place, what in known_faults(error):
                index = int(place[0])
                faults.append(((start + index, *place[1:]), what))
            start += index + 1
        else:
            if faults:
                break
            return valid
    raise invalid(faults)


def _json_types(members: Iterable[Any]) -> dict[str, Any]:
    """Names the JSON type that each member of a union accepts."""
    types = {_member_type(member): member for member in members}
    lists = [name for name in types if name.startswith("list")]
    if len(lists) == 1:
        types["list"] = types.pop(lists[0])
    return types


def _member_type(member: Any) -> str:
    """Returns the name of the JSON type that a member of a union accepts."""
    inner = get_args(member)[0] if get_origin(member) is Annotated else member
    origin = get_origin(inner) or inner
    if origin is list:
        return f"list[{_member_type(get_args(inner)[0]).partition('[')[0]}]"
    if origin is Literal:
        return "str"
    return "dict" if issubclass(origin, BaseModel) else str(origin.__name__)


def _value_type(value: Any) -> str:
    if isinstance(value, list) and value:
        first = type(value[0])
        return f"list[{'int' if first is float else first.__name__}]"
    return type(value).__name__
