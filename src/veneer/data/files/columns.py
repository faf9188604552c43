"""Columns of records under the names that layouts have, as a person maps them; labels that mark bad
answers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from veneer.data.examples import Problem, RowFault, RowRef

ColumnMap = Mapping[str, str | None]
"""What a column is called in a file -> what it is read as; None: it is left out, in messages
too."""


class Renames:
    """Columns under the names that layouts have."""

    def __init__(self, columns: ColumnMap) -> None:
        self._columns = dict(columns)
        self._left_out = frozenset(name for name, to in columns.items() if to is None)
        self._met: set[str] = set()

    def of(self, record: dict[str, Any]) -> dict[str, Any]:
        """Raises RowFault: two columns would have one name."""
        if not self._columns:
            return record
        made: dict[str, Any] = {}
        for name, value in record.items():
            if name in self._columns:
                self._met.add(name)
            to = self._columns.get(name, name)
            if to is None or value is None:
                continue
            if to in made:
                raise RowFault(
                    "D107",
                    f"two columns are called '{to}', '{name}' by the map",
                    "Leave one out: map: {X: null}.",
                )
            made[to] = (
                [self._message(each) for each in value]
                if self._left_out and isinstance(value, list)
                else value
            )
        return made

    def _message(self, value: Any) -> Any:
        if not isinstance(value, dict) or self._left_out.isdisjoint(value):
            return value
        self._met |= self._left_out & value.keys()
        return {name: each for name, each in value.items() if name not in self._left_out}

    def unused(self, file: str) -> list[Problem]:
        """Names that no row has: slips."""
        step = "Look at the columns' names, or leave it out of the map."
        return [
            Problem("D107", file, f"the map names '{name}', which no row has", next_step=step)
            for name in self._columns
            if name not in self._met
        ]


_BOOLEANS = {"true": True, "false": False}


class Labels:
    """Finds the layout of KTO in a set: rows of prompt, completion and a `label` that says whether
    the answer is good.

    A label marks answers only where all labels of a set are booleans and both values occur. It is
    metadata in any other set. JSON holds booleans, and CSV holds their names. Eight bytes are held
    for each row whose label is false.
    """

    def __init__(self) -> None:
        self._good = 0
        self._bad: dict[str, array[int]] = {}
        self._other = False

    def add(self, label: Any, ref: RowRef) -> None:
        """Counts the label of a row of prompt and completion. None, and an empty text, are no
        label."""
        if label is None or label == "":
            return
        marks = _BOOLEANS.get(label.strip().lower()) if isinstance(label, str) else label
        if marks is True:
            self._good += 1
        elif marks is False:
            self._bad.setdefault(ref.file, array("q")).append(ref.line)
        else:
            self._other = True

    def problems(self) -> Iterator[Problem]:
        """Yields a problem for each file that holds bad answers."""
        if self._other or not self._good:
            return
        step = (
            "Leave these rows out of the file: no method here learns from bad answers. "
            "Where the label does not rate the answer, train on all rows: --map label=null"
        )
        for file, lines in self._bad.items():
            message = (
                f"label is false, so the answer is marked as bad ({self._good:,} rows of the set"
                " have true)"
            )
            yield Problem("D116", file, message, tuple(lines), step)
