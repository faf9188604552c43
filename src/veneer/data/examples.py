"""Rows as they are in a file, and the examples (token ids and loss mask) made from them.

Knows nothing of tokenizers or models. Every part of `data/` reports faults as `Problem`. They are
grouped, and `veneer data check` shows them or `refusal` makes one error of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from veneer.errors import DataError
from veneer.wording import ranges

if TYPE_CHECKING:  # the help of commands reads this file
    import numpy as np
    from numpy.typing import NDArray

Format = Literal[
    "chat",
    "prompt_completion",
    "alpaca",
    "sharegpt",
    "text",
    "pairs",
    "openai_pairs",
    "ranked",
    "ratings",
    "labels",
    "relevance",
]
RowKind = Literal["answers", "pairs", "ratings", "labels", "any"]
"""Content of rows: answers to learn, answers in order of preference, answers with a rating (pairs
too), or texts with labels. any: answers or pairs, by the columns."""
AnswerKind = Literal["answer", "chosen", "rejected", "mismatched", "teacher"]
"""Role of an example in an objective: an answer to learn; one that is preferred or rated good; one
that is not preferred or rated bad; the answer to another row's prompt; or the row as a teacher
reads it."""
Layout = Literal["auto", Format]
TrainOn = Literal["assistant", "last", "all"]
LongRows = Literal["refuse", "drop", "cut"]

SHOWN = 20
"""Most faults in one error, and most ranges of row numbers in one fault. The rest is counted."""


@dataclass(frozen=True)
class Capacity:
    """The longest text and the largest token id that a model accepts; None means no limit.

    positions   tokens of a whole text
    tokens      ids below this have a row in the model's embedding and output head
    """

    positions: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class RowRef:
    """Location of a row. Lines count from 1; in .json and .parquet files they count records."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def problem(
        self, code: str, message: str, next_step: str = "", *, fatal: bool = True, detail: str = ""
    ) -> Problem:
        """Returns a problem of this row."""
        return Problem(code, self.file, message, (self.line,), next_step, fatal, detail)


@dataclass(frozen=True)
class Row:
    """One row after its layout was recognised, before it is tokenised.

    messages   chat form, for every format but text: role, content (a string), and what the template
               may read (tool_calls, name, reasoning_content, ...); an assistant message with weight
               0 is not trained on
    tools      JSON schemas of the functions that the model may call
    text       set for plain text, where messages is empty
    references further correct answers besides the last turn; only evaluations read them
    unfinished its text or its last answer was cut, so the end is not trained on
    others     the same conversation with other answers: preferred less than the one in messages,
               best first
    liked      the rating of the answer, true or false; None if it is not rated
    label      the label of its text, as the file has it: a name, a number or a list; None if it has
               none
    query      the query that its text pairs with a document; None for other rows
    """

    ref: RowRef
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    format: Format = "chat"
    references: tuple[str, ...] = ()
    unfinished: bool = False
    others: tuple[list[dict[str, Any]], ...] = ()
    liked: bool | None = None
    label: Any = None
    query: str | None = None


class RoleRun(NamedTuple):
    """Consecutive tokens of one rendered message, its template markers included."""

    role: str
    end: int  # index after the last token


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of one row and the mask of trained tokens.

    ids       int32 [L]
    trained   bool [L]; trained[t]: token t is a target, predicted from the tokens before it; [0] is
              never a target
    key       63 bits, from the row's content alone: identifies the row for splitting
    row       number of the row in its data set, shared by consecutive examples made from one row;
              None if the row became only this example
    roles     the message that each token belongs to, in order; empty unless requested
    kind      its role in the run's objective
    label     targets of a score head's outputs (data/files/labels.py); empty for answers. The head
              reads the token before the only trained one, which is a placeholder behind the text
    query     prompt_key of a document for a query, equal for all documents of the query; None for
              other rows
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    ref: RowRef
    key: int
    roles: tuple[RoleRun, ...] = ()
    row: int | None = None
    kind: AnswerKind = "answer"
    label: tuple[float, ...] = ()
    query: int | None = None

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    @property
    def prompt_length(self) -> int:
        """Counts the tokens before the last answer; 0 if no token is trained."""
        answers = self.trained.nonzero()[0]
        prompt = (~self.trained[: answers[-1]]).nonzero()[0] if len(answers) else answers
        return int(prompt[-1]) + 1 if len(prompt) else 0


@dataclass(frozen=True)
class Problem:
    """A fault in the data: its code, its location, and how to fix it.

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
    """More about the first row, such as two renderings. Ignored when problems are compared."""

    def __str__(self) -> str:
        lines = ranges(self.lines)
        shown = ", ".join(lines[:SHOWN]) + (", …" if len(lines) > SHOWN else "")
        where = self.file + (f":{shown}" if lines else "")
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
    """A fault of one row; `at` turns it into a Problem with file and line."""

    def __init__(self, code: str, message: str, next_step: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.next_step, self.detail = code, message, next_step, detail

    def at(self, ref: RowRef) -> Problem:
        return ref.problem(self.code, self.message, self.next_step, detail=self.detail)


def grouped(problems: Sequence[Problem]) -> list[Problem]:
    """Merges equal problems of different rows into one that names all rows, in order of
    appearance."""
    lines: dict[Problem, list[int]] = {}
    first: dict[Problem, Problem] = {}
    for problem in problems:
        key = replace(problem, lines=())
        first.setdefault(key, problem)
        lines.setdefault(key, []).extend(problem.lines)
    return [
        replace(first[key], lines=tuple(sorted(set(numbers)))) for key, numbers in lines.items()
    ]


def refusal(headline: str, problems: Sequence[Problem]) -> DataError:
    """Makes one error of all problems; the first SHOWN are shown in full."""
    groups = grouped(problems)
    faults = [str(problem) for problem in groups[:SHOWN]]
    if len(groups) > SHOWN:
        faults.append(f"… and {len(groups) - SHOWN:,} more")
    steps = list(dict.fromkeys(problem.next_step for problem in groups if problem.next_step))
    return DataError(headline, faults, "\n".join(steps[:3]))


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _hash63(content: Any) -> int:
    digest = hashlib.blake2b(
        _CANONICAL.encode(content).encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") >> 1


def row_key(row: Row) -> int:
    """Hashes the row's content to 63 bits (BLAKE2b); the file and the line do not enter."""
    preference = [row.others, row.liked] if row.others or row.liked is not None else []
    label = [] if row.label is None else [{"label": row.label}]
    return _hash63([row.messages, row.tools, row.text, *preference, *label])


def sampling_key(key: int, seed: int, number: int) -> int:
    """Hashes a row to 63 bits that decide whether it is sampled.

    number: position of the row, which tells repeated rows apart
    """
    return _hash63([key, seed, number])


def part_key(key: int, part: int) -> int:
    """Hashes the key of a row and the number of one of its examples."""
    return _hash63([key, part])


def prompt_key(row: Row) -> int:
    """Hashes what comes before the last answer, so rows that answer the same prompt are equal.

    A plain text has no prompt: its whole text is hashed. The prompt of answers in order of
    preference is what they all begin with; answers may have several turns. The prompt of a document
    is its query, so the documents of a query are equal.
    """
    prompt = row.messages[:-1]
    for messages in row.others:
        pairs = zip(prompt, messages, strict=False)
        prompt = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return _hash63([prompt, row.tools, row.text if row.query is None else row.query])
