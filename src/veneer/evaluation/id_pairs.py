"""Rows that are given as token ids: a context, and the continuation that is scored."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from veneer.bounds import TOKEN
from veneer.data.checks.check import refuse_beyond
from veneer.data.examples import Example, RowRef
from veneer.data.files.writing import ROWS_NAME
from veneer.errors import DataError
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase

IdPair = tuple[Sequence[int], Sequence[int]]
"""Context and continuation, each at least one id; no chat template is applied."""


def id_pairs(rows: Any) -> list[IdPair] | None:
    """Returns rows that are pairs of ids; None if they are rows of text.

    Raises DataError with every row that is not such a pair, if the first one is a tuple.
    """
    if not (isinstance(rows, list) and rows and isinstance(rows[0], tuple)):
        return None
    if faults := [f"row {number}" for number, row in enumerate(rows, 1) if not _is_pair(row)]:
        raise DataError(
            "rows that are not pairs of token ids",
            faults[:10],
            "Give (context ids, continuation ids), each with at least one id.",
        )
    return rows


def _is_pair(row: Any) -> TypeGuard[IdPair]:
    return (
        isinstance(row, tuple)
        and len(row) == 2
        and all(isinstance(ids, Sequence) and ids and TOKEN.holds_ints(ids) for ids in row)
    )


def pair_examples(base: FrozenBase, pairs: Sequence[IdPair], *, length: int) -> list[Example]:
    """Makes an example of each pair, whose continuation is scored.

    Raises DataError for pairs that are longer than `length`, or that the model cannot compute.
    """
    examples = []
    for number, (context, continuation) in enumerate(pairs, 1):
        ids = np.array([*context, *continuation], dtype=np.int32)
        scored = np.arange(len(ids)) >= len(context)
        examples.append(Example(ids, scored, RowRef(ROWS_NAME, number), number))
    long = [f"{e.ref}: {len(e.ids):,} tokens" for e in examples if len(e.ids) > length]
    if long:
        raise DataError(f"rows are longer than {length:,} tokens", long[:10], "Raise length.")
    capacity = capacity_of(base)
    refuse_beyond("these rows cannot be scored", examples, capacity, base.acting_tokenizer)
    return examples
