"""Reads tables of text (.csv) as spreadsheets write them.

Columns are separated by commas, semicolons or tabs; the text is UTF-8, UTF-16 with a byte order
mark, or Windows text (CP1252). Anything but commas and UTF-8 is reported once, by a problem that
refuses nothing. Records are streamed.
"""

import csv
import io
from collections.abc import Iterator, Sequence

from veneer.data.examples import Problem, RowFault, RowRef
from veneer.data.files.records import AS_WRITTEN, MAX_LINE_BYTES, Records, check_columns
from veneer.data.files.text import UTF_16_MARKS, utf8

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SHOWN = 40  # characters of a value in a message


class _CsvLines:
    """Gives csv.reader the lines of a file. A record of more than MAX_LINE_BYTES characters raises
    RowFault, and the rest of its line is skipped without being held in memory."""

    def __init__(self, lines: io.TextIOWrapper) -> None:
        self._lines, self._length, self.number = lines, 0, 0
        self._ahead = ""

    def begin_record(self) -> int:
        """Begins a record. Returns the number of its first line."""
        self._length = 0
        return self.number + 1

    def separator(self) -> str:
        """Returns what separates the columns of the next line, which is a header: what gives the
        most columns."""
        self._ahead = self._lines.readline(MAX_LINE_BYTES + 1)
        counts = {
            mark: max(map(len, csv.reader([self._ahead], delimiter=mark)), default=0)
            for mark in _SEPARATORS
        }
        return max(counts, key=lambda mark: counts[mark])

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead or self._lines.readline(MAX_LINE_BYTES + 1 - self._length)
        self._ahead = ""
        if not line:
            raise StopIteration
        self.number += 1
        self._length += len(line)
        if self._length > MAX_LINE_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._lines.readline(MAX_LINE_BYTES)
            message = f"the row is longer than {MAX_LINE_BYTES // 2**20} MiB"
            raise RowFault("D106", message, "Look for a quotation mark that is never closed.")
        return line


def read_csv(stream: io.BufferedReader, file: str) -> Records:
    """Yields the records of a table with the number of their first line, and the problems of those
    that cannot be read."""
    csv.field_size_limit(
        max(csv.field_size_limit(), MAX_LINE_BYTES)
    )  # Python's default is 128 KiB, for the whole process
    wide = stream.peek(2)[:2] in UTF_16_MARKS
    # In UTF-8, bad bytes pass the reader as lone surrogates, so that each is reported with its row.
    encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
    with io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="") as text:
        try:
            if wide:
                yield _as_written(file, "the text is UTF-16")
            yield from _read(_CsvLines(text), _Letters(), file)
        except UnicodeDecodeError:
            step = "Save the file as UTF-8."
            yield Problem("D102", file, "the file is damaged: it is not UTF-16", next_step=step)


def _read(lines: _CsvLines, letters: "_Letters", file: str) -> Records:
    header: list[str] = []
    told = False
    reader = csv.reader(lines, strict=True)
    while True:
        first = lines.begin_record()
        try:
            if not header:
                separator = lines.separator()
                reader = csv.reader(lines, strict=True, delimiter=separator)
            fields = next(reader, None)
            if fields is None:
                return
            if not fields:
                continue
            fields = letters.decode(fields, first)
            if letters.shown and not told:
                told = True
                yield _as_written(
                    file, f"the text is read as Windows text (CP1252), as in '{letters.shown}'"
                )
            if not header:
                check_columns(fields)
                header = fields
                if separator != ",":
                    yield _as_written(
                        file, f"the columns are separated by {_SEPARATORS[separator]}"
                    )
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


def _as_written(file: str, message: str) -> Problem:
    step = "If letters or columns look wrong, save the file as CSV UTF-8, with commas."
    return Problem(AS_WRITTEN, file, message, next_step=step, fatal=False)


class _Letters:
    """Decodes the fields of records that were read as UTF-8, or else as Windows text.

    Text in English alone is both. The first record with another letter decides for the file; a
    record that is of the other encoding is a fault.
    """

    def __init__(self) -> None:
        self._utf8 = self._windows = 0
        self.shown = ""
        """The first field that is Windows text."""

    def decode(self, fields: list[str], line: int) -> list[str]:
        """Returns the fields of the record on this line. Raises RowFault."""
        if all(field.isascii() for field in fields):
            if any("\0" in field for field in fields):
                utf8(b"\0")
            return fields
        raw = [field.encode("utf-8", "surrogateescape") for field in fields]
        try:
            decoded = [utf8(field) for field in raw]
        except RowFault:
            if self._utf8 or any(b"\0" in field for field in raw):
                raise
            return self._from_windows(raw, line)
        if self._windows:
            raise RowFault(
                "D102",
                "is UTF-8, and rows before it are Windows text",
                "Save the whole file in one encoding: as CSV UTF-8.",
            )
        self._utf8 = line
        return decoded

    def _from_windows(self, raw: Sequence[bytes], line: int) -> list[str]:
        try:
            decoded = [field.decode("cp1252") for field in raw]
        except UnicodeDecodeError:
            raise RowFault(
                "D102", "is neither UTF-8 nor Windows text", "Save the file as CSV UTF-8."
            ) from None
        if not self._windows:
            self._windows = line
            self.shown = next(field for field in decoded if not field.isascii())[:_SHOWN]
        return decoded
