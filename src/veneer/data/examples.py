"""What the data becomes: a row as it stands in the file, and the example (token ids and loss mask)
made of it.

Knows nothing of tokenizers or models. `Problem` is how every part of `data/` reports what it found:
gathered, grouped, and either shown by `veneer data check` or raised at once by `refusal`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from veneer.errors import DataError

Format = Literal["chat", "prompt_completion", "alpaca", "sharegpt", "text"]
Layout = Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text"]
TrainOn = Literal["assistant", "last", "all"]
LongRows = Literal["refuse", "drop", "cut"]

SHOWN = 20
"""Faults shown in one error, and stretches of row numbers shown in one fault; the rest is
counted."""


@dataclass(frozen=True)
class Capacity:
    """What a model can take; None: no bound.

    positions   tokens of a text, all of it together
    tokens      ids from 0 up to this have a row in the model's embeddings and its head
    """

    positions: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class RowRef:
    """Where a row stands: line counts from 1; in .json and .parquet files it is the record's
    number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Row:
    """One row after its layout was recognised, before tokens.

    messages   chat form, for every format but text: role, content (a string), and what the template
               may read (tool_calls, name, reasoning_content, ...); an assistant message with weight
               0 is not trained on
    tools      JSON schemas of the functions that the model may call
    text       set for plain text, where messages is empty
    references further right answers beside the last turn; read by evaluations alone, never trained
        on
    unfinished its text, or its last answer, was cut: that it ends there is not learnt
    """

    ref: RowRef
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    format: Format = "chat"
    references: tuple[str, ...] = ()
    unfinished: bool = False


class RoleRun(NamedTuple):
    """Consecutive tokens that one message rendered to, its template markers included."""

    role: str
    end: int  # index after the last token


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of one row and which of them are learnt.

    ids       int32 [L]
    trained   bool [L]; trained[t]: token t is a target, predicted from the tokens before it; [0] is
              never one
    key       63 bits, from the row's content alone: names the row for splitting
    row       number of the row in its data set, shared by the examples that one row became, which
              follow each other; None if the row became this example alone
    roles     whose message each token belongs to, in order; empty where nobody asked
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    ref: RowRef
    key: int
    roles: tuple[RoleRun, ...] = ()
    row: int | None = None


@dataclass(frozen=True)
class Problem:
    """Something found in the data: a code for looking it up, where, what, and what to do.

    lines   row numbers in `file`; empty if it concerns the whole file
    fatal   a run refuses to start
    """

    code: str
    file: str
    message: str
    lines: tuple[int, ...] = ()
    next_step: str = ""
    fatal: bool = True
    detail: str = field(default="", compare=False)
    """More of the first row's story (two renderings, say); not part of what makes problems
    equal."""

    def __str__(self) -> str:
        where = self.file + (f":{_ranges(self.lines)}" if self.lines else "")
        rows = f" ({len(self.lines):,} rows)" if len(self.lines) > 1 else ""
        text = f"{self.code} {where}{rows}  {self.message}"
        return text + "".join(f"\n      {line}" for line in self.detail.splitlines())

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "file": self.file,
            "lines": list(self.lines),
            "message": self.message,
            "next_step": self.next_step,
            "fatal": self.fatal,
        }


class RowFault(Exception):
    """What is wrong with one row; becomes a Problem with its file and line."""

    def __init__(self, code: str, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.next_step = code, message, next_step

    def at(self, ref: RowRef) -> Problem:
        return Problem(self.code, ref.file, self.message, (ref.line,), self.next_step)


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as "1-3, 7", the first SHOWN stretches of them."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][1] + 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in stretches[:SHOWN])
    return shown + (", …" if len(stretches) > SHOWN else "")


def grouped(problems: Sequence[Problem]) -> list[Problem]:
    """Equal problems of different rows become one that names all rows; order of first
    appearance."""
    lines: dict[Problem, list[int]] = {}
    first: dict[Problem, Problem] = {}
    for problem in problems:
        key = replace(problem, lines=())
        first.setdefault(key, problem)
        lines.setdefault(key, []).extend(problem.lines)
    return [replace(first[key], lines=tuple(sorted(set(found)))) for key, found in lines.items()]


def refusal(headline: str, problems: Sequence[Problem]) -> DataError:
    """One error that shows every problem, the first SHOWN of them in full."""
    found = grouped(problems)
    faults = [str(problem) for problem in found[:SHOWN]]
    if len(found) > SHOWN:
        faults.append(f"… and {len(found) - SHOWN:,} more")
    steps = list(dict.fromkeys(problem.next_step for problem in found if problem.next_step))
    return DataError(headline, faults, "\n".join(steps[:3]))


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _hash63(content: Any) -> int:
    digest = hashlib.blake2b(
        _CANONICAL.encode(content).encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") >> 1


def row_key(row: Row) -> int:
    """63-bit BLAKE2b of the row's content; the file and the line do not enter."""
    return _hash63([row.messages, row.tools, row.text])


def sampling_key(key: int, seed: int, number: int) -> int:
    """63 bits by which a row is drawn or not; number: where it stands, for rows that repeat
    another."""
    return _hash63([key, seed, number])


def part_key(key: int, part: int) -> int:
    """Of one of the examples that a row of this key became."""
    return _hash63([key, part])


def prompt_key(row: Row) -> int:
    """As row_key, of what comes before the last answer: equal for rows that answer the same prompt.

    A plain text has no prompt: its key is that of the whole row.
    """
    return _hash63([row.messages[:-1], row.tools, row.text])
