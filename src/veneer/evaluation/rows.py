"""Reads rows that are passed in Python or named: to be evaluated, scored or trained on.

They are rendered as the rows were that the adapters in use were trained on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.acting import score_head_of
from veneer.adapters.preamble import Preamble
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import RowKind, RowRef
from veneer.data.files.writing import ROWS_NAME, Record, as_set, is_rows
from veneer.data.load import DataSet, load_data
from veneer.data.teacher_text import TeacherText
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
    kind: RowKind = "answers",
    teacher: TeacherText | None = None,
) -> DataSet:
    """Loads a set of rows, of which none is held out, by the tokenizer of the acting adapters.

    data     the name of a set of rows, or the rows themselves, each a dict
    purpose  what the rows are used for, as errors name it
    kind     what the rows hold. teacher: text that a teacher reads besides each row
    With a score head the rows are texts with labels of that head.
    Raises DataError with every row that cannot be computed.
    """
    head = acting_head(base)
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
            RowRules(
                options.length,
                capacity_of(base),
                preamble,
                kind=kind if head is None else "labels",
                teacher=teacher,
                head=head,
            ),
            base.acting_tokenizer,
            purpose=purpose,
        )
    if not is_rows(data):
        return loaded
    rows = [replace(row, ref=RowRef(ROWS_NAME, row.ref.line)) for row in loaded.train_rows]
    examples = [replace(e, ref=RowRef(ROWS_NAME, e.ref.line)) for e in loaded.train]
    return replace(loaded, train=examples, train_rows=rows)


def acting_head(base: FrozenBase) -> HeadSettings | None:
    """Returns the settings of the score head that acts on all rows; None without one."""
    whole = base.routing.acting.whole
    score = None if whole is None else score_head_of(whole)
    return None if score is None else score.settings
