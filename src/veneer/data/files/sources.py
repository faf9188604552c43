"""Reads rows from .jsonl, .json, .csv or .parquet files (also .gz and .zst), by extension.

Every broken row is reported, not only the first: `scan_rows` returns them beside the good rows,
`read_rows` raises one error that lists them. Lines of .jsonl and .csv are streamed, and a line
longer than MAX_LINE_BYTES is skipped without being held in memory; a .json file is read whole.
records.py bounds what is read, tables.py reads .csv and parquet.py Parquet files. places.py finds
the files of a set.
Knows nothing of tokenizers.
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veneer.data.examples import Problem, Row, RowFault, RowKind, RowRef, grouped, refusal
from veneer.data.files.columns import ColumnMap, ColumnRenames, KtoLabels
from veneer.data.files.json_text import JSONText, whole_value
from veneer.data.files.labels import make_row
from veneer.data.files.layouts import RowLayouts, detect, format_of
from veneer.data.files.parquet import read_parquet
from veneer.data.files.places import PACKED, SHEETS, ResolvedSets, RowFile, kind_of
from veneer.data.files.records import AS_WRITTEN, MAX_JSON_FILE_BYTES, MAX_LINE_BYTES, Records
from veneer.data.files.tables import read_csv
from veneer.data.files.text import UTF_16_MARKS, utf8

READABLE_KINDS = (
    '.jsonl (one JSON object a line), .json (a list of objects, or {"data": [...]}), .csv (with a'
    " header), .parquet"
)


def read_rows(
    path: str | Path,
    format: str = "auto",
    columns: ColumnMap | None = None,
    kind: RowKind = "answers",
) -> list[Row]:
    """Reads all rows of the set. Raises DataError with every bad row if there is one.

    format: a name of FORMATS, or auto. kind: of the rows that are wanted
    """
    rows, problems = scan_rows(path, format, columns, kind)
    if fatal := [problem for problem in problems if problem.fatal]:
        raise refusal(f"{path} cannot be read as rows", fatal)
    return rows


def scan_rows(
    path: str | Path,
    format: str = "auto",
    columns: ColumnMap | None = None,
    kind: RowKind = "answers",
) -> tuple[list[Row], list[Problem]]:
    """Reads the good rows of a set (places.py) and the problems of the others.

    columns: renames columns; None drops one. Raises DataError for an unknown format name, and for a
    set that is not found or cannot be downloaded.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    layouts = RowLayouts()
    for row in iterate_rows(path, format, columns, kind=kind):
        if isinstance(row, Row):
            rows.append(row)
            layouts.add(row)
        else:
            problems.append(row)
    return rows, grouped(problems + layouts.problems())


def iterate_rows(
    path: str | Path,
    format: str = "auto",
    columns: ColumnMap | None = None,
    sets: ResolvedSets | None = None,
    kind: RowKind = "answers",
) -> Iterator[Row | Problem]:
    """Yields the rows and problems of a set one by one, so that only one row is in memory.

    sets: remembers the files of a set, for callers that read it more than once. kind: of the rows
    that are wanted
    """
    format_name = format_of(format, kind)
    renames, labels, any_rows = ColumnRenames(columns or {}), KtoLabels(), False
    for row_file in (sets or ResolvedSets()).find_files(str(path)):
        empty = True
        for record in iterate_records(row_file):
            empty, any_rows = False, True
            if isinstance(record, Problem):
                yield record
                continue
            line, values = record
            ref = RowRef(row_file.name, line)
            try:
                values = renames.rename(values)
                columns_present = frozenset(
                    name for name, value in values.items() if value is not None
                )
                row = make_row(values, ref, format_name or detect(columns_present, kind))
            except RowFault as fault:
                yield fault.at(ref)
            else:
                if row.format == "prompt_completion":
                    labels.add(values.get("label"), ref)
                yield row
        if empty:
            yield Problem("D100", row_file.name, "the file has no rows")
    yield from labels.problems()
    if any_rows:
        yield from renames.unused(str(path))


