"""Regular expressions that come with a file, matched in time that grows with the text alone.

Python's own engine can run for ever: `.?` forty times and an exclamation mark take it longer than a
life. RE2 does the matching here, which has no such pattern. What it cannot do is refused by name:
references back to a group and looking around, but for what people write to leave modules out, a
lookahead at the very start: `^(?!.*vision).*q_proj`.

    full(text)      the whole text matches
    ends(text)      PEFT's rule of rank_pattern and alpha_pattern: the end of the text matches, from
                    a dot or the
    start on

Source: github.com/google/re2; Cox 2007, "Regular Expression Matching Can Be Simple And Fast".
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import re2

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"\^?(?:[\w-]|\\[^\w\s])+")
"""A name, its dots escaped."""
_FLAGS = re.compile(r"\(\?[ims]+\)")
BYTES = 1 << 18
"""Memory of a compiled expression, beside 64 bytes a character: time and memory stay in proportion
to what was written."""


def is_name(source: str) -> bool:
    """Whether a pattern of the end of a path matches one name alone: it has no wildcards, its dots
    are escaped."""
    return _PLAIN.fullmatch(source) is not None


class PatternError(ValueError):
    """Not a regular expression, or one that cannot be matched in linear time; says which and
    why."""


class Pattern:
    def __init__(self, source: str) -> None:
        self.source = source
        found = _FLAGS.match(source)
        flags = found[0] if found else ""
        rest = source[len(flags) :]
        ahead, body = _lookaheads(rest.removeprefix("^"), source)
        body = body if ahead else rest
        self._full = _compiled(
            flags + body, source
        )  # by itself first: what only makes sense in brackets makes none
        self._ahead = [(wanted, _compiled(flags + inner, source)) for wanted, inner in ahead]
        before = "^" if ahead else r"(?:.*\.)?"
        self._ends = _compiled(f"{flags}{before}(?:{body})$", source)
        self._from_start = rest.startswith("^") or not ahead

    def full(self, text: str) -> bool:
        return self._full.fullmatch(text) is not None and self._looks(text)

    def ends(self, text: str) -> bool:
        """PatternError: it looks ahead without a ^ before, so from where is not said."""
        if not self._from_start:
            raise PatternError(
                f"{_shown(self.source)} looks ahead from the start: write ^ before it"
            )
        return self._ends.match(text) is not None and self._looks(text)

    def _looks(self, text: str) -> bool:
        return all((inner.match(text) is not None) == wanted for wanted, inner in self._ahead)


@functools.lru_cache(maxsize=512)
def pattern(source: str) -> Pattern:
    """Raises PatternError."""
    return Pattern(source)


def compiled(source: str) -> Any:
    """An expression of ours around one of a file's, with the methods of Python's `re`. Raises
    PatternError."""
    return _compiled(source, source)


class FirstMatch(Generic[Value]):
    """Patterns of the end of a path, each with a value: the first that matches, in their order.

    Names without wildcards, as files with a rank of its own for every module hold them, are looked
    up, not tried.
    """

    def __init__(self, patterns: Mapping[str, Value]) -> None:
        self._names: dict[str, tuple[int, bool, Value]] = {}
        self._tried: list[tuple[int, Pattern, Value]] = []
        for place, (source, value) in enumerate(patterns.items()):
            if is_name(source):
                name = re.sub(r"\\(.)", r"\1", source.removeprefix("^"))
                self._names.setdefault(
                    f"^{name}" if source.startswith("^") else name, (place, True, value)
                )
            else:
                self._tried.append((place, pattern(source), value))

    def of(self, path: str, default: Value) -> Value:
        ends = [
            f"^{path}",
            path,
            *(path[place + 1 :] for place, letter in enumerate(path) if letter == "."),
        ]
        named = min(
            (self._names[end] for end in ends if end in self._names),
            default=None,
            key=lambda found: found[0],
        )
        for place, tried, value in self._tried:
            if named is not None and named[0] < place:
                break
            if tried.ends(path):
                return value
        return default if named is None else named[2]


def first_match(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """FirstMatch of patterns that are asked again and again."""
    found: Value = _first_match(tuple(patterns.items())).of(path, default)
    return found


@functools.lru_cache(maxsize=16)
def _first_match(patterns: tuple[tuple[str, Any], ...]) -> FirstMatch[Any]:
    return FirstMatch(dict(patterns))


def _compiled(text: str, source: str) -> Any:
    options = re2.Options()
    options.log_errors = False  # it would write to the screen
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
            f"{_shown(source)} is not a regular expression that can be matched here: {why[:120]}"
        ) from None


def _shown(source: str) -> str:
    return repr(source if len(source) <= 80 else source[:79] + "…")


def _lookaheads(source: str, whole: str) -> tuple[list[tuple[bool, str]], str]:
    """The lookaheads a pattern begins with, (wanted or not, what), and the rest."""
    found: list[tuple[bool, str]] = []
    while source.startswith(("(?!", "(?=")):
        end = _closing(source)
        if end is None:
            raise PatternError(
                f"{_shown(whole)} is not a regular expression: a parenthesis is not closed"
            )
        found.append((source[2] == "=", source[3:end]))
        source = source[end + 1 :]
    if found and _has_choice(source):
        raise PatternError(
            f"{_shown(whole)} looks ahead in one of several choices: put them into (?:…)"
        )
    return found, source


def _closing(source: str) -> int | None:
    """Where the parenthesis that `source` begins with is closed."""
    return next(
        (place for place, letter, depth in _letters(source) if letter == ")" and depth == 0), None
    )


def _has_choice(source: str) -> bool:
    return any(letter == "|" and depth == 0 for _, letter, depth in _letters(source))


def _letters(source: str) -> list[tuple[int, str, int]]:
    """(place, letter, depth of parentheses behind it) of what is neither escaped nor in a class."""
    found, depth, place = list[tuple[int, str, int]](), 0, 0
    while place < len(source):
        letter = source[place]
        if letter == "\\":
            place += 2
            continue
        if letter == "[":
            closing = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(source, place)
            place = closing.end() if closing else len(source)
            continue
        depth += (letter == "(") - (letter == ")")
        found.append((place, letter, depth))
        place += 1
    return found
