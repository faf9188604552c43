"""The calls before and behind the layers of a step: embedding, positions, output head. They are
replayed together with those of the layers (recorded.py).

Works if the embedding is a table times a number, the head a dense product, and a position's angles
depend on the position alone. The model's own module computes the tables of angles; a table of
positions is read where it is. Shapes: N rows
of the step, D width, E head size, V ids, P positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.execution.facts.model_start import ModelStart
from veneer.kernels.attention.paged import Spans
from veneer.kernels.bindings import step_calls
from veneer.kernels.bindings.dense_calls import put_at
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.loss import Head
from veneer.kernels.tape.step_tape import StepTape, record_step
from veneer.linear import embedding_type

INDEPENDENT_OF_LENGTH = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary angles (transformers' rope_type) that do not depend on the text's length."""
FIRST_POSITIONS = 512


class Ends:
    """Records the calls around the layers, and fills in each step's ids and positions.

    table  (V, D), whose rows are multiplied by `scale` and given in `dtype`
    inner  the decoder, whose module computes what depends on the positions alone
    """

    def __init__(
        self,
        table: Tensor,
        dtype: torch.dtype,
        scale: float,
        head: Head,
        inner: nn.Module,
        start: ModelStart,
    ) -> None:
        self._table, self._dtype, self._scale, self._head = table, dtype, scale, head
        self._inner, self._start = inner, start
        self._positions = 0
        self._tables: list[Tensor] = []
        self._angle_structs: list[Any] = []
        self._logit_structs: list[Any] = []
        self._cap_structs: list[Any] = []
        self._columns = table[:0]  # kept while C reads them

    @classmethod
    def of(
        cls, embedding: nn.Embedding, scale: float, head: Head, inner: nn.Module, start: ModelStart
    ) -> Ends | None:
        """Returns None if these parts are of another kind.

        embedding: the base's own module. head: a product that few_rows computes.
        """
        table = embedding.weight
        row = table.new_empty(0, dtype=embedding_type(embedding))
        plain = table.is_cpu and table.is_contiguous()
        plain = plain and all(few_rows.multiplies(row, values) for values in (table, head.weight))
        positions = start.positions_module(inner)
        kinds = getattr(positions, "rope_type", None) if start.kinds else "default"
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if not plain or not kinds <= INDEPENDENT_OF_LENGTH:
            return None
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        own_head = Head(weight, bias, head.scale, head.softcap)
        ends = cls(table.detach(), row.dtype, scale, own_head, inner, start)
        return ends if ends._extend_tables(0) else None

    def record(self, tape: StepTape, inputs: Sequence[Tensor], states: Tensor) -> bool:
        """Adds the calls before and behind the layers to a tape. Returns False if a tape cannot
        hold them all.

        inputs: the embeddings, and what depends on positions. states: (N, D), the last layer's
        output.
        """
        rows, most = len(states), tape.memory.most_rows
        self._ids = array("q", bytes(8 * most))
        ids = torch.frombuffer(self._ids, dtype=torch.int64)
        spans = torch.zeros(most, 5, dtype=torch.int64)
        h, *of_positions = inputs
        targets = _in_pairs(of_positions)
        with record_step(tape.memory) as before:
            step_calls.step_embed(ids[:rows], self._table, h, self._scale)
            for tables, own in zip(_in_pairs(self._tables), targets, strict=True):
                step_calls.step_angles(spans[:rows], *tables, *own)
        with record_step(tape.memory) as behind:
            logits = few_rows.product(states, self._head.weight, self._head.bias)
            decoder_step.cap(logits, self._head.scale, self._head.softcap)
        if before.unsupported_call is not None or behind.unsupported_call is not None:
            return False
        self._angle_structs = before.structs("veneer_step_angles")
        self._logit_structs = behind.structs("veneer_few_rows")
        self._cap_structs = behind.structs("veneer_step_cap")
        tape.enclose(before, behind)
        return True

    def take(self, ids: Sequence[int], spans: Spans) -> Tensor | None:
        """Prepares a step. Returns logits (N, V), which the next replay fills; None if a position
        is beyond the tables. ValueError: an id has no row."""
        assert self._logit_structs
        rows, farthest = len(ids), spans.farthest
        if min(ids) < 0 or max(ids) >= len(self._table):
            raise ValueError(f"an id without a row: the table has {len(self._table):,}")
        if farthest >= self._positions and not self._extend_tables(farthest):
            return None
        self._ids[:rows] = array("q", ids)
        self._columns = spans.row_columns
        for struct, tables in zip(self._angle_structs, _in_pairs(self._tables), strict=True):
            struct.spans = self._columns.data_ptr()
            struct.cos_table, struct.sin_table = (table.data_ptr() for table in tables)
        weight = self._head.weight
        logits = torch.empty(rows, len(weight), dtype=self._dtype)
        put_at(self._logit_structs[0], logits)
        for struct in self._cap_structs:
            struct.x = logits.data_ptr()
        return logits

    def _extend_tables(self, position: int) -> bool:
        """Computes tables up to a position. Returns False if a position's angles differ when they
        are computed alone, or are of a type that heads are not rotated by, or if the model has no
        such position."""
        if self._start.has_table:
            table = self._start.table(self._inner).detach().to(self._dtype)
            self._tables, self._positions = [table], len(table)
            return table.is_contiguous() and position < len(table)
        if not self._start.kinds:
            self._positions = position + 1
            return True
        count = FIRST_POSITIONS
        while count <= position:
            count *= 2
        any_value = self._table[:1, None].to(self._dtype)
        tables = self._start.of_positions(self._inner, any_value, torch.arange(count)[None])
        for alone in (0, count // 3, count - 1):
            angles = self._start.of_positions(self._inner, any_value, torch.tensor([[alone]]))
            if not all(
                torch.equal(angle[0, 0], table[0, alone])
                for angle, table in zip(angles, tables, strict=True)
            ):
                return False
        self._tables, self._positions = [table[0].contiguous() for table in tables], count
        types = {self._dtype, torch.float32}
        return all(table.dtype in types for table in self._tables)


def _in_pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns cosines and sines of each kind; a single table twice, as one call copies two rows."""
    if len(tensors) == 1:
        return [(tensors[0], tensors[0])]
    return list(zip(tensors[::2], tensors[1::2], strict=True))
