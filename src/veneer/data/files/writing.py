"""Converts, splits and samples sets of rows before training: `veneer data`.

.jsonl   .jsonl.gz      one record a line: messages, or prompt and completion, or text

Rows are read and written one by one; only a sample is held in memory.
"""

import gzip
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from veneer.data.examples import (
    Format,
    Problem,
    Row,
    grouped,
    prompt_key,
    refusal,
    row_key,
    sampling_key,
)
from veneer.data.files.columns import RATED_BAD, ColumnMap
from veneer.data.files.labels import pair_text
from veneer.data.files.sources import iterate_rows
from veneer.data.split import part_of, parts_of_shares
from veneer.errors import ConfigError, DataError, hide_path
from veneer.files.atomic import atomic_file
from veneer.files.partial import remove

KINDS = (".jsonl", ".jsonl.gz")

Record = Mapping[str, Any]
"""One row as it is in a file."""


def is_rows(data: object, *, beside_sets: bool = False) -> bool:
    """Whether `data` is an iterable of rows and not a set's name.

    beside_sets: a list of sets, as in a run file, does not count either
    """
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Path | Mapping):
        return False
    if not beside_sets or not isinstance(data, Sequence):
        return True
    return bool(data) and isinstance(data[0], Mapping) and "path" not in data[0]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one record a line into a new file or over an old one. Raises DataError for a record
    that is not a dict of JSON values."""
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
                    f"row {number} is no JSON{_name_bad_column(record)}: {fault}", next_step=step
                ) from None


def _name_bad_column(record: Record) -> str:
    """Names the first column that is not JSON, for a message."""
    for name, value in record.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            return f" in column {str(name)[:40]!r}"
    return ""


@contextmanager
def as_set(data: str | Path | Iterable[Record]) -> Iterator[str]:
    """Gives a set a name within the block: its own, or a temporary file with the rows."""
    if not is_rows(data):
        yield str(data)
        return
    assert not isinstance(data, str | Path)
    with TemporaryDirectory(prefix="veneer-") as folder:
        file = Path(folder) / "rows.jsonl"
        write_records(file, data)
        with hide_path(file, ROWS_NAME):
            yield str(file)


ROWS_NAME = "rows"
"""The name in messages of rows that were passed in Python and are in no file."""


def record_of(row: Row) -> dict[str, Any]:
    """Converts the row to a record of its layout; alpaca and ShareGPT become chat, and OpenAI's
    pairs become `pairs`."""
    end: Record = {"unfinished": True} if row.unfinished else {}
    if row.liked is not None or row.label is not None:
        end = {**end, "label": row.label if row.liked is None else row.liked}
    if row.text is not None and row.query is not None:
        document = row.text.removeprefix(pair_text(row.query, ""))
        return {"query": row.query, "document": document, **end}
    if row.text is not None:
        return {"text": row.text, **end}
    record: dict[str, Any] = {"messages": row.messages}
    # A base without a chat template cannot use messages.
    if row.others or row.format in ("prompt_completion", "ratings"):
        trained = (
            number
            for number, message in enumerate(row.messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        )
        start = next(trained, len(row.messages) - 1)
        answers = [messages[start:] for messages in (row.messages, *row.others)]
        record = {"prompt": row.messages[:start], **_answer_columns(row.format, answers)}
    if row.tools:
        record["tools"] = row.tools
    if row.references:
        record["references"] = list(row.references)
    return {**record, **end}


def _answer_columns(format: Format, answers: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the columns for the answers to one prompt, the best first. format: of the row"""
    if format == "ranked":
        return {"ranked": answers}
    names = ("completion",) if len(answers) == 1 else ("chosen", "rejected")
    return dict(zip(names, answers, strict=True))


@dataclass
class WriteReport:
    """What was written: the rows of each file, and the problems of rows that were left out."""

    rows: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def convert(
    sets: Iterable[str],
    out: Path,
    *,
    format: str = "auto",
    columns: ColumnMap | None = None,
    leave_out: bool = False,
) -> WriteReport:
    """Writes all rows of these sets into one file.

    Raises DataError with every row that cannot be read, unless they may be left out.
    """
    return _write_parts(sets, {out: lambda row: True}, _RowSource(format, columns, leave_out))


