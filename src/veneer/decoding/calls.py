"""How calls of tools are written, and calls out of a text that comes in pieces.

    object   <tool_call>{"name": ..., "arguments": {...}}</tool_call>     one after another
    list     [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    named    [TOOL_CALLS]name[ARGS]{...}                                  an id may stand between
    bare     {"name": ..., "parameters": {...}}                           the whole answer

Which of these a base writes, with which marks and keys, is read off its template elsewhere. Marks may be special
tokens, which are no text in other answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veneer.data.examples import RowFault
from veneer.data.json_text import whole_value

Form = Literal["object", "list", "named", "bare"]
Called = tuple[str, str]
"""A tool's name, and its arguments as JSON."""
MOST_NAME = 200
"""Characters of a name, and of an id, that stand between marks."""
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class CallStyle:
    """opens, closes  what stands around; closes may be "": the value ends by itself
    name, arguments   keys of the JSON
    id_mark, between  of named: in front of an id, or ""; in front of the arguments
    special           marks, or parts of them, that are tokens of their own, with their ids
    """

    form: Form
    opens: str
    closes: str = ""
    name: str = "name"
    arguments: str = "arguments"
    id_mark: str = ""
    between: str = ""
    special: tuple[tuple[str, int], ...] = ()

    def calls(self, text: str) -> list[Called] | None:
        """Those that the text between the marks is; None: it is none."""
        if self.form == "named":
            name, mark, rest = text.partition(self.between)
            if self.id_mark:
                name = name.partition(self.id_mark)[0]
            value = _read(rest)
            plain = name.strip() and len(name) <= MOST_NAME and mark
            return [(name.strip(), compact(value))] if plain and isinstance(value, dict) else None
        value = _read(text)
        found = [self._one(each) for each in (value if self.form == "list" and isinstance(value, list) else [value])]
        return [each for each in found if each is not None] if found and None not in found else None

    def _one(self, value: Any) -> Called | None:
        if not isinstance(value, dict) or not isinstance(value.get(self.name), str):
            return None
        given = value.get(self.arguments, {})
        if isinstance(given, str):
            return value[self.name], given
        return (value[self.name], compact(given)) if isinstance(given, dict) else None

    def mark(self, text: str) -> str:
        """As a grammar has it: text in quotes, special tokens by their ids."""
        parts, rest = [], text
        while rest:
            places = [(rest.find(mark), mark, token) for mark, token in self.special if mark in rest]
            place, mark, token = min(places, default=(len(rest), "", -1))
            parts += [json.dumps(rest[:place])] if place else []
            parts += [f"<[{token}]>"] if mark else []
            rest = rest[place + len(mark) :]
        return " ".join(parts)

    def grammar(self, arguments: Mapping[str, str], most: int) -> list[str]:
        """Lines of a grammar of one call and up to `most`. arguments: of each tool, as a grammar has it."""
        lines = ["tool: " + " | ".join(f"tool_{number}" for number in range(len(arguments)))]
        opens = self.mark(self.opens)
        closes = f' "\\n"? {self.mark(self.closes)}' if self.closes else ""
        more = f"{{0,{most - 1}}}" if most > 1 else ""
        if self.form == "list":
            others = f' (", " tool){more}' if more else ""
            lines.append(f'start: {opens} " "? "[" tool{others} "]"{closes}')
        elif self.form == "bare":
            lines.append("start: tool")
        elif self.form == "named":
            lines.append(f"start: call{{1,{most}}}")
            lines.append(f"call: {opens} tool{closes}")
        else:
            lines.append(f'start: call ("\\n"? call){more}' if more else "start: call")
            lines.append(f'call: {opens} "\\n"? tool{closes}')
        for number, (tool, schema) in enumerate(arguments.items()):
            if self.form == "named":
                call_id = f"{self.mark(self.id_mark)} /[a-zA-Z0-9]{{9}}/ " if self.id_mark else ""
                lines.append(f"tool_{number}: {json.dumps(tool)} {call_id}{self.mark(self.between)} {schema}")
            else:
                begin = json.dumps(f"{{{json.dumps(self.name)}: {json.dumps(tool)}, {json.dumps(self.arguments)}: ")
                lines.append(f'tool_{number}: {begin} {schema} "}}"')
        return lines


