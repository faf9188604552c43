"""Reads rows that are evaluated or scored, as the adapters in use were trained on theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from veneer.adapters.preamble import Preamble
from veneer.data.config import DataConfig
from veneer.data.examples import Example, Row, RowRef
from veneer.data.files.writing import ROWS_NAME, Record, as_set, is_rows
from veneer.data.load import load_data
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase


@dataclass(frozen=True)
class RowOptions:
    """How rows are read. length: tokens; longer rows are refused. columns: new names of columns."""

    length: int = 2048
    format: str = "auto"
    train_on: str = "assistant"
    columns: Mapping[str, str | None] = field(default_factory=dict)


def load_rows(
    base: FrozenBase,
    data: str | Path | Iterable[Record],
    options: RowOptions,
    *,
    preamble: Preamble,
    purpose: str,
) -> tuple[list[Row], list[Example]]:
    """Loads rows and their examples, in the same order, by the tokenizer of the acting adapters.

    data     the name of a set of rows, or the rows themselves, each a dict
    purpose  what the rows are used for, as errors name it
    Raises DataError with every row that cannot be computed.
    """
    with as_set(data) as set_name:
        fields = DataConfig.of(
            {
                "train": set_name,
                "validation_share": 0.0,
                "format": options.format,
                "train_on": options.train_on,
                "map": options.columns,
            }
        )
        loaded = load_data(
            fields,
            length=options.length,
            capacity=capacity_of(base),
            tokenizer=base.acting_tokenizer,
            preamble=preamble,
            purpose=purpose,
        )
    rows, examples = list(loaded.train_rows), list(loaded.train)
    if is_rows(data):
        rows = [replace(row, ref=RowRef(ROWS_NAME, row.ref.line)) for row in rows]
        examples = [replace(e, ref=RowRef(ROWS_NAME, e.ref.line)) for e in examples]
    return rows, examples