def split_rows(
    set_name: str,
    folder: Path,
    *,
    validation: float,
    test: float,
    format: str = "auto",
    columns: ColumnMap | None = None,
    leave_out: bool = False,
) -> WriteReport:
    """Writes train.jsonl, validation.jsonl and test.jsonl, split as a run would (split.py).

    The validation rows are those that a run with the same share holds out, and no prompt is in two
    files. The set is read twice.
    """
    source = _RowSource(format, columns, leave_out)
    shares = {"validation": validation, "test": test}
    prompts = [prompt_key(row) for row in source.readable_rows([set_name], WriteReport())]
    parts = parts_of_shares(prompts, list(shares.values()))

    def belongs(part: int) -> Callable[[Row], bool]:
        return lambda row: part_of(prompt_key(row), parts) == part

    parts_by_name = {"train": 0} | {
        name: number for number, name in enumerate(shares, 1) if shares[name]
    }
    files = {folder / f"{name}.jsonl": belongs(part) for name, part in parts_by_name.items()}
    return _write_parts([set_name], files, source)


def sample_rows(
    name: str,
    count: int,
    out: Path,
    *,
    seed: int = 0,
    format: str = "auto",
    columns: ColumnMap | None = None,
    leave_out: bool = False,
) -> WriteReport:
    """Writes `count` rows, chosen by a hash of their content and the seed, in their order."""
    report = WriteReport()
    sample: list[tuple[int, int, Row]] = []  # the largest key first
    for number, row in enumerate(
        _RowSource(format, columns, leave_out).readable_rows([name], report)
    ):
        entry = (-sampling_key(row_key(row), seed, number), -number, row)
        if len(sample) < count:
            heapq.heappush(sample, entry)
        elif entry[0] > sample[0][0]:
            heapq.heapreplace(sample, entry)
    with _open_for_records(out, []) as write:
        for _, _, row in sorted(sample, key=lambda entry: -entry[1]):
            write(record_of(row))
    report.rows[str(out)] = len(sample)
    return report


@dataclass(frozen=True)
class _RowSource:
    """How to read rows: format, column map, and whether faulty rows are left out."""

    format: str
    columns: ColumnMap | None
    leave_out: bool

    def readable_rows(self, sets: Iterable[str], report: WriteReport) -> Iterator[Row]:
        """Yields the readable rows. Faults go to `report`, or are raised after the last row.

        Answers that are marked as bad are readable, so they cannot be left out.
        """
        problems: list[Problem] = []
        for name in sets:
            for row in iterate_rows(name, self.format, self.columns, kind="any"):
                if isinstance(row, Row):
                    yield row
                else:
                    problems.append(row)
        report.problems = grouped(problems)
        fatal = [problem for problem in problems if problem.fatal]
        if fatal and not self.leave_out:
            raise refusal("some rows cannot be read, and nothing is written", fatal)
        if bad := [problem for problem in problems if problem.code == RATED_BAD]:
            raise refusal("bad answers would be written as good ones: nothing is written", bad)


def _write_parts(
    sets: Iterable[str], files: dict[Path, Callable[[Row], bool]], source: _RowSource
) -> WriteReport:
    report = WriteReport(dict.fromkeys(map(str, files), 0))
    with _all_or_none() as published, ExitStack() as stack:
        writers = {file: stack.enter_context(_open_for_records(file, published)) for file in files}
        for row in source.readable_rows(sets, report):
            for file, belongs in files.items():
                if belongs(row):
                    writers[file](record_of(row))
                    report.rows[str(file)] += 1
    return report


@contextmanager
def _all_or_none() -> Iterator[list[Path]]:
    """Removes the published files if another one fails."""
    published: list[Path] = []
    try:
        yield published
    except BaseException:
        for file in published:
            remove(file)
        raise


@contextmanager
def _open_for_records(
    path: Path, published: list[Path]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that writes a record; the file appears whole or not at all.

    Raises ConfigError if the file exists or is of an unknown kind.
    """
    if not path.name.endswith(KINDS):
        raise ConfigError(
            f"{path}: unknown kind of file", next_step=f"Kinds of file: {', '.join(KINDS)}."
        )
    if path.exists():
        raise ConfigError(
            f"{path} exists", next_step="Choose another file: existing files are not overwritten."
        )
    with atomic_file(path) as partial:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(partial, "wt", encoding="utf-8") as out:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=out)
    published.append(path)
