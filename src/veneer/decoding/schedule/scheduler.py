"""Which sequences compute which of their tokens in the next step, until all have ended.

    add, cancel     between steps or during one
    step(now)       a plan: spans of tokens, the rows of one adapter beside each other; what to copy
                    before
    step_alone      a plan for one sequence, where a step failed
    finish_step     the token that each drew; stops and limits are applied
    undo_step       the plan was not computed (no memory, say): the same again, or a smaller one

Within a step: sequences that decode get their token each, then prompts are read in chunks, the
oldest first, then waiting ones are let in by priority and age. One whose adapter is not there yet
blocks nobody; one without a place for its adapter is overtaken a bounded number of times
(adapter_places.py). Where blocks run out, the youngest goes back and is read again later.

Deterministic: no clock, no random numbers; one thread calls. Models, tensors and texts are not
known.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veneer.bounds import COUNT, ROWS, TIME, WAITS, check_numbers
from veneer.decoding.schedule.adapter_places import AdapterPlaces
from veneer.decoding.schedule.blocks import (
    BlockCopy,
    BlockManager,
    BlockTable,
    Identity,
    PrefixWrite,
)
from veneer.decoding.schedule.sequence import FinishReason, Request, Sequence, SequenceState
from veneer.decoding.schedule.step_plan import SampledToken, SampleResult, Span, StepPlan
from veneer.errors import ConfigError, DoesNotFitError, QueueFullError, VeneerError

if TYPE_CHECKING:
    from veneer.decoding.schedule.adapters import AdapterSource


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a step and of the queue. ConfigError: out of bounds, or fewer tokens a step than rows.

    rows           sequences that run at once
    step_tokens    tokens computed in a step, all sequences together
    chunk_tokens   of one prompt in a step, so that a long one leaves room to others
    max_waiting    sequences that wait and have never run
    max_adapters   different adapters (by content) that run at once; the base is none
    max_overtaken  younger sequences that may go ahead of one that waits for one of these places
    """

    rows: int = 64
    step_tokens: int = 512
    chunk_tokens: int = 256
    max_waiting: int = 256
    max_adapters: int = 64
    max_overtaken: int = 16

    def __post_init__(self) -> None:
        check_numbers(
            rows=(ROWS, self.rows),
            step_tokens=(COUNT, self.step_tokens),
            chunk_tokens=(COUNT, self.chunk_tokens),
            max_waiting=(COUNT, self.max_waiting),
            max_adapters=(COUNT, self.max_adapters),
            max_overtaken=(WAITS, self.max_overtaken),
        )
        if self.step_tokens < self.rows:
            raise ConfigError(
                "a step has no token for every row",
                [f"rows {self.rows:,}, step_tokens {self.step_tokens:,}"],
                "Give a step at least as many tokens as rows.",
            )


