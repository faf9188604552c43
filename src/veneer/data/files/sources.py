"""Rows from files: .jsonl, .json, .csv or .parquet, recognised by their extension, UTF-8; packed
too (.gz, .zst).

Every broken row is found, not the first only: `scan_rows` returns them beside the good ones,
`read_rows` raises one error that lists them. Lines of .jsonl and .csv are streamed, and a line
longer than MAX_LINE_BYTES is skipped without being held in memory; a .json file is read whole.
Where the files of a set lie is found in places.py. Knows nothing of tokenizers.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from veneer.data.examples import Format, Problem, Row, RowFault, RowRef, grouped, refusal
from veneer.data.files.columns import ColumnMap, Labels, Renames
from veneer.data.files.formats import FORMATS, Layouts, detect, to_row
from veneer.data.files.json_text import JSONText, whole_value
from veneer.data.files.places import PACKED, Place, ResolvedSets, kind_of
from veneer.errors import DataError
from veneer.files.nesting import TOO_DEEP, too_deep

MAX_LINE_BYTES = 16 * 2**20
READ = (
    '.jsonl (one JSON object a line), .json (a list of objects, or {"data": [...]}), .csv (with a'
    " header), .parquet"
)

Record = tuple[int, dict[str, Any]]
Records = Iterator[Record | Problem]


def read_rows(
    path: str | Path, format: str = "auto", columns: ColumnMap | None = None
) -> list[Row]:
    """All rows of the set. format: a name of FORMATS, or auto. Raises DataError with every bad
    row."""
    rows, problems = scan_rows(path, format, columns)
    if problems:
        raise refusal(f"{path} cannot be read as rows", problems)
    return rows


def scan_rows(
    path: str | Path, format: str = "auto", columns: ColumnMap | None = None
) -> tuple[list[Row], list[Problem]]:
    """The good rows of a set (places.py), and what is wrong with the others.

    columns: under which name each is read; None: it is left out. Raises DataError for an unknown
    format name, and for a set that is not found or cannot be brought here.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    layouts = Layouts()
    for found in rows_in(path, format, columns):
        if isinstance(found, Row):
            rows.append(found)
            layouts.add(found)
        else:
            problems.append(found)
    return rows, grouped(problems + layouts.problems())


