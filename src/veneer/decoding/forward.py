"""A model's forwards over keys and values in blocks: a scheduler's plans, computed.

Knows nothing of requests and draws. Which adapters act is the caller's to hold.
Shapes: N rows of the step: the spans' tokens, one span behind the other, then filler; V ids.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.methods.prefix_layer import PrefixLayer
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.decoding.direct import Again, Run
from veneer.decoding.graphs import Graphs, recorder_here
from veneer.decoding.paged import PagedKeys, PagedStep
from veneer.decoding.schedule.blocks import BlockManager, PrefixWrite
from veneer.decoding.schedule.step_plan import Span, StepPlan
from veneer.kernels.attention.paged import SpanRows
from veneer.kernels.dense import few_rows
from veneer.kernels.layout import round_up
from veneer.kernels.upload import sent

NOBODY = Acting()


@dataclass(frozen=True)
class StepRows:
    """What a plan computes, on the device.

    rows    (2, N) ids and positions; of single tokens on CUDA, (N, columns), what
            decoding/graphs.py reads; None: those of a plan that follows the last one, which are
            known
    filler  rows behind the spans, so that there are few shapes (kernels/layout.py); none where all
            are single tokens, nor where the model's parts are called, whose kernels know no shapes
    kept    (spans) numbers of the rows that are the last of their spans; None: all rows are
    single  whether it is one for decoding/graphs.py
    """

    rows: Tensor | None
    filler: int
    kept: Tensor | None
    single: bool = False


FOLLOWING = StepRows(None, 0, None)
SPARE = 4
"""Blocks by which a table may grow before a step's tables are laid out anew."""


class PagedForward:
    """run: a model's forward, proven (decoding/proof.py, decoding/direct.py). blocks: what its
    tables number. filled: whether rows are filled up. again: the same of single tokens, one further
    than the last, where it can. keys: of another forward over the same blocks, which has the graphs
    then; None: its own."""

    def __init__(
        self,
        device: torch.device,
        blocks: BlockManager,
        run: Run,
        *,
        filled: bool = True,
        again: Again | None = None,
        keys: PagedKeys | None = None,
    ) -> None:
        self._device, self._run, self._filled, self._again = device, run, filled, again
        on_cuda = device.type == "cuda"
        # One block more for rows that fill up.
        self.keys = (
            PagedKeys(blocks.num_blocks + on_cuda, blocks.tokens_per_block)
            if keys is None
            else keys
        )
        self.graphs = (
            Graphs(device, self.keys, run, recorder_here()) if on_cuda and keys is None else None
        )
        self._last: tuple[int, PagedStep] | None = (
            None  # of the last plan, which had single tokens alone
        )

    def rows(self, plan: StepPlan) -> StepRows:
        if self._last is not None and plan.follows == self._last[0]:
            return FOLLOWING
        if self.graphs is not None and (inputs := self.graphs.inputs(plan)) is not None:
            return StepRows(inputs, len(inputs) - len(plan.spans), None, single=True)
        return self._rows(plan)

    def _rows(self, plan: StepPlan) -> StepRows:
        ids = [token for span in plan.spans for token in span.tokens]
        positions = [place for span in plan.spans for place in range(span.start, span.stop)]
        if len(ids) == len(plan.spans):
            return StepRows(sent(torch.tensor([ids, positions]), self._device), 0, None)
        filler = round_up(len(ids)) - len(ids) if self._filled else 0
        rows = sent(torch.tensor([each + [0] * filler for each in (ids, positions)]), self._device)
        ends = torch.tensor([span.stop - span.start for span in plan.spans]).cumsum(0) - 1
        return StepRows(rows, filler, sent(ends, self._device))

    def logits(self, plan: StepPlan, step: StepRows, acting: Acting = NOBODY) -> Tensor:
        """(spans, V): what follows the last token of each span. Prefixes are written and blocks
        copied before.

        acting: what the caller holds; its mix, where it is listed, is for decoding/recorded.py.
        """
        last, self._last = self._last, None
        if step.rows is None:
            assert last is not None
            laid = last[1]
            ids = [span.sequence.new[-1] for span in plan.spans]
            going = self._again is not None and laid.go_on(acting.plan.mix)
            if self._again is not None and going and (found := self._again(ids, laid)) is not None:
                self._last = plan.number, laid
                return found
            step = self._rows(plan)
        assert step.rows is not None
        self.keys.copy(plan.copies)
        if self.graphs is not None and step.single:
            return self.graphs.logits(step.rows, acting)[: len(plan.spans)]
        laid = PagedStep(
            self.keys, [_rows(span) for span in plan.spans], acting.plan.mix, spare=SPARE
        )
        with few_rows.any_rows():  # what an answer says does not depend on the others of its step
            logits = self._run(step.rows, laid, step.kept)
        if len(logits) != len(plan.spans):
            raise ValueError(
                f"asked for {len(plan.spans)} rows of logits, the model gives {len(logits)}"
            )
        if step.kept is None and self._again is not None:
            self._last = plan.number, laid
        return logits

    def write(self, front: PrefixWrite, prefix: PrefixLayer) -> None:
        """A trained prefix into its blocks."""
        for number, (key, value) in prefix.keys().items():
            self.keys.write(number, front.blocks, key, value)

    def let_go(self, held: Collection[Attachment]) -> None:
        """No other adapters act from now on."""
        if self.graphs is not None:
            self.graphs.let_go(held)


def _rows(span: Span) -> SpanRows:
    table = span.sequence.table
    assert table is not None
    return SpanRows(span.start, span.stop, table.blocks, table.front, table.front_places)
