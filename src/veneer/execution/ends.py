"""What stands around the layers of a step: rows of the embedding, angles of its places, the output
head; as calls that are replayed together with those of the layers (recorded.py).

Only where the embedding is a plain table, the head a dense product, and the angles of a place
depend on nothing else: their tables are made by the model's own module. Shapes: N rows of the step,
D width, E head size, V ids, P places.
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

OF_THE_PLACE_ALONE = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary angles (transformers' rope_type) that no length changes."""
FIRST_PLACES = 512


class Ends:
    """angles: (D-wide value, places (1, P)) -> cosines and sines (1, P, E). states: (N, D), what
    the layers give."""

    def __init__(
        self, table: Tensor, weight: Tensor, bias: Tensor | None, angles: Callable[..., Any]
    ) -> None:
        self._table, self._weight, self._bias, self._angles = table, weight, bias, angles
        self._places = 0
        self._cos = self._sin = table[:0]
        self._structs: tuple[Any, Any] | None = None

    @classmethod
    def of(
        cls, embedding: nn.Module | None, head: tuple[Tensor, Tensor | None] | None, rotary: Any
    ) -> Ends | None:
        """embedding: the base's own module; head: weight and bias of a product that few_rows
        computes. None: they are of another kind."""
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or head is None:
            return None
        table, (weight, bias) = embedding.weight, head
        plain = table.is_cpu and table.is_contiguous() and table.dtype is weight.dtype
        if not plain or getattr(rotary, "rope_type", None) not in OF_THE_PLACE_ALONE:
            return None
        made = cls(table.detach(), weight.detach(), None if bias is None else bias.detach(), rotary)
        return made if made._reach(FIRST_PLACES - 1) else None

    def record(self, tape: StepTape, own: Sequence[Tensor], states: Tensor) -> bool:
        """Adds the calls before the layers, into what the first of these takes, and behind them,
        from what the last gives. Returns False if a tape cannot hold all of it."""
        rows, most = len(states), tape.memory.most_rows
        self._ids = array("q", bytes(8 * most))
        ids = torch.frombuffer(self._ids, dtype=torch.int64)
        spans = torch.zeros(most, 5, dtype=torch.int64)
        with record_step(tape.memory) as before:
            step_calls.step_inputs(
                ids[:rows], spans[:rows], self._table, self._cos, self._sin, *own
            )
        with record_step(tape.memory) as behind:
            few_rows.product(states, self._weight, self._bias)
        if before.unsupported_call is not None or behind.unsupported_call is not None:
            return False
        (inputs,), (head,) = before.structs("veneer_step_inputs"), behind.structs("veneer_few_rows")
        self._structs = inputs, head
        tape.enclose(before, behind)
        return True

    def take(self, ids: Sequence[int], spans: Spans) -> Tensor | None:
        """(N, V), which the next call fills. None: a place too far for the tables. ValueError: an
        id without a row."""
        assert self._structs is not None
        first, last = self._structs
        rows, farthest = len(ids), spans.farthest
        if min(ids) < 0 or max(ids) >= len(self._table):
            raise ValueError(f"an id without a row: the table has {len(self._table):,}")
        if farthest >= self._places and not self._reach(farthest):
            return None
        self._ids[:rows] = array("q", ids)
        first.spans, first.cos_table, first.sin_table = (
            spans.columns.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
        )
        logits = torch.empty(rows, len(self._weight), dtype=self._weight.dtype)
        put_at(last, logits)
        return logits

    def _reach(self, place: int) -> bool:
        """Tables up to this place. False: the angles of one are not those that it has alone."""
        most = FIRST_PLACES
        while most <= place:
            most *= 2
        any_value = self._table[:1, None]
        cos, sin = (
            each[0] for each in self._angles(any_value, position_ids=torch.arange(most)[None])
        )
        for alone in (0, most // 3, most - 1):
            own = self._angles(any_value, position_ids=torch.tensor([[alone]]))
            if not all(
                torch.equal(each[0, 0], all_[alone])
                for each, all_ in zip(own, (cos, sin), strict=True)
            ):
                return False
        self._cos, self._sin, self._places = cos.contiguous(), sin.contiguous(), most
        return cos.dtype is self._table.dtype
