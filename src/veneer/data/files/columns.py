"""Renames columns of records, and finds labels that mark bad answers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from veneer.data.examples import Problem, RowFault, RowRef

ColumnMap = Mapping[str, str | None]
"""Column name in the file -> name it is read as; None drops the column, also inside messages."""


class ColumnRenames:
    """Renames the columns of records to the names that layouts use."""

    def __init__(self, columns: ColumnMap) -> None:
        self._columns = dict(columns)
        self._dropped = frozenset(name for name, new_name in columns.items() if new_name is None)
        self._seen: set[str] = set()

    def rename(self, record: dict[str, Any]) -> dict[str, Any]:
        """Renames the columns of a record. Raises RowFault if two columns get the same name."""
        if not self._columns:
            return record
        renamed: dict[str, Any] = {}
        for name, value in record.items():
            if name in self._columns:
                self._seen.add(name)
            new_name = self._columns.get(name, name)
            if new_name is None or value is None:
                continue
            if new_name in renamed:
                raise RowFault(
                    "D107",
                    f"the map gives two columns the name '{new_name}', one is '{name}'",
                    "Drop one: map: {X: null}.",
                )
            renamed[new_name] = (
                [self._message(item) for item in value]
                if self._dropped and isinstance(value, list)
                else value
            )
        return renamed

    def _message(self, value: Any) -> Any:
        if not isinstance(value, dict) or self._dropped.isdisjoint(value):
            return value
        self._seen |= self._dropped & value.keys()
        return {name: item for name, item in value.items() if name not in self._dropped}

    def unused(self, file: str) -> list[Problem]:
        """Reports names in the map that no row has."""
        step = "Check the column names, or remove it from the map."
        return [
            Problem("D107", file, f"the map names '{name}', which no row has", next_step=step)
            for name in self._columns
            if name not in self._seen
        ]


RATED_BAD = "D116"
"""Code of the problem that answers are marked as bad."""
_BOOLEANS = {"true": True, "false": False}


def rating_of(label: Any) -> Any:
    """Returns the rating of a label: text that says true or false as a boolean, other text as None.
    Other values are returned as they are."""
    return _BOOLEANS.get(label.strip().lower()) if isinstance(label, str) else label


def flag_of(value: Any) -> Any:
    """Returns text that says true or false as a boolean, and empty text as None: a .csv holds texts
    alone. Other values are returned as they are."""
    if not isinstance(value, str):
        return value
    return _BOOLEANS.get(value.strip().lower(), value) if value.strip() else None


class KtoLabels:
    """Recognises the KTO layout: rows of prompt, completion and a `label` that rates the answer.

    Labels rate answers if all labels of a set are booleans; in any other set they are metadata.
    JSON holds booleans, and CSV holds their names. Eight bytes are held for each row whose label is
    false.
    """

    def __init__(self) -> None:
        self._good = 0
        self._bad: dict[str, array[int]] = {}
        self._other = False

    def add(self, label: Any, ref: RowRef) -> None:
        """Counts the label of a row of prompt and completion. None and empty texts are skipped."""
        if label is None or label == "":
            return
        rating = rating_of(label)
        if rating is True:
            self._good += 1
        elif rating is False:
            self._bad.setdefault(ref.file, array("q")).append(ref.line)
        else:
            self._other = True

    @property
    def mark_bad_answers(self) -> bool:
        """Whether the labels rate answers, and rate some of them as bad."""
        return bool(self._bad) and not self._other

    def problems(self) -> Iterator[Problem]:
        """Yields a problem for each file that holds bad answers."""
        if not self.mark_bad_answers:
            return
        step = (
            "Train with --objective kto, which learns from bad answers too, or leave these rows out"
            " of the file. Where the label does not rate the answer, train on all rows: --map"
            " label=null"
        )
        for file, lines in self._bad.items():
            good = f"{self._good:,} rows" if self._good else "no row"
            message = (
                f"label is false, so the answer is marked as bad ({good} of the set have true)"
            )
            yield Problem(RATED_BAD, file, message, tuple(lines), step)
