"""Writes examples to files once and reads them on demand.

tokens.i4   the ids of all examples end to end, the sign bit set on trained tokens
start.i8    where each example begins among them; one more: where the last one ends
used.i4     how many of its tokens are computed: up to its last trained token
trained.i4  how many of its tokens are trained on
key.i8, row.i8   Example.key, Example.row (-1: None)
file.i4, line.i4   location of its row; the files' names are in index.json, with the counts

All little-endian. Columns are memory-mapped, tokens are read: memory holds only the tokens of the
current batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from veneer.data.examples import Example, RowRef
from veneer.errors import CorruptFileError
from veneer.files.strict_json import read_json

COLUMNS = {
    "start": "<i8",
    "used": "<i4",
    "trained": "<i4",
    "key": "<i8",
    "row": "<i8",
    "file": "<i4",
    "line": "<i4",
}
INDEX = "index.json"
_TRAINED_BIT = np.int32(-(2**31))
_BUFFERED_EXAMPLES = 4096
"""Examples that are buffered before they are written."""
SAMPLE_SIZE = 2048
"""Examples that represent all stored ones where every example would be inspected."""


def _used_tokens(example: Example) -> int:
    trained = np.flatnonzero(example.trained)
    return int(trained[-1]) if len(trained) else 0


VALUES: Mapping[str, Callable[[Example], int]] = {
    "used": _used_tokens,
    "trained": lambda example: int(np.count_nonzero(example.trained)),
    "key": lambda example: example.key,
    "row": lambda example: -1 if example.row is None else example.row,
    "line": lambda example: example.ref.line,
}
"""Computes the integers of an example that are stored as columns. used: tokens that are computed
(batching.py); row: -1 for None."""


class ExampleWriter:
    """Writes examples into an existing, empty folder. After `close` they can be read."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._end, self._single = folder, 0, 0, True
        self._files: dict[str, int] = {}
        self._tokens = (folder / "tokens.i4").open("wb")
        self._columns = {name: (folder / _file_name(name)).open("wb") for name in COLUMNS}
        self._buffer: list[Example] = []

    def add(self, examples: Iterable[Example]) -> None:
        self._buffer += examples
        if len(self._buffer) >= _BUFFERED_EXAMPLES:
            self._write()

    def close(self) -> None:
        self._write()
        self._write_column("start", [self._end])
        for file in (self._tokens, *self._columns.values()):
            file.close()
        index = {
            "examples": self._count,
            "tokens": self._end,
            "single": self._single,
            "files": list(self._files),
        }
        (self._folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def _write(self) -> None:
        examples, self._buffer = self._buffer, []
        if not examples:
            return
        sizes = [len(example.ids) for example in examples]
        signs = (
            np.concatenate([example.trained for example in examples]).astype(np.int32)
            * _TRAINED_BIT
        )
        (np.concatenate([example.ids for example in examples]).astype(np.int32) | signs).astype(
            "<i4"
        ).tofile(self._tokens)
        self._write_column("start", (self._end + np.cumsum([0, *sizes[:-1]])).tolist())
        for name, value in VALUES.items():
            self._write_column(name, [*map(value, examples)])
        self._write_column(
            "file",
            [self._files.setdefault(example.ref.file, len(self._files)) for example in examples],
        )
        self._single &= all(example.row is None for example in examples)
        self._count, self._end = self._count + len(examples), self._end + sum(sizes)

    def _write_column(self, column: str, values: Sequence[int]) -> None:
        np.array(values, dtype=COLUMNS[column]).tofile(self._columns[column])


class StoredExamples(Sequence[Example]):
    """Reads the examples that a writer left in `folder`; not thread-safe.

    Raises CorruptFileError if files are cut short.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX)
        self.single: bool = index["single"]
        """Whether every row became only one example."""
        self._files, self._numbers = index["files"], range(index["examples"])
        sizes = {
            name: np.dtype(kind).itemsize * len(self._numbers) for name, kind in COLUMNS.items()
        }
        sizes |= {"start": sizes["start"] + 8, "tokens": 4 * index["tokens"]}
        short = [
            name
            for name, size in sizes.items()
            if (folder / _file_name(name)).stat().st_size != size
        ]
        if short:
            raise CorruptFileError(
                f"{folder} is damaged: {', '.join(short)}",
                [],
                "Remove the folder: it is built again.",
            )
        self._columns = {
            name: _map_column(folder / _file_name(name), kind) for name, kind in COLUMNS.items()
        }
        self._tokens = (folder / "tokens.i4").open("rb", buffering=0)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Returns the tokens of each example."""
        return np.diff(self.column("start", 1))

    def column(self, name: str, more: int = 0) -> NDArray[Any]:
        """Returns a column of COLUMNS for these examples, and for `more` examples after them."""
        return self._columns[name][self._numbers.start : self._numbers.stop + more]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Example: ...

    @overload
    def __getitem__(self, number: slice) -> StoredExamples: ...

    def __getitem__(self, number: int | slice) -> Example | StoredExamples:
        if isinstance(number, slice):
            part = object.__new__(StoredExamples)
            part.__dict__ = {**self.__dict__, "_numbers": self._numbers[number]}
            if part._numbers.step != 1:
                raise ValueError("stored examples only support slices with step 1")
            return part
        at = self._numbers[number]
        column = {
            name: int(self._columns[name][at]) for name in ("start", "key", "row", "file", "line")
        }
        size = int(self._columns["start"][at + 1]) - column["start"]
        self._tokens.seek(4 * column["start"])
        packed = np.frombuffer(self._tokens.read(4 * size), dtype="<i4").astype(np.int32)
        return Example(
            packed & ~_TRAINED_BIT,
            packed < 0,
            RowRef(self._files[column["file"]], column["line"]),
            column["key"],
            row=None if column["row"] < 0 else column["row"],
        )


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the tokens of each example."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return np.array([len(example.ids) for example in examples], dtype=np.int64)


def column_of(examples: Sequence[Example], name: str) -> NDArray[np.int64]:
    """Returns a value of each example, by its name in VALUES."""
    if isinstance(examples, StoredExamples):
        return examples.column(name).astype(np.int64, copy=False)
    return np.array([*map(VALUES[name], examples)], dtype=np.int64)


def representative_examples(examples: Sequence[Example]) -> Sequence[Example]:
    """Returns all examples, or of stored ones a sample: the longest, and others evenly spaced."""
    if not isinstance(examples, StoredExamples) or len(examples) <= SAMPLE_SIZE:
        return examples
    longest = np.argpartition(examples.column("used"), -SAMPLE_SIZE // 4)[-SAMPLE_SIZE // 4 :]
    spaced = np.linspace(0, len(examples) - 1, SAMPLE_SIZE - len(longest)).astype(np.int64)
    return [examples[i] for i in np.union1d(longest, spaced).tolist()]


def _file_name(name: str) -> str:
    return f"{name}.i4" if name == "tokens" else f"{name}.{COLUMNS[name][1:]}"


def _map_column(path: Path, kind: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
