"""Computes a scheduler's plans: a model's forwards over keys and values in blocks.

The caller holds the adapters that act. This module knows nothing of requests and draws. Shapes: N
rows of the step: the tokens of all spans in order, then filler; V ids.
"""

from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from veneer.adapters.methods.prefix_layer import PrefixLayer
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.decoding.schedule.blocks import BlockManager, PrefixWrite
from veneer.decoding.schedule.step_plan import Span, StepPlan
from veneer.execution.cuda_graphs import HEAD, Graphs, recorder_here
from veneer.execution.decode_step import Replay
from veneer.execution.paged import PagedKeys, PagedStep
from veneer.execution.proofs.steps import Run
from veneer.execution.states import StateSlots
from veneer.kernels.attention.paged import SpanRows
from veneer.kernels.dense import few_rows
from veneer.kernels.layout import round_up
from veneer.kernels.upload import sent

NOBODY = Acting()


@dataclass(frozen=True)
class StepRows:
    """The rows of a plan, on the device.

    rows    (2, N) ids and positions; for single tokens on CUDA (N, columns), as
            execution/cuda_graphs.py reads them; None: the plan follows the last one, whose rows are
            known
    filler  rows after the spans, so that there are few shapes (kernels/layout.py); 0 if all spans
            are single tokens, or the kernels need no fixed shapes
    kept    numbers of the rows whose logits are computed; None: all rows
    single  whether execution/cuda_graphs.py computes it
    """

    rows: Tensor | None
    filler: int
    kept: Tensor | None
    single: bool = False


FOLLOWING = StepRows(None, 0, None)
FEWEST_BLOCKS = 16
"""Of a table that a graph reads."""
SPARE = 4
"""Blocks by which a table may grow before a step's tables are laid out again."""


class PagedForward:
    """Runs the forwards of one lane.

    run     a model's proven forward (decoding/proof.py, execution/decode_step.py)
    blocks  the blocks that tables refer to
    filled  whether rows are filled up to few shapes
    replay  runs a step whose rows all have logits, if it is recorded
    keys    storage shared with another forward, which then has the graphs; None: its own
    states  of layers that pass them from token to token; the spans of a plan then have equally many
            rows and logits (equal_parts)
    """

    def __init__(
        self,
        device: torch.device,
        blocks: BlockManager,
        run: Run,
        *,
        filled: bool = True,
        replay: Replay | None = None,
        keys: PagedKeys | None = None,
        states: StateSlots | None = None,
    ) -> None:
        self._device, self._run, self._filled, self._replay = device, run, filled, replay
        self._states, on_cuda = states, device.type == "cuda" and states is None
        # One more block for filler rows.
        self.keys = (
            PagedKeys(blocks.num_blocks + on_cuda, blocks.tokens_per_block)
            if keys is None
            else keys
        )
        self.graphs = (
            Graphs(device, self.keys, run, recorder_here()) if on_cuda and keys is None else None
        )
        self._last: tuple[int, PagedStep] | None = None  # set if its spans were single tokens

    def rows(self, plan: StepPlan) -> StepRows:
        if self._last is not None and plan.follows == self._last[0]:
            spans = self._last[1].spans.spans  # perhaps of a part of its plan (equal_parts)
            if len(spans) == len(plan.spans):
                return FOLLOWING
        if self.graphs is None or _state_reader(plan) is not None:
            return self._rows(plan)
        inputs = _single_tokens(plan, self.keys.num_blocks - 1, self._device)
        if inputs is not None:
            return StepRows(inputs, len(inputs) - len(plan.spans), None, single=True)
        return self._rows(plan)

    def _rows(self, plan: StepPlan) -> StepRows:
        ids = [token for span in plan.spans for token in span.tokens]
        positions = [
            place for span in plan.spans for place in range(span.start, span.start + span.rows)
        ]
        if len(ids) == sum(span.logits for span in plan.spans):
            return StepRows(sent(torch.tensor([ids, positions]), self._device), 0, None)
        filler = round_up(len(ids)) - len(ids) if self._filled else 0
        rows = sent(
            torch.tensor([column + [0] * filler for column in (ids, positions)]), self._device
        )
        stops = accumulate(span.rows for span in plan.spans)
        kept = [
            row
            for span, stop in zip(plan.spans, stops, strict=True)
            for row in range(stop - span.logits, stop)
        ]
        return StepRows(rows, filler, sent(torch.tensor(kept), self._device))

    def logits(self, plan: StepPlan, step: StepRows, acting: Acting = NOBODY) -> Tensor:
        """Returns the logits (rows, V) of each span (Span.logits). Prefixes must be written before.

        acting: what the caller holds; execution/recorded.py reads its mix of adapters.
        """
        last, self._last = self._last, None
        replay = self._replay
        states = None if self._states is None else self._states.begin(_texts(plan))
        if step.rows is None:
            assert last is not None
            paged_step = last[1]
            paged_step.states = states
            if replay is not None and paged_step.go_on(acting.plan.mix):
                ids = [span.sequence.new[-1] for span in plan.spans]
                if (logits := replay(ids, paged_step)) is not None:
                    self._last = plan.number, paged_step
                    return logits
                replay = None
            step = self._rows(plan)
        assert step.rows is not None
        for copy in plan.copies:
            self.keys.copy(copy.source, copy.target)
        if self.graphs is not None and step.single:
            return self.graphs.logits(step.rows, acting)[: len(plan.spans)]
        take_states = _state_reader(plan)
        paged_step = PagedStep(
            self.keys,
            [_rows(span) for span in plan.spans],
            acting.plan.mix,
            spare=SPARE,
            take_states=take_states,
            states=states,
        )
        logits = None
        if step.kept is None and replay is not None and take_states is None:
            logits = replay(step.rows[0].tolist(), paged_step)
        if logits is None:
            with few_rows.any_rows():  # answers do not depend on other rows of their step
                logits = self._run(step.rows, paged_step, step.kept)
        if len(logits) != (count := sum(span.logits for span in plan.spans)):
            raise ValueError(f"asked for {count} rows of logits, the model gives {len(logits)}")
        if all(span.rows == 1 for span in plan.spans) and self._replay is not None:
            self._last = plan.number, paged_step
        return logits

    def write(self, prefix_write: PrefixWrite, prefix: PrefixLayer) -> None:
        """Writes a trained prefix into its blocks."""
        for number, (key, value) in prefix.keys().items():
            self.keys.write(number, prefix_write.blocks, key, value)

    def let_go(self, held: Collection[Attachment]) -> None:
        """Drops references to all other adapters."""
        if self.graphs is not None:
            self.graphs.let_go(held)


