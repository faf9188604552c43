"""Bodies of the requests that the page's Teach tab sends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from veneer.bounds import LENGTH, SHARE
from veneer.data.examples import Layout, LongRows, TrainOn
from veneer.serve.protocols.body import Body, Length, Num
from veneer.serve.refusals import Fault

MOST_COLUMNS = 16
MOST_COLUMN = 200
Column = Annotated[str, Length(1, MOST_COLUMN)]


class RowChoices(Body):
    """How rows are read, and which of them are held out."""

    layout: Layout = "auto"
    """layout of the rows; auto recognises it by the columns"""
    columns: Annotated[dict[str, Column], Length(0, MOST_COLUMNS)] = Field(default_factory=dict)
    """for names of the layout, the columns of the file that hold them"""
    validation_share: Annotated[float, Num(SHARE)] = 0.05
    """share of the rows to hold out"""
    train_on: TrainOn = "assistant"
    """tokens to train on"""
    length: Annotated[int, Num(LENGTH)] = 2048
    """longest row in tokens"""
    long_rows: LongRows = "refuse"
    """what happens to longer rows"""

    def conflicts(self) -> Iterator[Fault]:
        columns = list(self.columns.values())
        if twice := sorted({column for column in columns if columns.count(column) > 1}):
            yield Fault("columns", f"column {twice[0]!r} is chosen twice")


class NoBody(Body):
    """The body of a request that needs no field."""


TaskKind = Literal["style", "format", "task", "instructions", "knowledge"]
