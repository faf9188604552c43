r"""Call styles whose arguments are elements, as Qwen3-Coder, Qwen3.5 and GLM write them.

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>
    <tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>

Texts have no quotes, so the tool's schema decides whether 12 is a number or a text: an argument
that may be a text is one. Others are JSON, or True, False and None as Python writes them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.files.json_text import whole_value
from veneer.decoding.tool_calls.calls import BLANK, Called, CallStyle, Tools, WriteSchema, compact
from veneer.decoding.tool_calls.forms import MOST_NAME, one_of, repeated_calls

_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class ElementCalls(CallStyle):
    """The marks of a call's elements.

    name_ends            behind the name
    key_opens, key_ends  around a key; its value follows
    value_ends           behind a value
    tail                 behind the last value, in front of the closing mark
    """

    name_ends: str = ""
    key_opens: str = ""
    key_ends: str = ""
    value_ends: str = ""
    tail: str = ""

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        opens, key_ends = self.key_opens.strip(BLANK), self.key_ends.strip(BLANK)
        begin = text.find(opens)
        if begin >= 0:
            head = text[:begin]
        else:
            head = text.rstrip(BLANK).removesuffix(self.tail.strip(BLANK))
        name = head.strip(BLANK).removesuffix(self.name_ends.strip(BLANK)).strip(BLANK)
        if not _is_name(name):
            return None
        arguments: dict[str, Any] = {}
        schema = tools.get(name, {})
        while begin >= 0:
            key_end = text.find(key_ends, begin + len(opens))
            if key_end < 0:
                return None
            value_start = key_end + len(key_ends)
            value_end, next_key = self._find_value_end(text, value_start)
            key = text[begin + len(opens) : key_end].strip(BLANK)
            if value_end < 0 or not _is_name(key):
                return None
            value = text[value_start:value_end]
            value = value.removeprefix("\n") if self.key_ends.endswith("\n") else value
            value = value.removesuffix("\n") if self.value_ends.startswith("\n") else value
            arguments[key] = _read_value(value, _types(_properties(schema).get(key), schema))
            begin = next_key
        return [(name, compact(arguments))]

    def grammar(self, tools: Tools, most: int, write_schema: WriteSchema) -> list[str]:
        rules = []
        for tool, schema in tools.items():
            elements = [self.mark(tool + self.name_ends)]
            for key, value_schema in _properties(schema).items():
                key_mark = self.mark(self.key_opens + key + self.key_ends)
                element = f"{key_mark} {self._value_rule(value_schema, schema, write_schema)}"
                required = key in (schema.get("required") or ())
                elements.append(element if required else f"({element})?")
            rules.append(" ".join(elements))
        return [
            repeated_calls(most),
            f"call: {self.mark(self.opens)} tool {self.mark(self.tail + self.closes)}",
            f"text[suffix={json.dumps(self.value_ends)}]: /(?s:.*)/",
            *one_of(rules),
        ]

    def _value_rule(
        self, value_schema: Any, schema: Mapping[str, Any], write_schema: WriteSchema
    ) -> str:
        """Returns the rule of a value and its closing mark. schema: of all arguments."""
        options = value_schema.get("enum") if isinstance(value_schema, dict) else None
        if isinstance(options, list) and options:
            value = " | ".join(
                json.dumps(option if isinstance(option, str) else compact(option))
                for option in options
            )
        elif "string" in _types(value_schema, schema):
            return "text"
        else:
            definitions = {
                name: schema[name] for name in ("$defs", "definitions") if name in schema
            }
            whole = {**definitions, **value_schema} if isinstance(value_schema, dict) else {}
            value = write_schema(whole)
        return f"({value}) {self.mark(self.value_ends)}"

    def _find_value_end(self, text: str, start: int) -> tuple[int, int]:
        """Returns where the value at `start` ends, and where the next key's mark begins; -1 if
        there is none."""
        ends = self.value_ends.strip(BLANK)
        end = text.find(ends, start)
        while end >= 0:
            if match := self._behind_value.match(text, end + len(ends)):
                return end, match.start("more")
            end = text.find(ends, end + len(ends))
        return -1, -1

    @cached_property
    def _behind_value(self) -> re.Pattern[str]:
        """Matches what may follow a value: another key, or the end."""
        opens, tail = (re.escape(mark.strip(BLANK)) for mark in (self.key_opens, self.tail))
        return re.compile(rf"[{BLANK}]*(?:(?P<more>{opens})|(?:{tail})?[{BLANK}]*\Z)")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MOST_NAME and "\n" not in name


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _types(value_schema: Any, schema: Mapping[str, Any]) -> set[str]:
    """Returns the JSON types that a value may have; "string" if its schema names none.

    schema: of all arguments, with the definitions that are referred to. Each reference is followed
    once, so definitions may refer to themselves.
    """
    types: set[str] = set()
    followed: set[str] = set()
    waiting = [value_schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            types.add("string")
        elif isinstance(named := part.get("type"), str | list):
            types |= {named} if isinstance(named, str) else set(map(str, named))
        elif isinstance(values := part.get("enum"), list):
            types.add("string" if any(isinstance(value, str) for value in values) else "number")
        elif isinstance(reference := part.get("$ref"), str):
            if reference not in followed:
                followed.add(reference)
                section, _, name = reference.removeprefix("#/").partition("/")
                definitions = schema.get(section)
                waiting.append(definitions.get(name) if isinstance(definitions, dict) else None)
        elif options := _options(part):
            waiting += options
        else:
            types.add("object" if "properties" in part else "string")
    return types or {"string"}


def _options(schema: Mapping[str, Any]) -> list[Any]:
    """Returns the schemas that a value may follow one of, up to a hundred."""
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(keyword), list):
            return options[:100]
    return []


def _read_value(text: str, types: set[str]) -> Any:
    if "string" in types:
        return None if "null" in types and text.strip() in ("null", "None") else text
    try:
        return whole_value(text.strip())
    except RowFault:
        return _WORDS.get(text.strip(), text)