class Scheduler:
    """blocks: for its sequences alone. adapters: asked once a step for each that a sequence waits
    for, and held for every sequence that has blocks; the base never. positions: that the model has;
    None: any number."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: Limits,
        adapters: AdapterSource,
        *,
        positions: int | None = None,
    ) -> None:
        self.blocks, self.limits, self._adapters, self.positions = (
            blocks,
            limits,
            adapters,
            positions,
        )
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._others: dict[
            int, list[Sequence]
        ] = {}  # first choice -> those that wait for it to read the prompt
        self._cancelled: list[Sequence] = []  # during the step that is under way
        self._ended: list[Sequence] = []  # and not yet told
        self._plan: StepPlan | None = None
        self._last: StepPlan | None = (
            None  # the one before, if all that runs went on by a token in it and nothing else was
        )
        self._count = self._plans = 0

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Those that have blocks, the first to go on first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Those that have none yet or any more, the next first, each request's other choices
        behind."""
        return (*self._waiting, *(other for others in self._others.values() for other in others))

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do or to report."""
        return not (self._waiting or self._running or self._others or self._ended)

    def wanted(self) -> list[Identity]:
        """Adapters of waiting sequences in the order in which they are needed: what to load
        ahead."""
        return list(dict.fromkeys(s.request.adapter for s in self._waiting if s.request.adapter))

    def in_use(self) -> Counter[Identity]:
        """Adapters of all sequences that have not ended, the base among them, with the number of
        these."""
        return Counter(s.request.adapter for s in (*self._running, *self.waiting))

    def most_places(self, front_places: int = 0) -> int:
        """Tokens that a prompt and its answer may have together, behind such a prefix. For any
        thread."""
        blocks = self.blocks
        room = (blocks.num_blocks - blocks.blocks_for(front_places)) * blocks.tokens_per_block
        places = room + 1  # the last token's keys and values are not needed
        return max(
            0, places if self.positions is None else min(places, self.positions - front_places)
        )

    def add(self, request: Request) -> tuple[Sequence, ...]:
        """One sequence for each choice, which wait from now on.

        DoesNotFitError: it can never run: too long for all blocks or the model, too many adapters
        or choices. QueueFullError: too many wait.
        """
        self._check_fits(request, front_places=0)
        if (most := self.limits.max_adapters) < len(request.adapter):
            raise DoesNotFitError(
                f"{len(request.adapter)} adapters are to act together, {most} may"
            )
        if (most := self.limits.max_waiting) < request.choices:
            raise DoesNotFitError(f"{request.choices} choices are asked for, {most} may wait")
        waiting = sum(s.state is SequenceState.WAITING for s in self.waiting)
        if waiting + request.choices > self.limits.max_waiting:
            raise QueueFullError(waiting, self.limits.max_waiting)
        made = []
        for choice in range(request.choices):
            made.append(
                Sequence(
                    self._count, request, choice, self.blocks.chain(request.adapter, request.salt)
                )
            )
            self._count += 1
        self._wait(made[0], made[1:])
        return tuple(made)

    def cancel(self, sequence: Sequence) -> None:
        """It ends at once, or with the step that is under way. The next `step` or `finish_step`
        tells."""
        if sequence.state is SequenceState.FINISHED or sequence.cancelled:
            return
        sequence.cancelled = True
        if self._plan is None:
            self._end(sequence, FinishReason.CANCELLED)
        else:
            self._cancelled.append(sequence)

    def step(self, now: float, *, most_tokens: int | None = None) -> StepPlan:
        """What to compute next; no spans while all wait for their adapters, or nothing is left.

        Before the next call comes `finish_step` or `undo_step`.

        now          seconds on the clock of arrivals and deadlines
        most_tokens  fewer than the limit, once
        """
        check_numbers(now=(TIME, now), most_tokens=(COUNT, most_tokens))
        assert self._plan is None, "the last step has not been finished"
        self._end_late(now)
        last, self._last = self._last, None
        if (
            last is not None
            and most_tokens is None
            and not self._waiting
            and (plan := self._following(last))
        ):
            return plan
        places = self._ask_adapters()
        tokens = min(self.limits.step_tokens, most_tokens or self.limits.step_tokens)
        takes: dict[Sequence, int] = {}
        left = self._go_on(tokens, takes)
        if left and len(self._running) < self.limits.rows:
            self._let_in(left, takes, places)
        for content in self._adapters.settle():
            self.blocks.forget(content)
        order = [s for s in self._running if s in takes]
        order.sort(key=lambda s: (s.request.adapter, takes[s] > 1))
        spans = tuple(self._span(s, takes[s]) for s in order)
        return self._planned(spans, self.blocks.fronts, self.blocks.copies)

    def _planned(
        self,
        spans: tuple[Span, ...],
        fronts: tuple[PrefixWrite, ...],
        copies: tuple[BlockCopy, ...],
        follows: int | None = None,
    ) -> StepPlan:
        self._plans += 1
        self._plan = StepPlan(spans, fronts, copies, self._told(), self._plans, follows)
        return self._plan

    def _following(self, last: StepPlan) -> StepPlan | None:
        """The next token of each; None: there are others, or no block for one."""
        if (
            self._others
            or len(last.spans) != len(self._running)
            or self.blocks.fronts
            or self.blocks.copies
        ):
            return None
        spans, block = [], self.blocks.tokens_per_block
        for span in last.spans:
            s = span.sequence
            if s.table is None or not (
                span.stop % block or self.blocks.grow(s.table, span.stop + 1)
            ):
                return None
            spans.append(Span(s, span.stop, span.stop + 1, span.draws))
        for content in self._adapters.settle():
            self.blocks.forget(content)
        return self._planned(tuple(spans), (), (), last.number)

    def step_alone(self, sequence: Sequence) -> StepPlan:
        """One running sequence's part of a step that failed: whether it fails by itself. It may go
        back instead."""
        assert self._plan is None, "the last step has not been finished"
        if self._has_room(sequence):
            assert sequence.table is not None
            take = min(sequence.length - sequence.computed, self.limits.chunk_tokens)
            fronts, copies = self.blocks.pending(sequence.table)
            return self._planned((self._span(sequence, take),), fronts, copies)
        return self._planned((), (), ())

    def finish_step(self, results: Mapping[int, SampleResult]) -> tuple[Sequence, ...]:
        """The plan has been computed. Returns the sequences that have ended.

        results   by number: what each sequence drew that the plan names in `draws`, and nothing
                  else. One that was cancelled meanwhile gets no token.
        """
        assert self._plan is not None, "no step is under way"
        drawing = {s.number for span in self._plan.spans for s in span.draws}
        assert results.keys() == drawing, f"of {sorted(drawing)}, not of {sorted(results)}"
        plan, self._plan = self._plan, None
        self.blocks.done(plan.fronts, plan.copies)
        for span in plan.spans:
            assert span.sequence.table is not None
            span.sequence.computed = span.stop
            self.blocks.filled(span.sequence.table, span.stop, span.sequence.between)
            if span.draws:
                self._others.pop(span.sequence.number, None)
            others = span.draws[1:]  # they fork before the first, which may end, lets its blocks go
            for sequence in (*others, *span.draws[:1]):
                self._draw(sequence, span, results[sequence.number])
        self._end_cancelled()
        single = all(span.stop - span.start == len(span.draws) == 1 for span in plan.spans)
        if single and not self._ended and len(plan.spans) == len(self._running):
            self._last = plan
        return self._told()

    def undo_step(self) -> None:
        """The plan has not been computed, or not to its end: only the ends that it told of count.

        The next plan says again what is to be written and copied.
        """
        assert self._plan is not None, "no step is under way"
        self._plan = None
        self._end_cancelled()

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """It ends with this error; between steps. The next `step` or `finish_step` tells."""
        assert self._plan is None, "the last step has not been finished"
        if sequence.state is not SequenceState.FINISHED:
            self._end(sequence, FinishReason.ERROR, error)

    def _check_fits(self, request: Request, *, front_places: int) -> None:
        blocks, places = self.blocks, len(request.prompt) + request.max_new_tokens
        if self.positions is not None and front_places + places > self.positions:
            prefix = f" behind its adapter's prefix of {front_places:,}" if front_places else ""
            raise DoesNotFitError(
                f"{len(request.prompt):,} tokens and {request.max_new_tokens:,} new ones{prefix}"
                f" are more than the {self.positions:,} positions that the model reads alike",
                next_step="Shorten the prompt, or ask for fewer new tokens.",
            )
        if (
            blocks.blocks_for(front_places) + blocks.blocks_for(request.most_places)
            > blocks.num_blocks
        ):
            front = blocks.blocks_for(front_places) * blocks.tokens_per_block
            prefix = f", its adapter's prefix for {front:,}" if front else ""
            raise DoesNotFitError(
                f"{len(request.prompt):,} tokens and {request.max_new_tokens:,} new ones need room"
                f" for {request.most_places:,}{prefix}; there is room for {blocks.capacity:,}",
                next_step=(
                    "Shorten the prompt, ask for fewer new tokens, or give keys and values more"
                    " bytes."
                ),
            )

    def _wait(self, sequence: Sequence, others: list[Sequence]) -> None:
        insort(self._waiting, sequence, key=lambda s: s.order)
        if others:
            self._others[sequence.number] = others

    def _told(self) -> tuple[Sequence, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended

    def _end_cancelled(self) -> None:
        for sequence in self._cancelled:
            self._end(sequence, FinishReason.CANCELLED)
        self._cancelled = []

    def _end_late(self, now: float) -> None:
        for s in (*self._running, *self.waiting):
            if s.request.deadline is not None and s.request.deadline <= now:
                self._end(s, FinishReason.DEADLINE)

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: Exception | None = None
    ) -> None:
        """Takes it out of wherever it is. If other choices wait for it, the first of them takes its
        place."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        for first, others in list(self._others.items()):
            if sequence in others:
                others.remove(sequence)
                if not others:
                    del self._others[first]
        if others := self._others.pop(sequence.number, []):
            self._wait(others[0], others[1:])
        self._let_go(sequence)
        sequence.state, sequence.reason, sequence.error = SequenceState.FINISHED, reason, error
        self._ended.append(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.blocks.close(sequence.table)
            sequence.table, sequence.computed = None, 0
            if sequence.request.adapter:
                self._adapters.release(sequence.request.adapter)

    def _hold(self, sequence: Sequence, table: BlockTable) -> None:
        sequence.table = table
        if sequence.request.adapter:
            self._adapters.hold(sequence.request.adapter)

    def _ask_adapters(self) -> dict[Identity, int]:
        """Prefix places of the adapters that can act. Sequences end here whose adapter never
        will."""
        places: dict[Identity, int] = {(): 0}
        for adapter in self.wanted():
            try:
                found = self._adapters.ready(adapter)
            except VeneerError as fault:
                self._end_waiting(adapter, fault)
                continue
            if found is not None:
                places[adapter] = found
        return places

    def _end_waiting(self, adapter: Identity, fault: VeneerError) -> None:
        for s in self.waiting:
            if s.request.adapter == adapter:
                self._end(s, FinishReason.ERROR, fault)

    def _go_on(self, tokens: int, takes: dict[Sequence, int]) -> int:
        """What running sequences compute; the tokens that are left for new ones."""
        decoding = min(tokens, sum(s.length - s.computed == 1 for s in self._running))
        reading, place = tokens - decoding, 0
        while place < len(self._running):
            s = self._running[place]
            wants = s.length - s.computed
            take = (
                min(wants, decoding)
                if wants == 1
                else min(wants, self.limits.chunk_tokens, reading)
            )
            if take and not self._has_room(s):
                break  # it was the youngest, and went back itself
            if wants == 1:
                decoding -= take
            else:
                reading -= take
            if take:
                takes[s] = take
            place += 1
        return reading

    def _has_room(self, sequence: Sequence) -> bool:
        """Blocks for all of its tokens, the youngest going back until then. False: it went back
        itself."""
        assert sequence.table is not None
        while not self.blocks.grow(sequence.table, sequence.length):
            youngest = self._running.pop()
            self._let_go(youngest)
            youngest.state = SequenceState.PREEMPTED
            self._wait(youngest, [])
            if youngest is sequence:
                return False
        return True

    def _let_in(self, left: int, takes: dict[Sequence, int], places: dict[Identity, int]) -> None:
        """Starts waiting sequences, the first first. Those end that can never run, as their prefix
        shows."""
        adapters = AdapterPlaces(self._running, self.limits.max_adapters, self.limits.max_overtaken)
        read = {name for s in self._running for name in self._to_read(s)}
        for s in list(self._waiting):
            if left <= 0 or len(self._running) >= self.limits.rows:
                break
            adapter = s.request.adapter
            if adapter not in places or self._others_read(s, read) or not adapters.allow(s):
                continue
            try:
                self._check_fits(s.request, front_places=places[adapter])
            except DoesNotFitError as fault:
                self._end(s, FinishReason.ERROR, fault)
                continue
            if not self._start(s, places[adapter]):
                break  # younger ones that are shorter would keep it out for ever
            adapters.started(s)
            takes[s] = min(s.length - s.computed, self.limits.chunk_tokens, left)
            left -= takes[s]
            read.update(self._to_read(s))

    def _start(self, sequence: Sequence, front_places: int) -> bool:
        """Blocks for all that it has to read. False: there are not enough.

        One more for every running sequence stays free, so that none has to go back at once.
        """
        table = self.blocks.open(
            sequence.chain, sequence.length, front_places=front_places, spare=len(self._running)
        )
        if table is None:
            return False
        self._waiting.remove(sequence)
        self._hold(sequence, table)
        sequence.computed, sequence.state = table.cached, SequenceState.RUNNING
        if sequence.cached_tokens is None:
            sequence.cached_tokens = table.cached
        insort(self._running, sequence, key=lambda s: s.order)
        return True

    def _to_read(self, s: Sequence) -> list[bytes]:
        """Names of the full blocks that a running sequence is about to compute."""
        return s.chain.names[s.computed // self.blocks.tokens_per_block :]

    def _others_read(self, s: Sequence, read: set[bytes]) -> bool:
        """Whether a running sequence is about to compute what this one lacks, and could find
        soon."""
        s.chain.reach(s.length, s.between)
        usable = s.chain.names[: (s.length - 1) // self.blocks.tokens_per_block]
        missing = next((name for name in usable if not self.blocks.knows(name)), None)
        return missing in read

    def _span(self, s: Sequence, take: int) -> Span:
        stop = s.computed + take
        draws = (s, *self._others.get(s.number, ())) if stop == s.length else ()
        return Span(s, s.computed, stop, draws)

    def _draw(self, s: Sequence, span: Span, drawn: SampleResult) -> None:
        """Applies what it drew from what follows the span."""
        if s.cancelled:
            return  # finish_step ends it
        if isinstance(drawn, VeneerError):
            self._end(s, FinishReason.ERROR, drawn)
            return
        chosen = drawn if isinstance(drawn, SampledToken) else SampledToken(drawn)
        s.new.append(chosen.token)
        if chosen.chance is not None:
            s.logprobs.append(chosen.chance)
        reason = FinishReason.STOP if chosen.ends else s.ended_by(chosen.token)
        first = span.sequence
        if s is not first:
            s.cached_tokens = first.cached_tokens
        if reason is not None:
            self._end(s, reason)
        elif s is not first:
            self._branch(s, first)

    def _branch(self, s: Sequence, first: Sequence) -> None:
        """Another choice goes on from the prompt that the first has read, or waits where there is
        no room."""
        assert first.table is not None
        room = len(self._running) < self.limits.rows
        table = self.blocks.fork(first.table, first.computed) if room else None
        if table is None:
            s.state = SequenceState.PREEMPTED
            self._wait(s, [])
        else:
            self._hold(s, table)
            s.state, s.computed, s.chain = SequenceState.RUNNING, first.computed, table.chain
            insort(self._running, s, key=lambda each: each.order)
