"""Rows to a file, as they are read again: what people do by hand with a set before they train on
it.

    .jsonl   .jsonl.gz      one record a line: messages, or prompt and completion, or text

A set is read row by row and written row by row; only a sample is held, and of split rows nothing.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from veneer.data.examples import Problem, Row, grouped, prompt_key, refusal, row_key, sampling_key
from veneer.data.files.columns import ColumnMap
from veneer.data.files.sources import rows_in
from veneer.data.split import part_of, parts_of_shares
from veneer.errors import ConfigError, DataError, told_as
from veneer.files.atomic import atomic_file
from veneer.files.partial import remove

KINDS = (".jsonl", ".jsonl.gz")

Record = Mapping[str, Any]
"""One row as it stands in a file."""


def is_rows(data: object, *, beside_sets: bool = False) -> bool:
    """Whether this is rows and no name of a set; beside_sets: nor a list of sets, as a run file has
    it."""
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Path | Mapping):
        return False
    if not beside_sets or not isinstance(data, Sequence):
        return True
    return bool(data) and isinstance(data[0], Mapping) and "path" not in data[0]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One record a line, into a file that replaces an older one. DataError: one is no dict of
    JSON."""
    with atomic_file(path, replace=True) as partial, partial.open("w", encoding="utf-8") as file:
        for number, record in enumerate(records, 1):
            if not isinstance(record, Mapping):
                step = (
                    "Each row is a dict, {'prompt': ..., 'completion': ...} say; of pandas:"
                    " frame.to_dict('records')."
                )
                raise DataError(f"row {number} is a {type(record).__name__}", next_step=step)
            try:
                file.write(json.dumps(dict(record), allow_nan=False) + "\n")
            except (TypeError, ValueError) as fault:
                step = "Give texts, numbers and lists; of pandas, frame.fillna('') has no NaN."
                raise DataError(
                    f"row {number} is no JSON{_culprit(record)}: {fault}", next_step=step
                ) from None


def _culprit(record: Record) -> str:
    """The first column that is none, for a message."""
    for name, value in record.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            return f" in column {str(name)[:40]!r}"
    return ""


@contextmanager
def as_set(data: str | Path | Iterable[Record]) -> Iterator[str]:
    """What a set is called within the block: itself, or a file that holds the rows."""
    if not is_rows(data):
        yield str(data)
        return
    assert not isinstance(data, str | Path)
    with TemporaryDirectory(prefix="veneer-") as folder:
        file = Path(folder) / "rows.jsonl"
        write_records(file, data)
        with told_as(file, GIVEN):
            yield str(file)


GIVEN = "rows"
"""What rows are called that were given and stand in no file."""


def record_of(row: Row) -> dict[str, Any]:
    """The row as a record of its layout, alpaca and ShareGPT as chat."""
    cut = {"unfinished": True} if row.unfinished else {}
    if row.text is not None:
        return {"text": row.text, **cut}
    record: dict[str, Any] = {"messages": row.messages}
    if (
        row.format == "prompt_completion"
    ):  # which a base without a chat template can take, and messages it cannot
        learnt = (
            n
            for n, m in enumerate(row.messages)
            if m["role"] == "assistant" and m.get("weight") != 0
        )
        answer = next(learnt, len(row.messages) - 1)
        record = {"prompt": row.messages[:answer], "completion": row.messages[answer:]}
    if row.tools:
        record["tools"] = row.tools
    if row.references:
        record["references"] = list(row.references)
    return record | cut


@dataclass
class Written:
    """rows: in each file. problems: of rows that were left out."""

    rows: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def convert(
    sets: Iterable[str],
    out: Path,
    *,
    format: str = "auto",
    columns: ColumnMap | None = None,
    leave_out: bool = False,
) -> Written:
    """All rows of these sets into one file. DataError with every row that cannot be read, unless
    these are left out."""
    return _distributed(sets, {out: lambda row: True}, _Reading(format, columns, leave_out))


def split_rows(
    named: str,
    folder: Path,
    *,
    validation: float,
    test: float,
    format: str = "auto",
    columns: ColumnMap | None = None,
    leave_out: bool = False,
) -> Written:
    """train.jsonl, validation.jsonl and test.jsonl, as a run holds rows out (split.py): the
    validation rows are those that a run with the same share holds out, and no prompt stands in two
    files. The set is read twice."""
    reading, shares = _Reading(format, columns, leave_out), {"validation": validation, "test": test}
    prompts = [prompt_key(row) for row in reading.good([named], Written())]
    parts = parts_of_shares(prompts, list(shares.values()))

    def belongs(part: int) -> Callable[[Row], bool]:
        return lambda row: part_of(prompt_key(row), parts) == part

    wanted = {"train": 0} | {name: number for number, name in enumerate(shares, 1) if shares[name]}
    files = {folder / f"{name}.jsonl": belongs(part) for name, part in wanted.items()}
    return _distributed([named], files, reading)


def sample_rows(
    named: str,
    count: int,
    out: Path,
    *,
    seed: int = 0,
    format: str = "auto",
    columns: ColumnMap | None = None,
    leave_out: bool = False,
) -> Written:
    """So many rows, drawn by a hash of their content and the seed, in the order in which they
    stand."""
    written = Written()
    kept: list[tuple[int, int, Row]] = []  # the largest key first
    for number, row in enumerate(_Reading(format, columns, leave_out).good([named], written)):
        entry = (-sampling_key(row_key(row), seed, number), -number, row)
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif entry[0] > kept[0][0]:
            heapq.heapreplace(kept, entry)
    with _opened(out, []) as put:
        for _, _, row in sorted(kept, key=lambda entry: -entry[1]):
            put(record_of(row))
    written.rows[str(out)] = len(kept)
    return written


@dataclass(frozen=True)
class _Reading:
    format: str
    columns: ColumnMap | None
    leave_out: bool

    def good(self, sets: Iterable[str], written: Written) -> Iterator[Row]:
        """Rows; what is wrong with others goes to `written`, or is raised after the last of
        them."""
        problems: list[Problem] = []
        for named in sets:
            for found in rows_in(named, self.format, self.columns):
                if isinstance(found, Row):
                    yield found
                else:
                    problems.append(found)
        written.problems = grouped(problems)
        if problems and not self.leave_out:
            raise refusal("some rows cannot be read, and nothing is written", problems)


def _distributed(
    sets: Iterable[str], files: dict[Path, Callable[[Row], bool]], reading: _Reading
) -> Written:
    written = Written(dict.fromkeys(map(str, files), 0))
    with _all_or_none() as published, ExitStack() as stack:
        puts = {file: stack.enter_context(_opened(file, published)) for file in files}
        for row in reading.good(sets, written):
            for file, takes in files.items():
                if takes(row):
                    puts[file](record_of(row))
                    written.rows[str(file)] += 1
    return written


@contextmanager
def _all_or_none() -> Iterator[list[Path]]:
    """Files that were published go again where another cannot be."""
    published: list[Path] = []
    try:
        yield published
    except BaseException:
        for file in published:
            remove(file)
        raise


@contextmanager
def _opened(path: Path, published: list[Path]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Where records go; the file is whole or absent. ConfigError: it exists, or is of another
    kind."""
    if not path.name.endswith(KINDS):
        raise ConfigError(
            f"{path}: rows are not written so", next_step=f"Kinds of file: {', '.join(KINDS)}."
        )
    if path.exists():
        raise ConfigError(f"{path} exists", next_step="Name another file: nothing is written over.")
    with atomic_file(path) as partial:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(partial, "wt", encoding="utf-8") as out:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=out)
    published.append(path)
