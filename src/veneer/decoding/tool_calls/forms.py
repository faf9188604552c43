"""Forms of calls whose arguments are JSON.

ObjectCalls   <tool_call>{"name": ..., "arguments": {...}}</tool_call>     one after another
ListedCalls   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
NamedCalls    [TOOL_CALLS]name[ARGS]{...}                                  an id may stand between
BareCall      {"name": ..., "parameters": {...}}                           the whole answer
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.files.json_text import whole_value
from veneer.decoding.tool_calls.calls import BLANK, Called, CallStyle, Tools, compact

MOST_NAME = 200
"""Characters of a name, and of an id, that stand between marks."""
JsonOf = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class ObjectCalls(CallStyle):
    """name, arguments: keys of the JSON."""

    name: str = "name"
    arguments: str = "arguments"

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        return self._all([_read(text)])

    def grammar(self, tools: Tools, most: int, json_of: JsonOf) -> list[str]:
        more = f' ("\\n"? call){{0,{most - 1}}}' if most > 1 else ""
        call = f'call: {self.mark(self.opens)} "\\n"? tool{_closed(self)}'
        return [f"start: call{more}", call, *self._tools(tools, json_of)]

    def _all(self, values: list[Any]) -> list[Called] | None:
        found = [each for each in map(self._one, values) if each is not None]
        return found if found and len(found) == len(values) else None

    def _one(self, value: Any) -> Called | None:
        if not isinstance(value, dict) or not isinstance(value.get(self.name), str):
            return None
        given = value.get(self.arguments, {})
        if isinstance(given, str):
            return value[self.name], given
        return (value[self.name], compact(given)) if isinstance(given, dict) else None

    def _tools(self, tools: Tools, json_of: JsonOf) -> list[str]:
        def begin(tool: str) -> str:
            return json.dumps(
                f"{{{json.dumps(self.name)}: {json.dumps(tool)}, {json.dumps(self.arguments)}: "
            )

        return one_of([f'{begin(tool)} {json_of(schema)} "}}"' for tool, schema in tools.items()])


@dataclass(frozen=True)
class ListedCalls(ObjectCalls):
    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        value = _read(text)
        return self._all(value if isinstance(value, list) else [value])

    def grammar(self, tools: Tools, most: int, json_of: JsonOf) -> list[str]:
        others = f' (", " tool){{0,{most - 1}}}' if most > 1 else ""
        start = f'start: {self.mark(self.opens)} " "? "[" tool{others} "]"{_closed(self)}'
        return [start, *self._tools(tools, json_of)]


@dataclass(frozen=True)
class BareCall(ObjectCalls):
    """Without marks: a call is of one of the tools, or text."""

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        found = self._all([_read(text)])
        return found if found and found[0][0] in tools else None

    def grammar(self, tools: Tools, most: int, json_of: JsonOf) -> list[str]:
        return ["start: tool", *self._tools(tools, json_of)]


@dataclass(frozen=True)
class NamedCalls(CallStyle):
    """id_mark: in front of an id, or "". between: in front of the arguments."""

    id_mark: str = ""
    between: str = ""

    @property
    def most_ahead(self) -> int:
        return 2 * MOST_NAME + len(self.id_mark + self.between)

    def json_begins(self, text: str, start: int) -> int | None:
        mark = text.find(self.between, start)
        return None if mark < 0 else mark + len(self.between)

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        name, mark, rest = text.partition(self.between)
        if self.id_mark:
            name = name.partition(self.id_mark)[0]
        value = _read(rest)
        plain = name.strip() and len(name) <= MOST_NAME and mark
        return [(name.strip(), compact(value))] if plain and isinstance(value, dict) else None

    def grammar(self, tools: Tools, most: int, json_of: JsonOf) -> list[str]:
        call_id = f"{self.mark(self.id_mark)} /[a-zA-Z0-9]{{9}}/ " if self.id_mark else ""
        each = [
            f"{json.dumps(tool)} {call_id}{self.mark(self.between)} {json_of(s)}"
            for tool, s in tools.items()
        ]
        call = f"call: {self.mark(self.opens)} tool{_closed(self)}"
        return [f"start: call{{1,{most}}}", call, *one_of(each)]


def one_of(tools: list[str]) -> list[str]:
    """The rule `tool`: one of these."""
    rules = [f"tool_{number}: {tool}" for number, tool in enumerate(tools)]
    return ["tool: " + " | ".join(f"tool_{number}" for number in range(len(tools))), *rules]


def _closed(style: CallStyle) -> str:
    return f' "\\n"? {style.mark(style.closes)}' if style.closes else ""


def _read(text: str) -> Any:
    """A JSON value; None: it is none."""
    try:
        return whole_value(text.strip(BLANK + ";"))
    except RowFault:
        return None
