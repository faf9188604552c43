"""Finds tool calls in an answer while it is generated, in the form that the base writes them.

The forms are in forms.py and elements.py; call_style.py reads the base's form and its marks off its
chat template. Marks may be special tokens, which other answers do not show as text.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""
Called = tuple[str, str]
"""A tool's name, and its arguments as JSON."""
WriteSchema = Callable[[Mapping[str, Any]], str]
"""Writes the values of a JSON schema as a part of a grammar."""
BLANK = " \t\r\n"


@dataclass(frozen=True)
class CallStyle(ABC):
    """How a base writes tool calls.

    opens, closes  marks around a call; an empty `closes` means that the call ends with its JSON
    special        special tokens among the marks, with their ids
    """

    opens: str
    closes: str = ""
    special: tuple[tuple[str, int], ...] = ()

    @property
    def most_ahead(self) -> int:
        """Most characters between the opening mark and the JSON."""
        return 0

    @abstractmethod
    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        """Reads the text between the marks. Returns None if it is not a call."""

    @abstractmethod
    def grammar(self, tools: Tools, most: int, write_schema: WriteSchema) -> list[str]:
        """Returns the lines of a grammar for one to `most` calls."""

    def json_begins(self, text: str, start: int) -> int | None:
        """Returns where the JSON of a call begins whose mark ends at `start`; None if the text does
        not show it yet."""
        return start

    def mark(self, text: str) -> str:
        """Writes a mark for a grammar: text in quotes, special tokens by their ids."""
        parts, rest = [], text
        while rest:
            places = [
                (rest.find(mark), mark, token) for mark, token in self.special if mark in rest
            ]
            place, mark, token = min(places, default=(len(rest), "", -1))
            parts += [json.dumps(rest[:place])] if place else []
            parts += [f"<[{token}]>"] if mark else []
            rest = rest[place + len(mark) :]
        return " ".join(parts)


class CallReader:
    """Separates calls from text while an answer grows.

    Text between marks that is not a call stays text. Blanks between calls and behind the last call
    are dropped.
    """

    def __init__(self, style: CallStyle, tools: Tools) -> None:
        self._style, self._tools = style, tools
        self._pending = ""
        self._blanks: str | None = None  # behind a call
        self._json_end: _JsonEnd | None = None  # of a call that has begun and has no closing mark
        self._is_text = False  # the style has no marks, and the answer did not begin with a call

    def push(self, text: str) -> tuple[str, list[Called]]:
        """Returns the new text outside of calls, and the calls that are complete now."""
        self._pending += text
        shown, calls = "", list[Called]()
        while self._pending:
            start, opens = self._find_call()
            shown += self._show(self._pending[:start])
            self._pending = self._pending[start:]
            if opens is None:
                break
            stop, behind = self._find_end(len(opens))
            if stop is None:
                break
            self._json_end = None
            complete = self._style.calls(self._pending[len(opens) : stop], self._tools)
            if complete is None:
                shown += self._show(self._pending[:behind])
                self._is_text = not opens
            else:
                self._blanks = ""
                calls += complete
            self._pending = self._pending[behind:]
        return shown, calls

    def end(self) -> tuple[str, list[Called]]:
        """Returns what is left: text, or a call whose closing mark was a stop token."""
        rest, self._pending = self._pending, ""
        opens = self._style.opens
        if rest and rest.startswith(opens) and not self._is_text:
            calls = self._style.calls(rest[len(opens) :], self._tools)
            if calls is not None:
                return "", calls
        return self._show(rest), []

    def _show(self, text: str) -> str:
        """Returns the text to show now. Blanks behind a call wait: another call may follow."""
        if self._blanks is None:
            return text
        if not text.strip(BLANK):
            self._blanks += text
            return ""
        shown, self._blanks = self._blanks + text, None
        return shown

    def _find_call(self) -> tuple[int, str | None]:
        """Returns how many pending characters are certainly text, and the opening mark of the call
        behind them; None if no call begins there."""
        opens = self._style.opens
        if self._json_end is not None:
            return 0, opens
        if opens:
            start = self._pending.find(opens)
            if start >= 0:
                return start, opens
            return len(self._pending) - _begun_length(self._pending, opens), None
        if self._is_text:
            return len(self._pending), None
        first = self._pending.lstrip(BLANK + ";")[:1]
        if first == "{":
            return 0, ""
        self._is_text = bool(first)
        return (len(self._pending) if first else 0), None

    def _find_end(self, start: int) -> tuple[int | None, int]:
        """Returns where a call ends, and where the text behind its closing mark begins. The first
        is None until the call is complete."""
        closes = self._style.closes
        if closes:
            end = self._pending.find(closes, start)
            return (None, 0) if end < 0 else (end, end + len(closes))
        if self._json_end is None:
            begins = self._style.json_begins(self._pending, start)
            if begins is None:
                most = start + self._style.most_ahead
                return (most, most) if len(self._pending) > most else (None, 0)
            self._json_end = _JsonEnd(begins)
        behind = self._json_end.find(self._pending)
        return (None, 0) if behind is None else (behind, behind)


class _JsonEnd:
    """Finds the end of a JSON object or list in a growing text. It reads each character once."""

    def __init__(self, start: int) -> None:
        self._at, self._depth, self._in_string, self._escaped = start, 0, False, False

    def find(self, text: str) -> int | None:
        """Returns the place behind the value, or behind a character that cannot begin one. Returns
        None until the text has it."""
        while self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._in_string, self._escaped = character != '"', character == "\\"
            elif character == '"' and self._depth:
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            elif not self._depth and character not in BLANK + ";":
                return self._at
            if self._depth <= 0 and character in "}]":
                return self._at
        return None


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def compact(data: Any) -> str:
    """Writes JSON without blanks."""
    return _COMPACT.encode(data)


def _begun_length(text: str, mark: str) -> int:
    """Returns how many characters at the end of a text may begin the mark."""
    return next(
        (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0
    )
