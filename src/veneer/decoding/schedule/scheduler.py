"""Chooses which tokens of which sequences the next step computes.

    add, cancel     between steps or during one
    step(now)       plans a step: spans of tokens, grouped by adapter, and blocks to copy before
    step_alone      plans one sequence's part of a step that failed
    finish_step     takes the drawn tokens and ends sequences that are done
    undo_step       discards a plan that was not computed; the next one may be smaller

In a step, decoding sequences get their token first, then prompts are read in chunks, the oldest
first, then waiting sequences start by priority and age. A sequence whose adapter is not loaded yet
blocks no other one; one that waits for an adapter's place is overtaken a bounded number of times
(adapter_places.py). When blocks run out, the youngest sequence is preempted and read again later.

Deterministic: no clock, no random numbers, one calling thread. The scheduler knows nothing of
models, tensors and texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from veneer.bounds import COUNT, TIME, check_numbers
from veneer.decoding.schedule.adapter_places import AdapterPlaces
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockCopy, BlockManager, PrefixWrite
from veneer.decoding.schedule.guessed_spans import guessed_spans
from veneer.decoding.schedule.limits import Limits, check_fits, most_tokens
from veneer.decoding.schedule.lookup import Lookup
from veneer.decoding.schedule.queues import SequenceQueues
from veneer.decoding.schedule.sequence import FinishReason, Request, Sequence, SequenceState
from veneer.decoding.schedule.step_plan import (
    SampledToken,
    SampleResult,
    Span,
    StepPlan,
    StepResult,
)
from veneer.errors import DoesNotFitError, QueueFullError, VeneerError

if TYPE_CHECKING:
    from veneer.decoding.sampling.sampling import TokenChance
    from veneer.decoding.schedule.adapters import AdapterSource


class Scheduler:
    """The queue of sequences and the blocks of those that run.

    blocks     used by this scheduler only
    adapters   asked once a step for each adapter that a sequence waits for, and held for every
               sequence that has blocks
    positions  number of positions of the model; None: no limit
    lookup     guesses the next tokens of answers; None: nothing is guessed
    """

    def __init__(
        self,
        blocks: BlockManager,
        limits: Limits,
        adapters: AdapterSource,
        *,
        positions: int | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self.blocks, self.limits, self.positions = blocks, limits, positions
        self._adapters, self._lookup = adapters, lookup
        self._queues = SequenceQueues(blocks, adapters)
        self._cancelled: list[Sequence] = []  # during the current step
        self._plan: StepPlan | None = None
        self._last: StepPlan | None = None
        """The last plan, if it was one token of every running sequence and nothing else."""
        self._count = self._plans = 0

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with blocks, in order."""
        return tuple(self._queues.running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences without blocks, next to run first, then choices that wait for their prompt."""
        return self._queues.without_blocks

    @property
    def idle(self) -> bool:
        """Whether nothing is left to compute or to report."""
        return self._queues.empty

    def wanted(self) -> list[Identity]:
        """Adapters of waiting sequences, next needed first: these can be loaded ahead."""
        return self._queues.wanted()

    def in_use(self) -> Counter[Identity]:
        """Returns the number of sequences that have not ended, by adapter, the base included."""
        return Counter(s.request.adapter for s in (*self._queues.running, *self.waiting))

    def max_positions(self, prefix_length: int = 0, *, prompt_only: bool = False) -> int:
        """Returns the most tokens of a prompt and its answer, behind an adapter's prefix of
        `prefix_length` tokens. Any thread may call this. prompt_only: as in Request."""
        return most_tokens(self.blocks, self.positions, prefix_length, prompt_only=prompt_only)

    def add(self, request: Request) -> tuple[Sequence, ...]:
        """Queues a request: one sequence per choice.

        Raises DoesNotFitError if it can never run, and QueueFullError if too many wait.
        """
        check_fits(request, self.blocks, self.positions, prefix_length=0)
        if (most := self.limits.max_adapters) < len(request.adapter):
            raise DoesNotFitError(
                f"{len(request.adapter)} adapters are to act together, at most {most} can"
            )
        if (most := self.limits.max_waiting) < request.choices:
            raise DoesNotFitError(f"{request.choices} choices requested, at most {most} can wait")
        waiting = sum(s.state is SequenceState.WAITING for s in self.waiting)
        if waiting + request.choices > self.limits.max_waiting:
            raise QueueFullError(waiting, self.limits.max_waiting)
        sequences = []
        for choice in range(request.choices):
            chain = self.blocks.chain(request.adapter, request.salt, request.acts_from)
            sequences.append(Sequence(self._count, request, choice, chain))
            self._count += 1
        self._queues.wait(sequences[0], sequences[1:])
        return tuple(sequences)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence now, or with the current step. The next `step` or `finish_step` reports
        it."""
        if sequence.state is SequenceState.FINISHED or sequence.cancelled:
            return
        sequence.cancelled = True
        if self._plan is None:
            self._queues.end(sequence, FinishReason.CANCELLED)
        else:
            self._cancelled.append(sequence)

    def step(self, now: float, *, most_tokens: int | None = None) -> StepPlan:
        """Plans the next step. It has no spans if all sequences wait for adapters or have ended.

        Call `finish_step` or `undo_step` before the next plan.

        now          seconds on the clock of arrivals and deadlines
        most_tokens  a lower limit than step_tokens, for this step
        """
        check_numbers(now=(TIME, now), most_tokens=(COUNT, most_tokens))
        assert self._plan is None, "the last step has not been finished"
        self._end_late(now)
        last, self._last = self._last, None
        may_repeat = most_tokens is None and not self._queues.waiting
        if may_repeat and (plan := self._plan_guesses()):
            return plan
        if last is not None and may_repeat and (plan := self._plan_next_tokens(last)):
            return plan
        places = self._queues.ask_adapters()
        takes: dict[Sequence, int] = {}
        tokens = min(self.limits.step_tokens, most_tokens or self.limits.step_tokens)
        tokens = self._continue_running(tokens, takes)
        if tokens and len(self._queues.running) < self.limits.rows:
            self._start_waiting(tokens, takes, places)
        self._forget_removed_adapters()
        order = [s for s in self._queues.running if s in takes]
        order.sort(key=lambda s: (s.acting, takes[s] > 1))
        spans = tuple(self._span(s, takes[s]) for s in order)
        return self._new_plan(spans, self.blocks.prefix_writes, self.blocks.copies)

    def step_alone(self, sequence: Sequence) -> StepPlan:
        """Plans one running sequence's part of a step that failed. Has no spans if the sequence is
        preempted instead."""
        assert self._plan is None, "the last step has not been finished"
        if not self._queues.make_room(sequence):
            return self._new_plan((), (), ())
        assert sequence.table is not None
        take = min(sequence.unread, self.limits.chunk_tokens)
        prefix_writes, copies = self.blocks.pending(sequence.table)
        return self._new_plan((self._span(sequence, take),), prefix_writes, copies)

    def finish_step(
        self,
        results: Mapping[int, StepResult],
        scores: Mapping[int, list[TokenChance]] | None = None,
    ) -> tuple[Sequence, ...]:
        """Takes the results of the plan and returns the sequences that have ended.

        scores    of each span with `scored` tokens, by sequence number
        results   the result of every sequence in the plan's `draws`, by sequence number. A sequence
                  that was cancelled meanwhile gets no token.
        """
        assert self._plan is not None, "no step is in progress"
        drawing = {s.number for span in self._plan.spans for s in span.draws}
        assert results.keys() == drawing, f"of {sorted(drawing)}, not of {sorted(results)}"
        plan, self._plan = self._plan, None
        self.blocks.done(plan.prefix_writes, plan.copies)
        for span in plan.spans:
            self._fill(span.sequence, span.stop)
            if scores and (chances := scores.get(span.sequence.number)):
                known = len(span.sequence.prompt_logprobs) - span.start
                span.sequence.prompt_logprobs += chances[known:]
            if span.draws:
                self._queues.choices.pop(span.sequence.number, None)
            # The first choice is last: if it ends, its blocks are released, so others fork before.
            for sequence in (*span.draws[1:], *span.draws[:1]):
                self._draw_tokens(sequence, span, results[sequence.number])
        self._end_cancelled()
        single = all(span.rows == len(span.draws) == 1 for span in plan.spans)
        if single and not self._queues.ended and len(plan.spans) == len(self._queues.running):
            self._last = plan
        return self._queues.take_ended()

    def undo_step(self) -> None:
        """Discards the plan, which was not computed. The next plan repeats its writes and copies;
        the ends that it reported stay."""
        assert self._plan is not None, "no step is in progress"
        self._plan = None
        self._end_cancelled()

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends a sequence with an error, between steps. The next `step` or `finish_step` reports
        it."""
        assert self._plan is None, "the last step has not been finished"
        if sequence.state is not SequenceState.FINISHED:
            self._queues.end(sequence, FinishReason.ERROR, error)

    # plans

    def _new_plan(
        self,
        spans: tuple[Span, ...],
        prefix_writes: tuple[PrefixWrite, ...],
        copies: tuple[BlockCopy, ...],
        follows: int | None = None,
    ) -> StepPlan:
        self._plans += 1
        self._plan = StepPlan(
            spans, prefix_writes, copies, self._queues.take_ended(), self._plans, follows
        )
        return self._plan

    def _plan_next_tokens(self, last: StepPlan) -> StepPlan | None:
        """Plans the next token of the same sequences; None if more is to be done or blocks lack."""
        if self._queues.choices or len(last.spans) != len(self._queues.running):
            return None
        if self.blocks.has_writes:
            return None
        spans, block = [], self.blocks.tokens_per_block
        for span in last.spans:
            s = span.sequence
            if s.table is None:
                return None
            if not span.stop % block and not self.blocks.grow(s.table, span.stop + 1):
                return None
            spans.append(Span(s, span.stop, span.stop + 1, span.draws))
        self._forget_removed_adapters()
        return self._new_plan(tuple(spans), (), (), last.number)

    def _plan_guesses(self) -> StepPlan | None:
        """Plans the next token of all running sequences, and guesses. Returns None without guesses,
        or if anything else is to be done."""
        if self._lookup is None or self._queues.choices or self.blocks.has_writes:
            return None
        most = self.limits.step_tokens
        spans = guessed_spans(self._lookup, self.blocks, self._queues.running, most)
        if spans is None:
            return None
        self._forget_removed_adapters()
        return self._new_plan(spans, (), ())

    def _continue_running(self, tokens: int, takes: dict[Sequence, int]) -> int:
        """Adds the tokens of running sequences to `takes`. Returns the tokens left for new ones."""
        decoding = min(tokens, sum(s.length - s.computed == 1 for s in self._queues.running))
        reading, place = tokens - decoding, 0
        while place < len(self._queues.running):
            s = self._queues.running[place]
            missing = s.length - s.computed
            if missing == 1:
                take = min(1, decoding)
            else:
                take = min(s.unread, self.limits.chunk_tokens, reading)
            if take and not self._queues.make_room(s):
                break  # this sequence was the youngest, so it was preempted itself
            if missing == 1:
                decoding -= take
            else:
                reading -= take
            if take:
                takes[s] = take
            place += 1
        return reading

    def _start_waiting(
        self, tokens: int, takes: dict[Sequence, int], places: dict[Identity, int]
    ) -> None:
        """Starts waiting sequences in order, and ends those that can never run with their
        prefix."""
        adapters = AdapterPlaces(
            self._queues.running, self.limits.max_adapters, self.limits.max_overtaken
        )
        reading = {name for s in self._queues.running for name in self._queues.unread_blocks(s)}
        for s in list(self._queues.waiting):
            if tokens <= 0 or len(self._queues.running) >= self.limits.rows:
                break
            adapter = s.request.adapter
            if (
                adapter not in places
                # No cached block is looked up for a prompt whose tokens are all needed.
                or (not s.needs_whole_prompt and self._queues.will_be_cached(s, reading))
                or not adapters.allow(s)
            ):
                continue
            try:
                check_fits(s.request, self.blocks, self.positions, places[adapter])
            except DoesNotFitError as error:
                self._queues.end(s, FinishReason.ERROR, error)
                continue
            if not self._start(s, places[adapter]):
                break  # shorter sequences behind it would keep it out for ever
            adapters.started(s)
            takes[s] = min(s.unread, self.limits.chunk_tokens, tokens)
            tokens -= takes[s]
            reading.update(self._queues.unread_blocks(s))

    def _start(self, sequence: Sequence, prefix_length: int) -> bool:
        """Gives a sequence blocks for all that it has to read. Returns False if there are not
        enough. One block for every running sequence stays free, so that none is preempted soon."""
        table = self.blocks.open(
            sequence.chain,
            sequence.length,
            prefix_length=prefix_length,
            spare=len(self._queues.running),
        )
        if table is None:
            return False
        self._queues.waiting.remove(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = table.cached
        self._queues.run(sequence, table, table.cached)
        return True

    def _span(self, s: Sequence, take: int) -> Span:
        stop = s.computed + take
        draws = (s, *self._queues.choices.get(s.number, ())) if stop == s.length else ()
        return Span(s, s.computed, stop, draws)

    # adapters

    def _forget_removed_adapters(self) -> None:
        for content in self._adapters.take_removed():
            self.blocks.forget(content)

    # sequences

    def _fill(self, s: Sequence, computed: int) -> None:
        """Marks the first tokens of a sequence as computed."""
        assert s.table is not None
        s.computed = computed
        self.blocks.filled(s.table, computed, s.between)

    def _draw_tokens(self, s: Sequence, span: Span, result: StepResult) -> None:
        """Adds the tokens that a sequence drew: one, or one more than its accepted guesses."""
        drawn = result if isinstance(result, list) else [result]
        if span.guesses and self._lookup is not None:
            self._lookup.count(s, len(span.guesses), len(drawn) - 1)
        for accepted, sampled in enumerate(drawn):
            if accepted:  # the token before was guessed, so its keys and values are there
                self._fill(s, span.stop + accepted)
            self._draw(s, span, sampled)
            if s.cancelled or s.state is SequenceState.FINISHED:
                return

    def _draw(self, s: Sequence, span: Span, result: SampleResult) -> None:
        """Adds the token that a sequence drew after a span, or ends it."""
        if s.cancelled:
            return  # finish_step ends it
        if isinstance(result, VeneerError):
            self._queues.end(s, FinishReason.ERROR, result)
            return
        sampled = result if isinstance(result, SampledToken) else SampledToken(result)
        s.new.append(sampled.token)
        if sampled.chance is not None:
            s.logprobs.append(sampled.chance)
        reason = FinishReason.STOP if sampled.ends else s.ended_by(sampled.token)
        first = span.sequence
        if s is not first:
            s.cached_tokens, s.prompt_logprobs = first.cached_tokens, first.prompt_logprobs
        if reason is not None:
            if self._lookup is not None:
                self._lookup.end(s)
            self._queues.end(s, reason)
        elif s is not first:
            self._queues.fork(s, first, has_row=len(self._queues.running) < self.limits.rows)

    def _end_cancelled(self) -> None:
        for sequence in self._cancelled:
            self._queues.end(sequence, FinishReason.CANCELLED)
        self._cancelled = []

    def _end_late(self, now: float) -> None:
        for s in (*self._queues.running, *self.waiting):
            if s.request.deadline is not None and s.request.deadline <= now:
                self._queues.end(s, FinishReason.DEADLINE)
