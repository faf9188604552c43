"""Formats figures and untrusted text for people, on a screen and in a report."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from textwrap import TextWrapper, wrap


def shown(text: object) -> str:
    """Makes text safe for a terminal: control characters (escape sequences, direction marks) become
    ·."""
    text = str(text)
    if text.isprintable():  # the common case
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "·" for c in text
    )


def kind_of(value: object) -> str:
    """Says what a value of a wrong type is."""
    if value is None or value == "":
        return "None" if value is None else "empty"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"


def cut(text: str, characters: int) -> str:
    """Shortens a text to so many characters."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def shown_line(text: object, characters: int = 200) -> str:
    """Makes text safe for one line of a terminal, and shortens it."""
    return cut(" ".join(shown(text).split()), characters)


def first_names(names: Sequence[str], most: int = 12) -> str:
    """Lists the first names of a file, each shortened."""
    return ", ".join(cut(name, 40) for name in names[:most]) + (", …" if len(names) > most else "")


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """Returns the first lines, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most:,} more"] if len(lines) > most else [])]


def ranges(numbers: Iterable[int]) -> list[str]:
    """Formats rising numbers: 0, 1, 2, 5 become 0-2 and 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(a) if a == b else f"{a}-{b}" for a, b in runs]


def first_difference(a: str, b: str) -> int:
    """Returns the place of the first character that differs, or the end of the shorter text."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def html_table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Builds the table that a notebook shows of an object, a row per fact. Everything is
    escaped."""
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
    """Breaks a line of facts, `a · b · c`, between facts if it is too wide; its indent is kept."""
    indent = " " * (len(line) - len(line.lstrip()))
    lines = [""]
    for fact in line.strip().split(" · "):
        if lines[-1] and len(indent + lines[-1] + " · " + fact) > width:
            lines.append("")
        lines[-1] += (" · " if lines[-1] else "") + fact
    return "\n".join(indent + text for text in lines)


def wrapped(line: str, width: int) -> str:
    """Breaks a line between words if it is too wide; further lines are indented by four; long words
    stay whole."""
    indent = " " * (len(line) - len(line.lstrip()))
    breaks = TextWrapper(
        width, indent, indent + "    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(breaks.wrap(line.strip()))


def reflowed(text: str, width: int) -> str:
    """Fits a written page into a narrower width.

    Paragraphs are filled, and `  word  what it means` keeps its column. A page that fits stays,
    and so do other indented lines (commands to copy).
    """
    lines = text.split("\n")
    if max(map(len, lines)) <= width:
        return text
    lines_out: list[str] = []
    for indented, group in groupby(lines, lambda line: line[:1].isspace() if line else None):
        block = list(group)
        if indented is False:
            lines_out += (
                wrap(" ".join(block), width, break_long_words=False, break_on_hyphens=False)
                or block
            )
        elif indented:
            lines_out += [part for line in block for part in _entry(line, width)]
        else:
            lines_out += block
    return "\n".join(lines_out)


def _entry(line: str, width: int) -> list[str]:
    """Breaks `  word  what it means` into lines of at most `width`; other lines stay."""
    parts = re.fullmatch(r"( +(?!veneer )\S.*? {2,})(\S.*)", line)
    if parts is None or len(line) <= width:
        return [line]
    head, meaning = parts.groups()
    rest = " " * len(head)
    return wrap(meaning, width, initial_indent=head, subsequent_indent=rest, break_long_words=False)


class WordWrap:
    """Breaks streamed text between words so that no line is wider than `width`; None: no breaks.

    A word is held back until it is complete. A word wider than a line is left to the terminal.
    """

    def __init__(self, width: int | None) -> None:
        self._width, self._column, self._word = width, 0, ""

    def push(self, text: str) -> str:
        """Adds text and returns what may be shown now."""
        if self._width is None:
            return text
        output = ""
        for character in text:
            if character.isspace():
                output += self._place_word() + character
                self._column = 0 if character == "\n" else self._column + 1
            else:
                self._word += character
        return output

    def end(self) -> str:
        """Returns the rest."""
        return self._place_word()

    def _place_word(self) -> str:
        word, self._word = self._word, ""
        breaks = self._width is not None and self._column and self._column + len(word) > self._width
        self._column = len(word) if breaks else self._column + len(word)
        return "\n" + word if breaks else word


def number(value: float | None) -> str:
    """Formats three significant digits; – for None and for non-finite numbers."""
    return "–" if value is None else f"{value:#.3g}".rstrip(".")


def between(low: float | None, high: float | None) -> str:
    """Formats an interval, or says that there is none."""
    return "no interval" if low is None or high is None else f"{number(low)} to {number(high)}"


def interval_of_95(low: float | None, high: float | None) -> str:
    """Formats a 95% interval with its name, for places without a heading."""
    return between(low, high) if low is None else f"95% interval {between(low, high)}"


SHARES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mrr": "MRR",
    "ndcg_at_10": "NDCG@10",
    "best_first": "best document first",
}
"""Figures between 0 and 1, by their names in the records of a run."""


def percent(part: float, whole: float) -> str:
    """Formats a share: 3.5%, 0.012%, 100%; two digits, three above 10%; 0% of nothing."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f}%" if share >= 9.95 or not share else f"{share:#.2g}%"


def shares(parts: Mapping[str, float]) -> str:
    """Formats parts as shares: compute 87% · wait 13%."""
    return " · ".join(
        f"{name} {percent(part, sum(parts.values()))}" for name, part in parts.items()
    )


def size(num_bytes: float) -> str:
    """Formats bytes in decimal units to three digits, as disks and file managers do: 19.6 MB, 1.31
    GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5 or unit == "GB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:,.{digits}f} {unit}"


def millions(count: int) -> str:
    """Formats a count: 4.88 M; 135 M; 1.24 B; small numbers as they are."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def clock(seconds: float) -> str:
    """Formats a duration as 6:10 or 1:06:10."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