def _state_reader(plan: StepPlan) -> Callable[[Tensor], None] | None:
    """Returns a function that passes the states (N, D) of a step's rows on to the requests that
    read their prompt's states; None if no request of this step does."""
    if all(span.sequence.request.prompt_states is None for span in plan.spans):
        return None
    parts: list[tuple[Callable[[int, Tensor], None], int, int, int]] = []
    row = 0
    for span in plan.spans:
        request = span.sequence.request
        count = min(span.stop, len(request.prompt)) - span.start
        if request.prompt_states is not None and count > 0:
            parts.append((request.prompt_states, span.start, row, count))
        row += span.rows
    if not parts:
        return None

    def pass_on(states: Tensor) -> None:
        for read, start, row, count in parts:
            read(start, states[row : row + count])

    return pass_on


def equal_parts(plan: StepPlan) -> list[StepPlan]:
    """Divides a plan into plans whose spans have equally many rows and logits."""
    return [
        part_of(plan, numbers, is_first=not place)
        for place, numbers in enumerate(equal_spans(plan))
    ]


def equal_spans(plan: StepPlan) -> list[list[int]]:
    """Returns the numbers of a plan's spans, divided like this."""
    parts: dict[tuple[int, int], list[int]] = {}
    for number, span in enumerate(plan.spans):
        parts.setdefault((span.rows, span.logits), []).append(number)
    return list(parts.values())


def part_of(plan: StepPlan, numbers: Sequence[int], *, is_first: bool) -> StepPlan:
    """Returns a plan of some of the spans. Blocks are copied once, before the first forward writes
    into them."""
    spans = tuple(plan.spans[n] for n in numbers)
    return replace(plan, spans=spans, copies=plan.copies if is_first else ())


def _texts(plan: StepPlan) -> list[tuple[int, int]]:
    return [(span.sequence.number, span.start) for span in plan.spans]


def _rows(span: Span) -> SpanRows:
    table = span.sequence.table
    assert table is not None
    return SpanRows(
        span.start, span.start + span.rows, table.blocks, table.prefix_blocks, table.prefix_length
    )


def _single_tokens(plan: StepPlan, nobody: int, device: torch.device) -> Tensor | None:
    """Returns (N, HEAD + B), a padded step of single tokens for a graph.

    None: another step, or one with a trained prefix. nobody: the block that rows which fill up
    read.
    """
    tables = [span.sequence.table for span in plan.spans]
    if any(table is None or table.prefix_blocks for table in tables) or not tables:
        return None
    if any(span.rows != 1 for span in plan.spans):
        return None
    blocks = [[] if table is None else table.blocks for table in tables]
    B = max(FEWEST_BLOCKS, _power(max(map(len, blocks))))
    filler = _power(len(blocks)) - len(blocks)
    rows = array("q")
    for span, own in zip(plan.spans, blocks, strict=True):
        rows.extend((*span.tokens, span.start, span.stop))
        rows.extend(own)
        rows.frombytes(bytes(8 * (B - len(own))))
    rows.extend(array("q", (0, 0, 1, nobody, *[0] * (B - 1))) * filler)
    return sent(torch.frombuffer(rows, dtype=torch.int64).view(-1, HEAD + B), device)


def _power(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
