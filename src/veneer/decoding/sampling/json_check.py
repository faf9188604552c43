"""Checks whether a finished text is JSON of a schema. Grammars enforce only parts of a schema.

Schemas and texts come from strangers: RE2 matches their patterns, references may only point into
the schema itself, and the work is bounded. jsonschema knows the drafts and their keywords.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from veneer.errors import ConfigError
from veneer.files.nesting import MAX_JSON_DEPTH, text_too_deep, walk
from veneer.patterns import PatternError, compiled

MOST_STEPS = 20_000
"""Comparisons of keywords with values, and of patterns with names, until a check is abandoned."""
_VALUES = ("const", "enum", "default", "examples")
_MOST_FAULTS = 5

Keyword = Callable[[Any, Any, Any, Any], Iterator[Any]]


class _TooMuchError(Exception): ...


class JsonCheck:
    """Checks texts and values by one schema. ConfigError: it is not a schema, or RE2 cannot match
    one of its patterns."""

    def __init__(self, schema: Mapping[str, Any] | bool) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for

        self._schema = schema
        draft = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
        if not isinstance(draft, str):
            raise ConfigError("this is not a JSON schema", ["$schema: a draft's name is text"])
        try:
            self._kind = validator_for(schema, default=Draft202012Validator)
            self._kind.check_schema(schema)
        except SchemaError as fault:
            raise ConfigError(
                "this is not a JSON schema", [f"{fault.json_path}: {fault.message[:300]}"]
            ) from None
        except Exception as fault:  # jsonschema does not catch all errors, such as those of an $id
            raise ConfigError(
                "this is not a JSON schema", [f"{type(fault).__name__}: {str(fault)[:300]}"]
            ) from None
        faults = []
        for source in _patterns(schema):
            try:
                compiled(source)
            except PatternError as fault:
                faults.append(str(fault))
        if faults:
            raise ConfigError("the schema has patterns that cannot be matched", faults)

    def faults(self, text: str) -> list[str]:
        """Returns what is wrong with a text; an empty list if it is JSON of the schema."""
        if text_too_deep(text):
            return [f"it is nested deeper than {MAX_JSON_DEPTH} levels"]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as fault:
            return [f"it is not JSON: {fault}"]
        return self.value_faults(value)

    def value_faults(self, value: Any) -> list[str]:
        """Returns what is wrong with a value, up to _MOST_FAULTS faults."""
        from jsonschema.exceptions import ValidationError
        from jsonschema.validators import extend
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        steps = 0
        enums: dict[int, frozenset[Any]] = {}

        def in_enum(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
            if id(wanted) not in enums:
                enums[id(wanted)] = frozenset(map(_identity, wanted))
            if _identity(instance) not in enums[id(wanted)]:
                yield ValidationError(f"{str(instance)[:100]!r} is not in the enum")

        def counted(keyword: Keyword) -> Keyword:
            def checked(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
                nonlocal steps
                steps += (
                    _searches(schema, instance)
                    if keyword in (_pattern_properties, _additional_properties)
                    else 1
                )
                if steps > MOST_STEPS:
                    raise _TooMuchError
                yield from keyword(validator, wanted, instance, schema) or ()

            return checked

        keywords = {**self._kind.VALIDATORS, **_OURS, "enum": in_enum}
        kind = extend(self._kind, {name: counted(keyword) for name, keyword in keywords.items()})
        faults: list[str] = []
        try:
            for fault in kind(self._schema, registry=Registry()).iter_errors(value):
                faults.append(f"{fault.json_path}: {fault.message[:300]}")
                if len(faults) == _MOST_FAULTS:
                    break
        except (_TooMuchError, RecursionError):
            faults.append("the schema is too complex to be checked")
        except Unresolvable as fault:
            faults.append(f"a reference of the schema is not found in it: {str(fault)[:100]}")
        except Exception as fault:  # old drafts allow keywords of any type
            faults.append(
                f"the schema cannot be checked: {type(fault).__name__}: {str(fault)[:100]}"
            )
        return faults


def _patterns(schema: Any) -> Iterator[str]:
    """Yields every regular expression of a schema."""
    parts = [part for part, _ in walk(schema) if isinstance(part, Mapping)]
    shown = {id(value) for part in parts for value in _shown_values(part)}
    for part in parts:
        if id(part) not in shown:
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            if isinstance(part.get("patternProperties"), Mapping):
                yield from part["patternProperties"]


def _shown_values(part: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the objects in values that a schema shows, such as examples. They are not schemas."""
    for name in _VALUES:
        if name in part:
            yield from (value for value, _ in walk(part[name]) if isinstance(value, Mapping))


def _pattern(validator: Any, source: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if isinstance(instance, str) and not compiled(source).search(instance):
        yield ValidationError(f"{instance[:100]!r} does not match {source[:100]!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[Any]:
    if isinstance(instance, dict):
        for source, inner in patterns.items():
            matches = compiled(source)
            for name, value in instance.items():
                if matches.search(name):
                    yield from validator.descend(value, inner, path=name, schema_path=source)


def _additional_properties(
    validator: Any, allowed: Any, instance: Any, schema: Any
) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if not isinstance(instance, dict):
        return
    sources = [compiled(source) for source in schema.get("patternProperties", {})]
    for name, value in instance.items():
        if name not in schema.get("properties", {}) and not any(
            pattern.search(name) for pattern in sources
        ):
            if allowed is False:
                yield ValidationError(f"{name[:100]!r} is not allowed")
            else:
                yield from validator.descend(value, allowed, path=name)


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if unique and isinstance(instance, list) and len(set(map(_identity, instance))) < len(instance):
        yield ValidationError(f"{str(instance)[:100]} has equal items")


def _searches(schema: Mapping[str, Any], instance: Any) -> int:
    """Counts how often the schema's patterns are searched for in names of the value."""
    patterns = schema.get("patternProperties", {})
    return 1 + (
        len(patterns) * len(instance)
        if isinstance(instance, dict) and isinstance(patterns, dict)
        else 0
    )


def _identity(value: Any) -> Any:
    """Returns a key that is equal for values that are equal in JSON: 1 is 1.0, true is not 1."""
    if isinstance(value, dict):
        return "object", frozenset((name, _identity(inner)) for name, inner in value.items())
    if isinstance(value, list):
        return "list", tuple(map(_identity, value))
    return isinstance(value, bool), value


_OURS: dict[str, Keyword] = {
    "uniqueItems": _unique_items,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}
"""Our versions of keywords for which jsonschema uses Python's regular expressions, or compares all
pairs of values."""