class CallReader:
    """Pulls calls out of a text as it comes: `push` gives the text outside of them and the calls that are complete.

    What stands between marks and is no call stays text. tools: the names that there are: an answer that is JSON
    without any mark is a call of one of them, or text.
    """

    def __init__(self, style: CallStyle, tools: Collection[str] = ()) -> None:
        self._style, self._tools = style, tools
        self._held = ""
        self._value: _Value | None = None  # of a call that has begun and ends by itself
        self._plain = False  # without marks: the answer began otherwise

    def push(self, text: str) -> tuple[str, list[Called]]:
        self._held += text
        said, calls = "", list[Called]()
        while self._held:
            begin = self._begin()
            said, self._held = said + self._held[: begin[0]], self._held[begin[0] :]
            opens = begin[1]
            if opens is None:
                break
            stop, behind = self._stop(len(opens))
            if stop is None:
                break
            self._value = None
            found = self._calls(self._held[len(opens) : stop])
            if found is None:
                said += self._held[:behind]
                self._plain = not opens
            calls += found or []
            self._held = self._held[behind:]
        return said, calls

    def end(self) -> tuple[str, list[Called]]:
        """What is left: a call whose closing mark was the stop token of some models, or text."""
        held, self._held = self._held, ""
        opens = self._style.opens
        if held and held.startswith(opens) and not self._plain:
            found = self._calls(held[len(opens) :])
            if found is not None:
                return "", found
        return held, []

    def _calls(self, text: str) -> list[Called] | None:
        found = self._style.calls(text)
        if found is None or self._style.form != "bare" or all(name in self._tools for name, _ in found):
            return found
        return None

    def _begin(self) -> tuple[int, str | None]:
        """Characters of what is held that are text for sure; what opens a call behind them, if something does."""
        opens = self._style.opens
        if self._value is not None:
            return 0, opens
        if opens:
            start = self._held.find(opens)
            return (len(self._held) - _begun(self._held, opens), None) if start < 0 else (start, opens)
        if self._plain:
            return len(self._held), None
        first = self._held.lstrip(_BLANK + ";")[:1]
        if first == "{":
            return 0, ""
        self._plain = bool(first)
        return (len(self._held) if first else 0), None

    def _stop(self, start: int) -> tuple[int | None, int]:
        """Where a call ends, and where the text behind its closing mark begins; None: not yet."""
        closes = self._style.closes
        if closes:
            end = self._held.find(closes, start)
            return (None, 0) if end < 0 else (end, end + len(closes))
        if self._value is None:
            if self._style.form == "named":
                mark = self._held.find(self._style.between, start)
                if mark < 0:
                    most = start + 2 * MOST_NAME + len(self._style.id_mark + self._style.between)
                    return (most, most) if len(self._held) > most else (None, 0)
                start = mark + len(self._style.between)
            self._value = _Value(start)
        behind = self._value.end(self._held)
        return (None, 0) if behind is None else (behind, behind)


class _Value:
    """Where a JSON object or list that begins at a place of a growing text ends, each character read once."""

    def __init__(self, start: int) -> None:
        self._at, self._depth, self._within, self._escaped = start, 0, False, False

    def end(self, text: str) -> int | None:
        """Behind it; also where none begins."""
        while self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._within:
                self._within, self._escaped = character != '"', character == "\\"
            elif character == '"' and self._depth:
                self._within = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            elif not self._depth and character not in _BLANK + ";":
                return self._at
            if self._depth <= 0 and character in "}]":
                return self._at
        return None


def compact(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _read(text: str) -> Any:
    """A JSON value; None: it is none."""
    try:
        return whole_value(text.strip(_BLANK + ";"))
    except RowFault:
        return None


def _begun(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
