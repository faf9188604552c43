"""Whether a text is JSON of a schema: the last word on what a grammar let pass, which covers parts
of schemas alone.

Schemas and texts are strangers': patterns are matched by RE2, references go nowhere but into the
schema, and the work is bounded. Drafts and keywords are jsonschema's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from veneer.errors import ConfigError
from veneer.files.nesting import MAX_JSON_DEPTH, text_too_deep, walk
from veneer.patterns import PatternError, compiled

MOST_STEPS = 20_000
"""Keywords that are compared with values, and patterns with names, before a check is given up."""
_VALUES = ("const", "enum", "default", "examples")
_MOST_FAULTS = 5

Keyword = Callable[[Any, Any, Any, Any], Iterator[Any]]


class _TooMuchError(Exception): ...


class JsonCheck:
    """schema: as it was read. ConfigError: it is none, or holds a pattern that cannot be matched
    here."""

    def __init__(self, schema: Mapping[str, Any] | bool) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for

        self._schema = schema
        draft = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
        if not isinstance(draft, str):
            raise ConfigError("this is no JSON schema", ["$schema: the name of a draft is text"])
        try:
            self._kind = validator_for(schema, default=Draft202012Validator)
            self._kind.check_schema(schema)
        except SchemaError as fault:
            raise ConfigError(
                "this is no JSON schema", [f"{fault.json_path}: {fault.message[:300]}"]
            ) from None
        except (
            Exception
        ) as fault:  # an $id that is no address, say: jsonschema lets such errors through
            raise ConfigError(
                "this is no JSON schema", [f"{type(fault).__name__}: {str(fault)[:300]}"]
            ) from None
        faults = []
        for source in _patterns(schema):
            try:
                compiled(source)
            except PatternError as fault:
                faults.append(str(fault))
        if faults:
            raise ConfigError("the schema holds patterns that cannot be matched", faults)

    def faults(self, text: str) -> list[str]:
        """What is wrong with a text; none: it is JSON of the schema."""
        if text_too_deep(text):
            return [f"it is nested deeper than {MAX_JSON_DEPTH} levels"]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as fault:
            return [f"it is no JSON: {fault}"]
        return self.value_faults(value)

    def value_faults(self, value: Any) -> list[str]:
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
                yield ValidationError(f"{str(instance)[:100]!r} is none of the values of the enum")

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
        found: list[str] = []
        try:
            for fault in kind(self._schema, registry=Registry()).iter_errors(value):
                found.append(f"{fault.json_path}: {fault.message[:300]}")
                if len(found) == _MOST_FAULTS:
                    break
        except (_TooMuchError, RecursionError):
            found.append("the schema is too entangled to be checked")
        except Unresolvable as fault:
            found.append(f"the schema refers to what it does not hold: {str(fault)[:100]}")
        except (
            Exception
        ) as fault:  # old drafts let keywords of any type pass, and jsonschema fails on these
            found.append(
                f"the schema cannot be checked: {type(fault).__name__}: {str(fault)[:100]}"
            )
        return found


def _patterns(schema: Any) -> Iterator[str]:
    """Every regular expression in it."""
    shown = {
        id(value) for part, _ in walk(schema) if isinstance(part, Mapping) for value in _given(part)
    }
    for part, _ in walk(schema):
        if isinstance(part, Mapping) and id(part) not in shown:
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            if isinstance(part.get("patternProperties"), Mapping):
                yield from part["patternProperties"]


def _given(part: Mapping[str, Any]) -> Iterator[Any]:
    """Values that a schema shows, and what is in them: no schemas, whatever they look like."""
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
            each.search(name) for each in sources
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
    """How often a pattern of the schema is looked for in a name of the value."""
    patterns = schema.get("patternProperties", {})
    return 1 + (
        len(patterns) * len(instance)
        if isinstance(instance, dict) and isinstance(patterns, dict)
        else 0
    )


def _identity(value: Any) -> Any:
    """Equal for values that are equal in JSON, where 1 is 1.0 and true is not 1: to look one up
    among many."""
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
"""Where jsonschema would take Python's regular expressions, or compare each value with each."""