def iterate_records(row_file: RowFile) -> Records:
    """Yields the records of a file with their lines, and the problems of those that cannot be
    read."""
    path, file = row_file.path, row_file.name
    readers: dict[str, Callable[[io.BufferedReader, str], Records]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": read_csv,
        ".parquet": read_parquet,
    }
    kind = kind_of(file)
    compressed = Path(file).suffix.lower() in PACKED
    if not kind or (compressed and kind == ".parquet"):
        suffix = Path(file).suffix
        if suffix.lower() in SHEETS:
            step = "Save it as CSV UTF-8 (.csv) in the program that wrote it."
            yield Problem("D100", file, "a workbook, which is not read", next_step=step)
            return
        reason = f"extension '{suffix}'" if suffix else "no extension"
        yield Problem(
            "D100",
            file,
            f"{reason}: the extension decides how the file is read",
            next_step=f"Kinds of file: {READABLE_KINDS}.",
        )
        return
    if path.exists() and not path.is_file():
        step = "A set may be read twice. Write the rows into a file and name that."
        yield Problem(
            "D100", file, "not a regular file, but a pipe, a device or a folder", next_step=step
        )
        return
    try:
        with open_decompressed(path, file) as stream:
            if kind != ".csv" and stream.peek(2)[:2] in UTF_16_MARKS:
                yield Problem("D102", file, "the file is UTF-16", next_step="Save it as UTF-8.")
                return
            yield from readers[kind](stream, file)
    except FileNotFoundError:
        step = f"The folder {path.parent} " + (
            "exists." if path.parent.is_dir() else "does not exist either."
        )
        yield Problem("D100", file, "file not found", next_step=step)
    except RowFault as fault:
        yield Problem(fault.code, file, fault.message, next_step=fault.next_step)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Problem(
            "D100",
            file,
            f"the file is damaged, or its extension does not match its compression: {error}",
        )
    except OSError as error:
        yield Problem("D100", file, f"the file cannot be opened: {error.strerror or error}")


def open_decompressed(path: Path, name: str) -> io.BufferedReader:
    """Opens the file's bytes, decompressed by its extension.

    Raises OSError, EOFError, zlib.error; RowFault if a package for decompression is missing.
    """
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


_LIST_OF_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|$)")
"""What the first line of a list begins with, where a line of .jsonl is one object."""


def _jsonl(lines: io.BufferedReader, file: str) -> Records:
    if _LIST_OF_OBJECTS.match(lines.peek(64)[:64].split(b"\n")[0]):
        message = "the file is one list, as in .json: its rows are numbered by their place there"
        yield Problem(AS_WRITTEN, file, message, fatal=False)
        yield from _json(lines, file)
        return
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
            yield number, _object(utf8(line.rstrip(b"\r\n")))
        except RowFault as fault:
            yield fault.at(RowRef(file, number))


def _object(text: str) -> dict[str, Any]:
    """Reads a line that is one JSON object. Raises RowFault."""
    value = whole_value(text)
    if isinstance(value, dict):
        return value
    step = "A JSON list of rows belongs in a .json file." if isinstance(value, list) else ""
    raise RowFault("D105", f"is {_kind(value)}, not an object", step)


def _kind(value: Any) -> str:
    names = {"list": "a list", "str": "a string", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _json(stream: io.BufferedReader, file: str) -> Records:
    number = 0
    try:
        content = stream.read(MAX_JSON_FILE_BYTES + 1)
        if len(content) > MAX_JSON_FILE_BYTES:
            message = f"the file holds more than {MAX_JSON_FILE_BYTES:,} bytes, and is read whole"
            raise RowFault("D106", message, "Write the rows as .jsonl, which is read by lines.")
        json_text = JSONText(utf8(content.removeprefix(b"\xef\xbb\xbf")))
        at = json_text.skip(0)
        if is_object := json_text.after(at) == "{":
            at = _find_data(json_text, at)
        elif json_text.after(at) not in ("[", ""):
            raise RowFault("D105", "is neither a list nor an object")
        json_text.faults.clear()
        if not json_text.after(at):
            return
        at = json_text.skip(at + 1)
        while json_text.after(at) != "]":
            number += 1
            # A fault here ends the reading: the start of the next record is unknown.
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
        _check_end(json_text, at + 1, is_object)
    except RowFault as fault:
        lines = (number,) if number else ()
        message = fault.message + ("; records after it were not read" if number else "")
        yield Problem(fault.code, file, message, lines, fault.next_step)


def _find_data(json_text: JSONText, at: int) -> int:
    """Finds the list under the key "data" of the object at `at`. Returns its start. Raises
    RowFault."""
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
        f"Kinds of file: {READABLE_KINDS}.",
    )


def _check_end(json_text: JSONText, at: int, is_object: bool) -> None:
    """Raises RowFault if the text does not end behind the list of rows, whose end is before `at`.

    is_object: whether the list is a value of an object, which may have further keys
    """
    at = json_text.skip(at)
    while is_object and json_text.after(at) == ",":
        key, at = json_text.value(json_text.skip(at + 1))
        if key == "data":
            raise RowFault("D104", 'two lists are called "data"', "Write all rows into one.")
        at = json_text.skip(at)
        if json_text.after(at) != ":":
            break
        _, at = json_text.value(json_text.skip(at + 1))
        at = json_text.skip(at)
    if is_object and json_text.after(at) != "}":
        raise RowFault("D103", "the object of the rows does not end: the file may be cut off")
    if json_text.after(json_text.skip(at + is_object)):
        step = "Write all rows into one list, or one row a line into a .jsonl file."
        raise RowFault("D103", "something follows the list of rows", step)
