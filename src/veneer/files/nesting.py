"""How deep JSON and YAML may be nested that anyone may have written, one limit for rows, configs
and adapters; what is text.

What reads such values recurses (json, pydantic, jinja's filters, our own walks), and Python ends a
recursion at about a thousand calls, wherever it then is. So the depth is bounded where a value
comes in; what is found here does not recurse.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_JSON_DEPTH = 64
"""Levels of lists and objects. A tool call's arguments begin at the seventh level of their row."""
TOO_DEEP = f"is nested deeper than {MAX_JSON_DEPTH} levels"

_STRING = re.compile(
    r'"(?:[^"\\]|\\.?)*+"?', re.DOTALL
)  # matches at every quote: linear on any text
_BRACKET = re.compile(r"[\[\]{}]")


def text_too_deep(text: str) -> bool:
    """Whether a JSON text is nested too deep to be read; brackets inside strings do not count."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return False
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_JSON_DEPTH:
            return True
    return False


def walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Everything inside a value (keys too), itself first, each with its depth; a list in nothing
    has depth 1."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, str):  # most are, and to ask whether it is a Mapping is slow
            continue
        if isinstance(value, Mapping):
            waiting += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list):
            waiting += [(each, depth + 1) for each in value]


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: half a character, of a cut escape or another encoding,
    cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_deep(value: Any) -> bool:
    """As text_too_deep, of a value that was read already."""
    return any(
        depth > MAX_JSON_DEPTH and isinstance(inner, list | Mapping) for inner, depth in walk(value)
    )


def yaml_fault(text: str) -> str | None:
    """Why a YAML text is not read, or None: before it is, by its events. Raises yaml.YAMLError for
    what is no YAML.

    Aliases make a few lines stand for a value of 2^60 parts, and of one that holds itself; the
    parser takes minutes over thousands of levels.
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
