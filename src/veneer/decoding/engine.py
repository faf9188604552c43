"""Many requests, each with adapters of its own, answered in the same forwards: the scheduler's plans, computed.

    add        a request waits
    step       one plan: prefixes written, blocks copied, the spans' tokens through the model, a token drawn for each
    cancel     an answer ends with the tokens it has
    run        steps until nothing is left

Decides nothing about order, room or sharing (decoding/scheduler.py), and nothing about texts. One thread calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.adapters.acting import Acting, in_step
from veneer.decoding.adapters import Adapters, prefixes
from veneer.decoding.blocks import BlockManager, Front
from veneer.decoding.direct import Way
from veneer.decoding.draws import Drawing, draw
from veneer.decoding.paged import PagedKeys, PagedStep
from veneer.decoding.scheduler import Limits, Scheduler
from veneer.decoding.sequence import Request
from veneer.decoding.sequence import Sequence as Answer
from veneer.decoding.step_plan import Plan, Span
from veneer.errors import ConfigError
from veneer.kernels.layout import round_up
from veneer.kernels.paged_attention import SpanRows
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase


class Engine:
    """budget_bytes: of keys and values. adapters: those that requests may name.

    ConfigError: the base's attention is not Veneer's, so that blocks would not reach it.
    """

    def __init__(
        self, base: FrozenBase, *, budget_bytes: int, adapters: Adapters, limits: Limits | None = None
    ) -> None:
        if (reason := base.paths.packed_reason) is not None:
            raise ConfigError("this base answers one request after another", [reason], "Use base.generate.")
        self.base, self._adapters = base, adapters
        blocks = BlockManager(
            base=base.fingerprint().weights_hash, budget_bytes=budget_bytes, bytes_per_token=bytes_per_token(base)
        )
        self.scheduler = Scheduler(blocks, limits or Limits(), adapters)
        with base.routing.held(Acting()):
            self.way = Way(base.model)
        self._keys = PagedKeys(blocks.num_blocks, blocks.tokens_per_block)
        self._drawings: dict[int, Drawing] = {}
        self._ids = capacity_of(base).tokens
        self._acting: tuple[Any, Acting] | None = None

    def add(self, request: Request) -> tuple[Answer, ...]:
        """It waits. ConfigError: an id without a row; and what Adapters.expect and Scheduler.add raise."""
        ids = (*request.prompt, *(token for token, _ in request.sampling.logit_bias))
        if self._ids is not None and (most := max(ids)) >= self._ids:
            raise ConfigError(f"the request holds token {most}, and the model has rows for {self._ids:,}")
        if request.adapter:
            self._adapters.expect(request.adapter)
        return self.scheduler.add(request)

    def cancel(self, answer: Answer) -> None:
        """It ends with the tokens it has, and its blocks are free: the next step tells."""
        self.scheduler.cancel(answer)

    def run(self) -> list[Answer]:
        """Steps until nothing is left: all that ended, in the order in which they did."""
        ended: list[Answer] = []
        while not self.scheduler.idle:
            ended += self.step(0.0)
        return ended

    @torch.no_grad()
    def step(self, now: float) -> list[Answer]:
        """One step; returns the answers that have ended."""
        plan = self.scheduler.step(now)
        if not plan.spans:
            return self._let_go([*plan.ended, *self.scheduler.finish_step({})])
        for front in plan.fronts:
            self._write(front)
        self._keys.copy(plan.copies)
        answers = [answer for span in plan.spans for answer in span.draws]
        rows = [n for n, span in enumerate(plan.spans) for _ in span.draws]
        logits = self._logits(plan)
        if rows != list(range(len(plan.spans))):
            logits = logits[rows]
        drawn = draw(logits, [(self._drawing(answer), answer.new) for answer in answers]) if rows else []
        results = dict(zip((answer.number for answer in answers), drawn, strict=True))
        return self._let_go([*plan.ended, *self.scheduler.finish_step(results)])

    def _drawing(self, answer: Answer) -> Drawing:
        if answer.number not in self._drawings:
            self._drawings[answer.number] = Drawing(answer.request, answer.choice)
        return self._drawings[answer.number]

    def _let_go(self, ended: list[Answer]) -> list[Answer]:
        for answer in ended:
            self._drawings.pop(answer.number, None)
        if self.scheduler.idle:
            self._acting = None  # adapters may go
        return ended

    def _logits(self, plan: Plan) -> Tensor:
        """(spans, V): what follows the last token of each span."""
        device = self.base.device
        ids = [token for span in plan.spans for token in span.tokens]
        positions = [place for span in plan.spans for place in range(span.start, span.stop)]
        ends = torch.tensor([span.stop - span.start for span in plan.spans]).cumsum(0) - 1
        filler = round_up(len(ids)) - len(ids) if len(ids) > len(plan.spans) else 0
        rows = torch.tensor([each + [0] * filler for each in (ids, positions)], device=device)
        laid = PagedStep(self._keys, [_rows(span) for span in plan.spans])
        kept = ends.to(device)
        with self.base.routing.held(self._acting_of(plan, filler).keeping(kept)):
            return self.way.logits(rows, laid, kept)

    def _acting_of(self, plan: Plan, filler: int) -> Acting:
        """The same value, with what it prepared, for as long as the same adapters have the same numbers of rows."""
        parts = [(count, self._adapters.applied(each) if each else ()) for each, count in plan.parts]
        if self._acting is None or self._acting[0] != (parts, filler):
            before = None if self._acting is None else self._acting[1]
            self._acting = (parts, filler), in_step(parts, before).padded(filler)
        return self._acting[1]

    def _write(self, front: Front) -> None:
        """A trained prefix into its blocks."""
        (prefix,) = prefixes(self._adapters.applied(front.adapter))
        for number, (key, value) in prefix.keys().items():
            self._keys.write(number, front.blocks, key, value)


def _rows(span: Span) -> SpanRows:
    table = span.sequence.table
    assert table is not None
    return SpanRows(span.start, span.stop, table.blocks, table.front, table.front_places)


def bytes_per_token(base: FrozenBase) -> int:
    """Of the keys and values of one token in all layers."""
    text = base.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * base.dtype.itemsize)