def rows_in(
    path: str | Path,
    format: str = "auto",
    columns: ColumnMap | None = None,
    sets: ResolvedSets | None = None,
) -> Iterator[Row | Problem]:
    """The same one by one, so that no more than a row is held.

    sets: keeps which files a set consists of, for callers that read it more than once
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(
            f"unknown format '{format}'", next_step=f"Formats: auto, {', '.join(FORMATS)}."
        )
    named: Format | None = next((name for name in FORMATS if name == format), None)
    renames, labels, seen = Renames(columns or {}), Labels(), False
    for place in (sets or ResolvedSets()).places_of(str(path)):
        empty = True
        for record in _records(place):
            empty, seen = False, True
            if isinstance(record, Problem):
                yield record
                continue
            line, values = record
            ref = RowRef(place.name, line)
            try:
                values = renames.of(values)
                found = frozenset(name for name, value in values.items() if value is not None)
                row = to_row(values, ref, named or detect(found))
            except RowFault as fault:
                yield fault.at(ref)
            else:
                if row.format == "prompt_completion":
                    labels.add(values.get("label"), ref)
                yield row
        if empty:
            yield Problem("D100", place.name, "the file has no rows")
    yield from labels.problems()
    if seen:
        yield from renames.unused(str(path))


def _records(place: Place) -> Records:
    path, file = place.path, place.name
    readers: dict[str, Callable[[BinaryIO, str], Records]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    kind = kind_of(file)
    packed = Path(file).suffix.lower() in PACKED
    if not kind or (packed and kind == ".parquet"):
        suffix = Path(file).suffix
        said = f"extension '{suffix}'" if suffix else "no extension"
        yield Problem(
            "D100",
            file,
            f"{said}: the kind of file is told by it",
            next_step=f"Kinds of file: {READ}.",
        )
        return
    if path.exists() and not path.is_file():
        step = "A set may be read twice. Write the rows into a file and name that."
        yield Problem(
            "D100", file, "not a regular file, but a pipe, a device or a folder", next_step=step
        )
        return
    try:
        with unpacked(path, file) as opened:
            if opened.peek(4)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                yield Problem("D102", file, "the file is UTF-16", next_step="Save it as UTF-8.")
                return
            yield from readers[kind](opened, file)
    except FileNotFoundError:
        step = f"The folder {path.parent} " + (
            "exists." if path.parent.is_dir() else "does not exist either."
        )
        yield Problem("D100", file, "there is no such file", next_step=step)
    except RowFault as fault:
        yield Problem(fault.code, file, fault.message, next_step=fault.next_step)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Problem("D100", file, f"the file is damaged, or not packed as its name says: {error}")
    except OSError as error:
        yield Problem("D100", file, f"the file cannot be opened: {error.strerror or error}")


def unpacked(path: Path, name: str) -> io.BufferedReader:
    """The file's bytes, as its name says that they are packed. Raises OSError, EOFError,
    zlib.error; RowFault: what unpacks it is not installed."""
    suffix = Path(name).suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), 2**16)
    if suffix != ".zst":
        return path.open("rb")
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise RowFault(
            "D100", "reading .zst needs the package pyarrow", "pip install 'veneer[parquet]'"
        ) from None
    return io.BufferedReader(CompressedInputStream(str(path), "zstd"), 2**16)


def _jsonl(lines: BinaryIO, file: str) -> Records:
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = lines.readline(MAX_LINE_BYTES)
            message = f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB"
            step = "Put each row on a line of its own; a JSON list of rows belongs in a .json file."
            yield Problem("D106", file, message, (number,), step)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, _object(_utf8(line.rstrip(b"\r\n")))
        except RowFault as fault:
            yield fault.at(RowRef(file, number))


def _utf8(line: bytes) -> str:
    if b"\0" in line:
        raise RowFault("D102", "holds NUL bytes: the file is damaged, or not text")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RowFault(
            "D102",
            f"is not UTF-8 (byte 0x{line[error.start]:02X} at {error.start + 1})",
            "Save the file as UTF-8. If it is Windows text: iconv -f CP1252 -t UTF-8 OLD > NEW",
        ) from None


def _object(text: str) -> dict[str, Any]:
    """The object that a line consists of. Raises RowFault."""
    value = whole_value(text)
    if isinstance(value, dict):
        return value
    step = "A JSON list of rows belongs in a .json file." if isinstance(value, list) else ""
    raise RowFault("D105", f"is {_kind(value)}, not an object", step)


def _kind(value: Any) -> str:
    names = {"list": "a list", "str": "a string", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _json(opened: BinaryIO, file: str) -> Records:
    number = 0
    try:
        json_text = JSONText(_utf8(opened.read().removeprefix(b"\xef\xbb\xbf")))
        at = json_text.skip(0)
        if json_text.after(at) == "{":
            at = _find_data(json_text, at)
        elif json_text.after(at) not in ("[", ""):
            raise RowFault("D105", "is neither a list nor an object")
        json_text.faults.clear()
        if not json_text.after(at):
            return
        at = json_text.skip(at + 1)
        while json_text.after(at) != "]":
            number += 1
            # A fault here ends the reading: where the next record begins cannot be told.
            value, at = json_text.value(at)
            if json_text.faults:
                yield json_text.faults[0].at(RowRef(file, number))
                json_text.faults.clear()
            elif isinstance(value, dict):
                yield number, value
            else:
                yield Problem("D105", file, f"is {_kind(value)}, not an object", (number,))
            at = json_text.skip(at)
            if json_text.after(at) not in (",", "]"):
                raise RowFault(
                    "D103",
                    "is not followed by a comma or the end of the list: the file may be cut off",
                )
            if json_text.after(at) == ",":
                at = json_text.skip(at + 1)
    except RowFault as fault:
        lines = (number,) if number else ()
        message = fault.message + ("; records after it were not read" if number else "")
        yield Problem(fault.code, file, message, lines, fault.next_step)


def _find_data(json_text: JSONText, at: int) -> int:
    """Where the list under the key "data" of the object at `at` begins. Raises RowFault."""
    keys = []
    at = json_text.skip(at + 1)
    while json_text.after(at) == '"':
        key, at = json_text.value(at)
        at = json_text.skip(at)
        if json_text.after(at) != ":":
            break
        at = json_text.skip(at + 1)
        if key == "data" and json_text.after(at) == "[":
            return at
        keys.append(key)
        _, at = json_text.value(at)
        at = json_text.skip(at)
        if json_text.after(at) == ",":
            at = json_text.skip(at + 1)
    if json_text.after(at) == "}" and json_text.after(json_text.skip(at + 1)) == "{":
        raise RowFault(
            "D105", "holds one object after the other", "That is JSON Lines: rename it to .jsonl."
        )
    shown = ", ".join(keys[:10]) or "none"
    raise RowFault(
        "D105",
        f'is one object without a list under "data" (keys: {shown})',
        f"Kinds of file: {READ}.",
    )


def _csv(opened: BinaryIO, file: str) -> Records:
    csv.field_size_limit(
        max(csv.field_size_limit(), MAX_LINE_BYTES)
    )  # Python's own is 128 KiB, of the process
    # Bad bytes pass the reader as lone surrogates, so that each is reported with its row.
    with io.TextIOWrapper(
        opened, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        first = 0
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader, None)
                if fields is None:
                    return
                if not fields:
                    continue
                for value in fields:
                    _utf8(value.encode("utf-8", "surrogateescape"))
                if not header:
                    header = _header(fields)
                    continue
                if len(fields) != len(header):
                    raise RowFault("D105", f"has {len(fields)} fields, the header {len(header)}")
                yield first, dict(zip(header, fields, strict=True))
            except csv.Error as error:
                yield Problem("D105", file, f"is not CSV: {error}", (first,))
            except RowFault as fault:
                yield fault.at(RowRef(file, first))
            if not header:
                return


def _header(fields: list[str]) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise RowFault("D105", f"the header names {', '.join(map(repr, twice))} twice")
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(fields) == 1 and mark in fields[0]:
            raise RowFault(
                "D105", f"the columns seem to be parted by {name}", "Save the file with commas."
            )
    return fields


def _parquet(opened: BinaryIO, file: str) -> Records:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        step = "pip install 'veneer[parquet]'"
        yield Problem("D100", file, "reading Parquet needs the package pyarrow", next_step=step)
        return
    number = 0
    try:
        read = parquet.ParquetFile(opened)
        names = read.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield Problem("D105", file, f"two columns are called {', '.join(map(repr, twice))}")
            return
        for batch in read.iter_batches(batch_size=1024):
            for record in _times_as_numbers(batch).to_pylist():
                number += 1
                if too_deep(record):
                    yield Problem("D103", file, TOO_DEEP, (number,))
                else:
                    yield number, _without_nulls(record)
    except (pyarrow.ArrowException, ValueError) as error:
        yield Problem("D100", file, f"is not Parquet that can be read: {error}")


def _times_as_numbers(batch: Any) -> Any:
    """Of columns beside the rows' own: Python's times know neither every nanosecond nor every
    year."""
    from pyarrow import RecordBatch, int32, int64, types

    columns = [
        (
            column.view(int32() if column.type.bit_width == 32 else int64())
            if types.is_temporal(column.type) and column.type.bit_width in (32, 64)
            else column
        )
        for column in batch.columns
    ]
    return RecordBatch.from_arrays(columns, names=batch.schema.names)


def _without_nulls(value: Any) -> Any:
    """Parquet fills every struct up to the union of all rows' keys; the nulls were not in the
    user's rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
