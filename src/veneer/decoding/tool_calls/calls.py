"""Calls of tools out of a text that comes in pieces, in the form that a base writes them.

Which form that is (forms.py, elements.py), and its marks, is read off the base's template
elsewhere. Marks may be special tokens, which are no text in other answers.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Tools = Mapping[str, Mapping[str, Any]]
"""Names of tools, each with the JSON schema of its arguments."""
Called = tuple[str, str]
"""A tool's name, and its arguments as JSON."""
BLANK = " \t\r\n"


@dataclass(frozen=True)
class CallStyle(ABC):
    """opens, closes  what stands around a call; closes may be "": its JSON ends by itself
    special        marks, or parts of them, that are tokens of their own, with their ids
    """

    opens: str
    closes: str = ""
    special: tuple[tuple[str, int], ...] = ()

    @property
    def most_ahead(self) -> int:
        """Characters that may stand between what opens a call and its JSON."""
        return 0

    @abstractmethod
    def calls(self, text: str, tools: Tools) -> list[Called] | None:
        """Those that the text between the marks is; None: it is none."""

    @abstractmethod
    def grammar(
        self, tools: Tools, most: int, json_of: Callable[[Mapping[str, Any]], str]
    ) -> list[str]:
        """Lines of a grammar of one call and up to `most`. json_of: a value of a schema, as a
        grammar has it."""

    def json_begins(self, text: str, start: int) -> int | None:
        """Where the JSON of a call whose mark ends at `start` begins; None: not told yet."""
        return start

    def mark(self, text: str) -> str:
        """As a grammar has it: text in quotes, special tokens by their ids."""
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
    """Pulls calls out of a text as it comes: `push` gives the text outside of them and the calls
    that are complete.

    What stands between marks and is no call stays text; what is blank between calls, and behind the
    last, goes. tools: those that there are.
    """

    def __init__(self, style: CallStyle, tools: Tools) -> None:
        self._style, self._tools = style, tools
        self._held = ""
        self._gap: str | None = None  # what is blank behind a call
        self._value: _Value | None = None  # of a call that has begun and ends by itself
        self._plain = False  # without marks: the answer began otherwise

    def push(self, text: str) -> tuple[str, list[Called]]:
        self._held += text
        said, calls = "", list[Called]()
        while self._held:
            begin = self._begin()
            said, self._held = said + self._text(self._held[: begin[0]]), self._held[begin[0] :]
            opens = begin[1]
            if opens is None:
                break
            stop, behind = self._stop(len(opens))
            if stop is None:
                break
            self._value = None
            found = self._style.calls(self._held[len(opens) : stop], self._tools)
            if found is None:
                said += self._text(self._held[:behind])
                self._plain = not opens
            else:
                self._gap = ""
                calls += found
            self._held = self._held[behind:]
        return said, calls

    def end(self) -> tuple[str, list[Called]]:
        """What is left: a call whose closing mark was the stop token of some models, or text."""
        held, self._held = self._held, ""
        opens = self._style.opens
        if held and held.startswith(opens) and not self._plain:
            found = self._style.calls(held[len(opens) :], self._tools)
            if found is not None:
                return "", found
        return self._text(held), []

    def _text(self, text: str) -> str:
        """What of it is said now: nothing that is blank behind a call, as long as another call may
        follow."""
        if self._gap is None:
            return text
        if not text.strip(BLANK):
            self._gap += text
            return ""
        said, self._gap = self._gap + text, None
        return said

    def _begin(self) -> tuple[int, str | None]:
        """Characters of what is held that are text for sure; what opens a call behind them, if
        something does."""
        opens = self._style.opens
        if self._value is not None:
            return 0, opens
        if opens:
            start = self._held.find(opens)
            return (
                (len(self._held) - _begun(self._held, opens), None) if start < 0 else (start, opens)
            )
        if self._plain:
            return len(self._held), None
        first = self._held.lstrip(BLANK + ";")[:1]
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
            begins = self._style.json_begins(self._held, start)
            if begins is None:
                most = start + self._style.most_ahead
                return (most, most) if len(self._held) > most else (None, 0)
            self._value = _Value(begins)
        behind = self._value.end(self._held)
        return (None, 0) if behind is None else (behind, behind)


class _Value:
    """Where a JSON object or list that begins at a place of a growing text ends, each character
    read once."""

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
            elif not self._depth and character not in BLANK + ";":
                return self._at
            if self._depth <= 0 and character in "}]":
                return self._at
        return None


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def compact(data: Any) -> str:
    return _COMPACT.encode(data)


def _begun(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of the mark."""
    return next(
        (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0
    )
