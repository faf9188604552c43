"""The calls before and behind the layers of a step: embedding, rotary angles, output head. They are
replayed together with those of the layers (recorded.py).

Works if the embedding is a plain table, the head a dense product, and a position's angles depend on
the position alone. The model's own module computes the tables of angles. Shapes: N rows of the
step, D width, E head size, V ids, P positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.attention.paged import Spans
from veneer.kernels.bindings import step_calls
from veneer.kernels.bindings.dense_calls import put_at
from veneer.kernels.dense import few_rows
from veneer.kernels.tape.step_tape import StepTape, record_step

INDEPENDENT_OF_LENGTH = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary angles (transformers' rope_type) that do not depend on the text's length."""
FIRST_POSITIONS = 512


class Ends:
    """Records the calls around the layers, and fills in each step's ids and positions.

    angles: function of (D-wide value, positions (1, P)) that returns cosines and sines (1, P, E).
    """

    def __init__(
        self, table: Tensor, weight: Tensor, bias: Tensor | None, angles: Callable[..., Any]
    ) -> None:
        self._table, self._weight, self._bias, self._angles = table, weight, bias, angles
        self._positions = 0
        self._cos = self._sin = table[:0]
        self._structs: tuple[Any, Any] | None = None
        self._columns = table[:0]  # kept while C reads them

    @classmethod
    def of(
        cls, embedding: nn.Module | None, head: tuple[Tensor, Tensor | None] | None, rotary: Any
    ) -> Ends | None:
        """Returns None if these parts are of another kind.

        embedding: the base's own module. head: weight and bias of a product that few_rows computes.
        """
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or head is None:
            return None
        table, (weight, bias) = embedding.weight, head
        plain = table.is_cpu and table.is_contiguous() and table.dtype is weight.dtype
        if not plain or getattr(rotary, "rope_type", None) not in INDEPENDENT_OF_LENGTH:
            return None
        ends = cls(table.detach(), weight.detach(), None if bias is None else bias.detach(), rotary)
        return ends if ends._extend_tables(FIRST_POSITIONS - 1) else None

    def record(self, tape: StepTape, inputs: Sequence[Tensor], states: Tensor) -> bool:
        """Adds the calls before and behind the layers to a tape. Returns False if a tape cannot
        hold them all.

        inputs: the first layer's. states: (N, D), the last layer's output.
        """
        rows, most = len(states), tape.memory.most_rows
        self._ids = array("q", bytes(8 * most))
        ids = torch.frombuffer(self._ids, dtype=torch.int64)
        spans = torch.zeros(most, 5, dtype=torch.int64)
        with record_step(tape.memory) as before:
            step_calls.step_inputs(
                ids[:rows], spans[:rows], self._table, self._cos, self._sin, *inputs
            )
        with record_step(tape.memory) as behind:
            few_rows.product(states, self._weight, self._bias)
        if before.unsupported_call is not None or behind.unsupported_call is not None:
            return False
        (first,), (last,) = before.structs("veneer_step_inputs"), behind.structs("veneer_few_rows")
        self._structs = first, last
        tape.enclose(before, behind)
        return True

    def take(self, ids: Sequence[int], spans: Spans) -> Tensor | None:
        """Prepares a step. Returns logits (N, V), which the next replay fills; None if a position
        is beyond the tables. ValueError: an id has no row."""
        assert self._structs is not None
        first, last = self._structs
        rows, farthest = len(ids), spans.farthest
        if min(ids) < 0 or max(ids) >= len(self._table):
            raise ValueError(f"an id without a row: the table has {len(self._table):,}")
        if farthest >= self._positions and not self._extend_tables(farthest):
            return None
        self._ids[:rows] = array("q", ids)
        self._columns = spans.row_columns
        first.spans, first.cos_table, first.sin_table = (
            self._columns.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
        )
        logits = torch.empty(rows, len(self._weight), dtype=self._weight.dtype)
        put_at(last, logits)
        return logits

    def _extend_tables(self, position: int) -> bool:
        """Computes tables up to a position. Returns False if a position's angles differ when they
        are computed alone."""
        count = FIRST_POSITIONS
        while count <= position:
            count *= 2
        any_value = self._table[:1, None]
        cos, sin = (
            table[0] for table in self._angles(any_value, position_ids=torch.arange(count)[None])
        )
        for alone in (0, count // 3, count - 1):
            angles = self._angles(any_value, position_ids=torch.tensor([[alone]]))
            if not all(
                torch.equal(angle[0, 0], table[alone])
                for angle, table in zip(angles, (cos, sin), strict=True)
            ):
                return False
        self._cos, self._sin, self._positions = cos.contiguous(), sin.contiguous(), count
        return cos.dtype is self._table.dtype
