"""Examples in files: written once, one after another, and read from there as they are asked for.

    tokens.i4   the ids of all examples end to end, the sign bit set on those that are learnt
    start.i8    where each example begins among them; one more: where the last one ends
    used.i4     how many of its tokens are computed: up to its last trained one
    trained.i4  how many of its tokens are learnt
    key.i8, row.i8   Example.key, Example.row (-1: None)
    file.i4, line.i4   where it stands; the files' names are in index.json, with the counts

All little-endian. Columns are mapped, tokens are read: what an epoch holds of them is its batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
_LEARNT = np.int32(-(2**31))
_TOGETHER = 4096
"""Examples that wait to be written."""
SOME = 2048
"""Of examples in files, what stands for all of them where each would be looked at."""


class ExampleWriter:
    """Into a folder that is there and empty. close: then it can be read."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._end, self._single = folder, 0, 0, True
        self._files: dict[str, int] = {}
        self._tokens = (folder / "tokens.i4").open("wb")
        self._columns = {name: (folder / _file(name)).open("wb") for name in COLUMNS}
        self._wait: list[Example] = []

    def add(self, examples: Iterable[Example]) -> None:
        self._wait += examples
        if len(self._wait) >= _TOGETHER:
            self._write()

    def close(self) -> None:
        self._write()
        self._put("start", [self._end])
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
        some, self._wait = self._wait, []
        if not some:
            return
        sizes = [len(e.ids) for e in some]
        signs = np.concatenate([e.trained for e in some]).astype(np.int32) * _LEARNT
        (np.concatenate([e.ids for e in some]).astype(np.int32) | signs).astype("<i4").tofile(
            self._tokens
        )
        self._put("start", (self._end + np.cumsum([0, *sizes[:-1]])).tolist())
        self._put("used", [_used(e) for e in some])
        self._put("trained", [int(np.count_nonzero(e.trained)) for e in some])
        self._put("key", [e.key for e in some])
        self._put("row", [-1 if e.row is None else e.row for e in some])
        self._put("file", [self._files.setdefault(e.ref.file, len(self._files)) for e in some])
        self._put("line", [e.ref.line for e in some])
        self._single &= all(e.row is None for e in some)
        self._count, self._end = self._count + len(some), self._end + sum(sizes)

    def _put(self, column: str, values: Sequence[int]) -> None:
        np.array(values, dtype=COLUMNS[column]).tofile(self._columns[column])


class StoredExamples(Sequence[Example]):
    """Those that a writer left in `folder`. Not for several threads at once. CorruptFileError:
    files are cut short."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX)
        self.single: bool = index["single"]
        """Whether each is of a row of its own."""
        self._files, self._numbers = index["files"], range(index["examples"])
        sizes = {
            name: np.dtype(kind).itemsize * len(self._numbers) for name, kind in COLUMNS.items()
        }
        sizes |= {"start": sizes["start"] + 8, "tokens": 4 * index["tokens"]}
        short = [
            name for name, size in sizes.items() if (folder / _file(name)).stat().st_size != size
        ]
        if short:
            raise CorruptFileError(
                f"{folder} is damaged: {', '.join(short)}",
                [],
                "Remove the folder: it is made anew.",
            )
        self._columns = {
            name: _mapped(folder / _file(name), kind) for name, kind in COLUMNS.items()
        }
        self._tokens = (folder / "tokens.i4").open("rb", buffering=0)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return np.diff(self._column("start", 1))

    @property
    def used(self) -> NDArray[np.int64]:
        """Of each, tokens that are computed (batching.py)."""
        return self._column("used")

    @property
    def trained(self) -> NDArray[np.int64]:
        """Trained tokens of each."""
        return self._column("trained")

    @property
    def rows(self) -> NDArray[np.int64]:
        """Example.row of each, -1 for None."""
        return self._column("row")

    @property
    def keys(self) -> NDArray[np.int64]:
        """Example.key of each."""
        return self._column("key")

    def _column(self, name: str, more: int = 0) -> NDArray[Any]:
        return self._columns[name][self._numbers.start : self._numbers.stop + more]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Example: ...

    @overload
    def __getitem__(self, number: slice) -> StoredExamples: ...

    def __getitem__(self, number: int | slice) -> Example | StoredExamples:
        if isinstance(number, slice):
            some = object.__new__(StoredExamples)
            some.__dict__ = {**self.__dict__, "_numbers": self._numbers[number]}
            if some._numbers.step != 1:
                raise ValueError("examples in files are cut into stretches alone")
            return some
        at = self._numbers[number]
        column = {
            name: int(self._columns[name][at]) for name in ("start", "key", "row", "file", "line")
        }
        size = int(self._columns["start"][at + 1]) - column["start"]
        self._tokens.seek(4 * column["start"])
        packed = np.frombuffer(self._tokens.read(4 * size), dtype="<i4").astype(np.int32)
        return Example(
            packed & ~_LEARNT,
            packed < 0,
            RowRef(self._files[column["file"]], column["line"]),
            column["key"],
            row=None if column["row"] < 0 else column["row"],
        )


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Tokens of each."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return np.array([len(example.ids) for example in examples], dtype=np.int64)


def used_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Computed tokens of each."""
    if isinstance(examples, StoredExamples):
        return examples.used.astype(np.int64)
    return np.array([_used(example) for example in examples], dtype=np.int64)


def trained_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Trained tokens of each."""
    if isinstance(examples, StoredExamples):
        return examples.trained.astype(np.int64)
    return np.array([np.count_nonzero(example.trained) for example in examples], dtype=np.int64)


def keys_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Example.key of each."""
    if isinstance(examples, StoredExamples):
        return examples.keys
    return np.array([example.key for example in examples], dtype=np.int64)


def row_numbers_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Example.row of each, -1 for None."""
    if isinstance(examples, StoredExamples):
        return examples.rows
    return np.array(
        [-1 if example.row is None else example.row for example in examples], dtype=np.int64
    )


def some_of(examples: Sequence[Example]) -> Sequence[Example]:
    """All of them, of those in files some: the longest, and others evenly spaced."""
    if not isinstance(examples, StoredExamples) or len(examples) <= SOME:
        return examples
    longest = np.argpartition(examples.used, -SOME // 4)[-SOME // 4 :]
    spaced = np.linspace(0, len(examples) - 1, SOME - len(longest)).astype(np.int64)
    return [examples[i] for i in np.union1d(longest, spaced).tolist()]


def _used(example: Example) -> int:
    learnt = np.flatnonzero(example.trained)
    return int(learnt[-1]) if len(learnt) else 0


def _file(name: str) -> str:
    return f"{name}.i4" if name == "tokens" else f"{name}.{COLUMNS[name][1:]}"


def _mapped(path: Path, kind: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
