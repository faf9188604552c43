"""Columns of records under the names that layouts have, as a person maps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.data.examples import Problem, RowFault

ColumnMap = Mapping[str, str | None]
"""What a column is called in a file -> what it is read as; None: it is left out, in messages too."""


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
                    "D107", f"two columns are called '{to}', '{name}' by the map", "Leave one out: map: {X: null}."
                )
            made[to] = [self._message(each) for each in value] if self._left_out and isinstance(value, list) else value
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
