"""Figures and foreign text as people read them, on a screen and in a report."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from textwrap import TextWrapper, wrap


def shown(text: object) -> str:
    """Text as a terminal may show it: control characters (escape sequences, direction marks) as
    ·."""
    text = str(text)
    if text.isprintable():  # the common case, and thousands of cells of a table
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "·" for c in text
    )


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most:,} more"] if len(lines) > most else [])]


def html_table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """What a notebook shows of an object: its facts, a row each. All of it is escaped."""
    left = "style='text-align:left'"
    titles = "".join(f"<th {left}>{escape(shown(cell))}</th>" for cell in head)
    lines = [
        "".join(
            f"<{'th' if at == 0 else 'td'}"
            f" {left}>{escape(shown(cell))}</{'th' if at == 0 else 'td'}>"
            for at, cell in enumerate(row)
        )
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in [*([titles] if titles else []), *lines])
    return f"<table><caption {left}>{escape(shown(title))}</caption>{body}</table>"


def folded(line: str, width: int) -> str:
    """A line of facts, `a · b · c`, broken between facts where it is too wide; its indent is
    kept."""
    indent = " " * (len(line) - len(line.lstrip()))
    lines = [""]
    for fact in line.strip().split(" · "):
        if lines[-1] and len(indent + lines[-1] + " · " + fact) > width:
            lines.append("")
        lines[-1] += (" · " if lines[-1] else "") + fact
    return "\n".join(indent + each for each in lines)


def wrapped(line: str, width: int) -> str:
    """A line broken between words where it is too wide; what follows stands four further in; a
    wider word stays."""
    indent = " " * (len(line) - len(line.lstrip()))
    breaks = TextWrapper(
        width, indent, indent + "    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(breaks.wrap(line.strip()))


def reflowed(text: str, width: int) -> str:
    """A written page for a narrower one: paragraphs are filled, `  word  what it means` keeps its
                                                                    column.

    What fits stays as it is. Indented lines that are neither (commands, to be copied) stay too.
    """
    lines = text.split("\n")
    if max(map(len, lines)) <= width:
        return text
    found: list[str] = []
    for indented, group in groupby(lines, lambda line: line[:1].isspace() if line else None):
        block = list(group)
        if indented is False:
            found += (
                wrap(" ".join(block), width, break_long_words=False, break_on_hyphens=False)
                or block
            )
        elif indented:
            found += [part for line in block for part in _entry(line, width)]
        else:
            found += block
    return "\n".join(found)


def _entry(line: str, width: int) -> list[str]:
    """`  word  what it means` in lines of no more than `width`; any other line as it is."""
    parts = re.fullmatch(r"( +(?!veneer )\S.*? {2,})(\S.*)", line)
    if parts is None or len(line) <= width:
        return [line]
    head, meaning = parts.groups()
    rest = " " * len(head)
    return wrap(meaning, width, initial_indent=head, subsequent_indent=rest, break_long_words=False)


class WordWrap:
    """Text that comes in pieces, broken between words so that no line is wider than `width`; None:
    as it comes.

    A word is held back until it is whole. One that is wider than a line is left to the terminal.
    """

    def __init__(self, width: int | None) -> None:
        self._width, self._column, self._word = width, 0, ""

    def push(self, text: str) -> str:
        """What may be shown now."""
        if self._width is None:
            return text
        said = ""
        for character in text:
            if character.isspace():
                said += self._placed() + character
                self._column = 0 if character == "\n" else self._column + 1
            else:
                self._word += character
        return said

    def end(self) -> str:
        """The rest."""
        return self._placed()

    def _placed(self) -> str:
        word, self._word = self._word, ""
        breaks = self._width is not None and self._column and self._column + len(word) > self._width
        self._column = len(word) if breaks else self._column + len(word)
        return "\n" + word if breaks else word


def number(value: float | None) -> str:
    """Three significant digits; – for a number that is not there or not finite."""
    return "–" if value is None else f"{value:#.3g}".rstrip(".")


def between(low: float | None, high: float | None) -> str:
    """Writes an interval, or says that there is none."""
    return "no interval" if low is None or high is None else f"{number(low)} to {number(high)}"


def interval_of_95(low: float | None, high: float | None) -> str:
    """The same where no heading says what it is."""
    return between(low, high) if low is None else f"95% interval {between(low, high)}"


def percent(part: float, whole: float) -> str:
    """3.5%, 0.012%, 100%: two digits, three above 10%; 0% of nothing."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f}%" if share >= 9.95 or not share else f"{share:#.2g}%"


def shares(parts: Mapping[str, float]) -> str:
    """compute 87% · wait 13%"""
    return " · ".join(
        f"{name} {percent(part, sum(parts.values()))}" for name, part in parts.items()
    )


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as disks and file managers count, to three digits: 19.6 MB, 1.31
    GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5 or unit == "GB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:,.{digits}f} {unit}"


def millions(count: int) -> str:
    """4.88 M; 135 M; 1.24 B; below a thousand as it is."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def clock(seconds: float) -> str:
    """6:10 or 1:06:10."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
