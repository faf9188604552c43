r"""Reads tool calls whose arguments stand in elements, as Qwen3-Coder, Qwen3.5 and GLM write them.

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>
    <tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>

A text is written without quotes. Whether 12 is a number or a text, the tool's schema says: what
may be a text is one,
anything else is JSON, or True, False, None as templates write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.files.json_text import whole_value
from veneer.decoding.tool_calls.calls import BLANK, Called, CallStyle, Tools, compact
from veneer.decoding.tool_calls.forms import MOST_NAME, one_of

_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class ElementCalls(CallStyle):
    """name_ends            behind the name
    key_opens, key_ends  around a key; its value follows
    value_ends           behind a value
    tail                 behind the last of them, in front of what closes
    """

    name_ends: str = ""
    key_opens: str = ""
    key_ends: str = ""
    value_ends: str = ""
    tail: str = ""

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        opens, key_ends = self.key_opens.strip(BLANK), self.key_ends.strip(BLANK)
        begin = text.find(opens)
        head = (
            text[:begin] if begin >= 0 else text.rstrip(BLANK).removesuffix(self.tail.strip(BLANK))
        )
        name = head.strip(BLANK).removesuffix(self.name_ends.strip(BLANK)).strip(BLANK)
        if not _plain(name):
            return None
        arguments: dict[str, Any] = {}
        schema = tools.get(name, {})
        while begin >= 0:
            key_end = text.find(key_ends, begin + len(opens))
            value_end, begin_next = (
                self._value_end(text, key_end + len(key_ends)) if key_end >= 0 else (-1, -1)
            )
            key = text[begin + len(opens) : max(key_end, 0)].strip(BLANK)
            if value_end < 0 or not _plain(key):
                return None
            value = text[key_end + len(key_ends) : value_end]
            value = value.removeprefix("\n") if self.key_ends.endswith("\n") else value
            value = value.removesuffix("\n") if self.value_ends.startswith("\n") else value
            arguments[key] = _value(value, _kinds(_properties(schema).get(key), schema))
            begin = begin_next
        return [(name, compact(arguments))]

    def grammar(
        self, tools: Tools, most: int, json_of: Callable[[Mapping[str, Any]], str]
    ) -> list[str]:
        more = f' ("\\n"? call){{0,{most - 1}}}' if most > 1 else ""
        lines = [
            f"start: call{more}",
            f"call: {self.mark(self.opens)} tool {self.mark(self.tail + self.closes)}",
        ]
        lines.append(f"text[suffix={json.dumps(self.value_ends)}]: /(?s:.*)/")
        each = []
        for tool, schema in tools.items():
            parts = [self.mark(tool + self.name_ends)]
            for key, own in _properties(schema).items():
                element = (
                    f"{self.mark(self.key_opens + key + self.key_ends)}"
                    f" {self._written(own, schema, json_of)}"
                )
                parts.append(element if key in (schema.get("required") or ()) else f"({element})?")
            each.append(" ".join(parts))
        return [*lines, *one_of(each)]

    def _written(
        self, own: Any, schema: Mapping[str, Any], json_of: Callable[[Mapping[str, Any]], str]
    ) -> str:
        """A value and what ends it, as a grammar has it."""
        given = own.get("enum") if isinstance(own, dict) else None
        if isinstance(given, list) and given:
            said = " | ".join(
                json.dumps(each if isinstance(each, str) else compact(each)) for each in given
            )
        elif "string" in _kinds(own, schema):
            return "text"
        else:
            known = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            said = json_of({**known, **own} if isinstance(own, dict) else {})
        return f"({said}) {self.mark(self.value_ends)}"

    def _value_end(self, text: str, start: int) -> tuple[int, int]:
        """Where the value from `start` on ends, and where the next key opens; -1: it does not,
        there is none."""
        ends = self.value_ends.strip(BLANK)
        end = text.find(ends, start)
        while end >= 0:
            if follows := self._follows.match(text, end + len(ends)):
                return end, follows.start("more")
            end = text.find(ends, end + len(ends))
        return -1, -1

    @cached_property
    def _follows(self) -> re.Pattern[str]:
        """Behind a value: another key, or the end."""
        opens, tail = (re.escape(each.strip(BLANK)) for each in (self.key_opens, self.tail))
        return re.compile(rf"[{BLANK}]*(?:(?P<more>{opens})|(?:{tail})?[{BLANK}]*\Z)")


def _plain(name: str) -> bool:
    return 0 < len(name) <= MOST_NAME and "\n" not in name


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def _kinds(own: Any, schema: Mapping[str, Any]) -> set[str]:
    """Returns the types that a value of the schema `own` may have: a text where it names none. Each
    reference is followed once, so definitions may lead back to themselves."""
    kinds: set[str] = set()
    followed: set[str] = set()
    waiting = [own]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            kinds.add("string")
        elif isinstance(named := part.get("type"), str | list):
            kinds |= {named} if isinstance(named, str) else set(map(str, named))
        elif isinstance(values := part.get("enum"), list):
            kinds.add("string" if any(isinstance(value, str) for value in values) else "number")
        elif isinstance(reference := part.get("$ref"), str):
            if reference not in followed:
                followed.add(reference)
                section, _, name = reference.removeprefix("#/").partition("/")
                definitions = schema.get(section)
                waiting.append(definitions.get(name) if isinstance(definitions, dict) else None)
        elif options := _options(part):
            waiting += options
        else:
            kinds.add("object" if "properties" in part else "string")
    return kinds or {"string"}


def _options(schema: Mapping[str, Any]) -> list[Any]:
    """Returns the schemas of which a value may follow one, up to a hundred."""
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(keyword), list):
            return options[:100]
    return []


def _value(text: str, kinds: set[str]) -> Any:
    if "string" in kinds:
        return None if "null" in kinds and text.strip() in ("null", "None") else text
    try:
        return whole_value(text.strip())
    except RowFault:
        return _WORDS.get(text.strip(), text)
