"""Call styles whose arguments are JSON.

ObjectCalls   <tool_call>{"name": ..., "arguments": {...}}</tool_call>     one after another
ListedCalls   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
NamedCalls    [TOOL_CALLS]name[ARGS]{...}                                  with or without an id
BareCall      {"name": ..., "parameters": {...}}                           the whole answer
"""

import json
from dataclasses import dataclass
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.files.json_text import whole_value
from veneer.decoding.tool_calls.calls import BLANK, Called, CallStyle, Tools, WriteSchema, compact

MOST_NAME = 200
"""Most characters of a name, and of an id, between marks."""


@dataclass(frozen=True)
class ObjectCalls(CallStyle):
    """Each call is an object between marks. name, arguments: its keys."""

    name: str = "name"
    arguments: str = "arguments"

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        return self._read_all([_read_json(text)])

    def grammar(self, tools: Tools, most: int, write_schema: WriteSchema) -> list[str]:
        call = f'call: {self.mark(self.opens)} "\\n"? tool{_closing(self)}'
        return [repeated_calls(most), call, *self._tool_rules(tools, write_schema)]

    def _read_all(self, values: list[Any]) -> list[Called] | None:
        calls = [call for call in map(self._read_call, values) if call is not None]
        return calls if calls and len(calls) == len(values) else None

    def _read_call(self, value: Any) -> Called | None:
        if not isinstance(value, dict) or not isinstance(value.get(self.name), str):
            return None
        arguments = value.get(self.arguments, {})
        if isinstance(arguments, str):
            return value[self.name], arguments
        return (value[self.name], compact(arguments)) if isinstance(arguments, dict) else None

    def _tool_rules(self, tools: Tools, write_schema: WriteSchema) -> list[str]:
        def write_head(tool: str) -> str:
            return json.dumps(
                f"{{{json.dumps(self.name)}: {json.dumps(tool)}, {json.dumps(self.arguments)}: "
            )

        return one_of(
            [f'{write_head(tool)} {write_schema(schema)} "}}"' for tool, schema in tools.items()]
        )


@dataclass(frozen=True)
class ListedCalls(ObjectCalls):
    """All calls are objects of one list."""

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        value = _read_json(text)
        return self._read_all(value if isinstance(value, list) else [value])

    def grammar(self, tools: Tools, most: int, write_schema: WriteSchema) -> list[str]:
        more = f' (", " tool){{0,{most - 1}}}' if most > 1 else ""
        start = f'start: {self.mark(self.opens)} " "? "[" tool{more} "]"{_closing(self)}'
        return [start, *self._tool_rules(tools, write_schema)]


@dataclass(frozen=True)
class BareCall(ObjectCalls):
    """The whole answer is a call. Without marks, an object is a call only if it names a tool."""

    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        calls = super().calls(text, tools)
        return calls if calls and calls[0][0] in tools else None

    def grammar(self, tools: Tools, most: int, write_schema: WriteSchema) -> list[str]:
        return ["start: tool", *self._tool_rules(tools, write_schema)]


@dataclass(frozen=True)
class NamedCalls(CallStyle):
    """The name stands in front of the arguments.

    id_mark: in front of the call's id; empty if calls have none. between: in front of the
    arguments.
    """

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
        value = _read_json(rest)
        is_name = name.strip() and len(name) <= MOST_NAME and mark
        return [(name.strip(), compact(value))] if is_name and isinstance(value, dict) else None

    def grammar(self, tools: Tools, most: int, write_schema: WriteSchema) -> list[str]:
        call_id = f"{self.mark(self.id_mark)} /[a-zA-Z0-9]{{9}}/ " if self.id_mark else ""
        rules = [
            f"{json.dumps(tool)} {call_id}{self.mark(self.between)} {write_schema(schema)}"
            for tool, schema in tools.items()
        ]
        call = f"call: {self.mark(self.opens)} tool{_closing(self)}"
        return [f"start: call{{1,{most}}}", call, *one_of(rules)]


def repeated_calls(most: int) -> str:
    """Returns the grammar's first rule: one to `most` calls, each on a line of its own."""
    more = f' ("\\n"? call){{0,{most - 1}}}' if most > 1 else ""
    return f"start: call{more}"


def one_of(tools: list[str]) -> list[str]:
    """Returns the rule `tool`, which chooses one of the tools, and their rules."""
    rules = [f"tool_{number}: {tool}" for number, tool in enumerate(tools)]
    return ["tool: " + " | ".join(f"tool_{number}" for number in range(len(tools))), *rules]


def _closing(style: CallStyle) -> str:
    return f' "\\n"? {style.mark(style.closes)}' if style.closes else ""


def _read_json(text: str) -> Any:
    """Reads a JSON value; None if it is not JSON."""
    try:
        return whole_value(text.strip(BLANK + ";"))
    except RowFault:
        return None
