"""Limits the nesting of untrusted JSON and YAML, and checks that texts are valid UTF-8.

Readers of such values recurse (json, pydantic, jinja's filters, our own walks), and Python ends a
recursion at about a thousand calls, wherever it is. So the depth is limited where a value comes in.
The functions here do not recurse.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_JSON_DEPTH = 64
"""Levels of lists and objects. A tool call's arguments begin at the seventh level of their row."""
TOO_DEEP = f"is nested deeper than {MAX_JSON_DEPTH} levels"

_STRING = re.compile(r'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)  # possessive, so linear on any text
_BRACKET = re.compile(r"[\[\]{}]")


def text_too_deep(text: str) -> bool:
    """Whether a JSON text is nested too deeply; brackets inside strings do not count."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return False
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_JSON_DEPTH:
            return True
    return False


def walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yields everything inside a value (keys too), itself first, with depths; the value has depth
    1."""
    pending = [(value, 1)]
    while pending:
        value, depth = pending.pop()
        yield value, depth
        if isinstance(value, str):  # the common case; the check for Mapping is slow
            continue
        if isinstance(value, Mapping):
            pending += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]


def is_text(text: str) -> bool:
    """Whether the text can be written as UTF-8. Lone surrogates, from cut escapes or wrong
    encodings, cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_deep(value: Any) -> bool:
    """Whether a parsed value is nested too deeply."""
    return any(
        depth > MAX_JSON_DEPTH and isinstance(inner, list | Mapping) for inner, depth in walk(value)
    )


def yaml_fault(text: str) -> str | None:
    """Explains why a YAML text is refused, by its events, before it is parsed; None if it is fine.

    Raises yaml.YAMLError for invalid YAML. Aliases let a few lines mean 2^60 parts, or a value that
    contains itself; the parser needs minutes for thousands of levels.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_JSON_DEPTH:
            return f" {TOO_DEEP}"
        if isinstance(event, yaml.AliasEvent):
            assert event.start_mark, "the parser marks every event"
            return f":{event.start_mark.line + 1} *{event.anchor} is an alias: write the value out"
    return None
