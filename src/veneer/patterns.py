"""Matches untrusted regular expressions in time that grows linearly with the text.

Python's engine can run forever: forty times `.?` and an exclamation mark exceed a lifetime. RE2 has
no such patterns. What it does not support is refused by name: back references and lookarounds,
except lookaheads at the very start, which people use to leave modules out: `^(?!.*vision).*q_proj`.

full(text)      the whole text matches
ends(text)      PEFT's rule of rank_pattern and alpha_pattern: the end of the text matches, from
                a dot or the start on

Source: github.com/google/re2; Cox 2007, "Regular Expression Matching Can Be Simple And Fast".
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import re2

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"\^?(?:[\w-]|\\[^\w\s])+")
"""A name with escaped dots."""
_FLAGS = re.compile(r"\(\?[ims]+\)")
BYTES = 1 << 18
"""Memory of a compiled expression, plus 64 bytes a character: it stays proportional to the
pattern's length."""


def is_name(source: str) -> bool:
    """Whether a pattern matches one name only: it has no wildcards, and its dots are escaped."""
    return _PLAIN.fullmatch(source) is not None


class PatternError(ValueError):
    """Not a regular expression, or one that cannot be matched in linear time; names the pattern and
    reason."""


class Pattern:
    """A compiled pattern."""

    def __init__(self, source: str) -> None:
        self.source = source
        match = _FLAGS.match(source)
        flags = match[0] if match else ""
        rest = source[len(flags) :]
        lookaheads, body = _split_lookaheads(rest.removeprefix("^"), source)
        body = body if lookaheads else rest
        self._full = _compiled(
            flags + body, source
        )  # alone first: it must be valid without brackets
        self._ahead = [(wanted, _compiled(flags + inner, source)) for wanted, inner in lookaheads]
        start = "^" if lookaheads else r"(?:.*\.)?"
        self._ends = _compiled(f"{flags}{start}(?:{body})$", source)
        self._from_start = rest.startswith("^") or not lookaheads

    def full(self, text: str) -> bool:
        return self._full.fullmatch(text) is not None and self._lookaheads_hold(text)

    def ends(self, text: str) -> bool:
        """Whether the end of the text matches. Raises PatternError for a lookahead without ^, whose
        start is unknown."""
        if not self._from_start:
            raise PatternError(
                f"{_shorten(self.source)} has a lookahead at the start: write ^ before it"
            )
        return self._ends.match(text) is not None and self._lookaheads_hold(text)

    def _lookaheads_hold(self, text: str) -> bool:
        return all((inner.match(text) is not None) == wanted for wanted, inner in self._ahead)


@functools.lru_cache(maxsize=512)
def pattern(source: str) -> Pattern:
    """Compiles a pattern, cached. Raises PatternError."""
    return Pattern(source)


def compiled(source: str) -> Any:
    """Compiles an expression of ours around a file's, with the methods of Python's `re`. Raises
    PatternError."""
    return _compiled(source, source)


class FirstMatch(Generic[Value]):
    """Finds the value of the first pattern that matches the end of a path.

    Names without wildcards, as in files with a rank for every module, are looked up instead of
    tried.
    """

    def __init__(self, patterns: Mapping[str, Value]) -> None:
        self._names: dict[str, tuple[int, bool, Value]] = {}
        self._tried: list[tuple[int, Pattern, Value]] = []
        for position, (source, value) in enumerate(patterns.items()):
            if is_name(source):
                name = re.sub(r"\\(.)", r"\1", source.removeprefix("^"))
                self._names.setdefault(
                    f"^{name}" if source.startswith("^") else name, (position, True, value)
                )
            else:
                self._tried.append((position, pattern(source), value))

    def of(self, path: str, default: Value) -> Value:
        """Returns the value of the first matching pattern, else the default."""
        ends = [
            f"^{path}",
            path,
            *(path[position + 1 :] for position, letter in enumerate(path) if letter == "."),
        ]
        match = min(
            (self._names[end] for end in ends if end in self._names),
            default=None,
            key=lambda entry: entry[0],
        )
        for position, candidate, value in self._tried:
            if match is not None and match[0] < position:
                break
            if candidate.ends(path):
                return value
        return default if match is None else match[2]


def first_match(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Returns the value of the first matching pattern; the compiled patterns are cached."""
    return _first_match(tuple(patterns.items())).of(path, default)


@functools.lru_cache(maxsize=16)
def _first_match(patterns: tuple[tuple[str, Any], ...]) -> FirstMatch[Any]:
    return FirstMatch(dict(patterns))


def _compiled(text: str, source: str) -> Any:
    options = re2.Options()
    options.log_errors = False  # it would print to the screen
    options.max_mem = BYTES + 64 * len(source)
    try:
        return re2.compile(text, options)
    except re2.error as fault:
        why = (
            fault.args[0].decode(errors="replace")
            if isinstance(fault.args[0], bytes)
            else str(fault)
        )
        raise PatternError(
            f"{_shorten(source)} is not a supported regular expression: {why[:120]}"
        ) from None


def _shorten(source: str) -> str:
    return repr(source if len(source) <= 80 else source[:79] + "…")


def _split_lookaheads(source: str, whole: str) -> tuple[list[tuple[bool, str]], str]:
    """Splits off the lookaheads at the start of a pattern: (wanted or not, pattern), and the
    rest."""
    lookaheads: list[tuple[bool, str]] = []
    while source.startswith(("(?!", "(?=")):
        end = _find_closing(source)
        if end is None:
            raise PatternError(
                f"{_shorten(whole)} is not a regular expression: a parenthesis is not closed"
            )
        lookaheads.append((source[2] == "=", source[3:end]))
        source = source[end + 1 :]
    if lookaheads and _has_choice(source):
        raise PatternError(
            f"{_shorten(whole)} has a lookahead in only one of several choices: put the choices"
            " into (?:…)"
        )
    return lookaheads, source


def _find_closing(source: str) -> int | None:
    """Returns the position where the first parenthesis is closed."""
    return next(
        (
            position
            for position, letter, depth in _top_level_letters(source)
            if letter == ")" and depth == 0
        ),
        None,
    )


def _has_choice(source: str) -> bool:
    return any(letter == "|" and depth == 0 for _, letter, depth in _top_level_letters(source))


def _top_level_letters(source: str) -> list[tuple[int, str, int]]:
    """Returns (position, letter, depth after it) of letters that are not escaped or in a class."""
    letters, depth, position = list[tuple[int, str, int]](), 0, 0
    while position < len(source):
        letter = source[position]
        if letter == "\\":
            position += 2
            continue
        if letter == "[":
            closing = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(source, position)
            position = closing.end() if closing else len(source)
            continue
        depth += (letter == "(") - (letter == ")")
        letters.append((position, letter, depth))
        position += 1
    return letters
