"""The waiting and running sequences of a scheduler, and the blocks of those that run."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockManager, BlockTable
from veneer.decoding.schedule.sequence import FinishReason, Sequence, SequenceState
from veneer.errors import VeneerError

if TYPE_CHECKING:
    from veneer.decoding.schedule.adapters import AdapterSource


class SequenceQueues:
    """Moves sequences between waiting, running and ended.

    waiting  sequences without blocks, next to run first
    running  sequences with blocks, in order
    choices  number of a request's first choice -> choices that wait until it has read the prompt
    ended    sequences that have ended and were not reported yet
    """

    def __init__(self, blocks: BlockManager, adapters: AdapterSource) -> None:
        self._blocks, self._adapters = blocks, adapters
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.choices: dict[int, list[Sequence]] = {}
        self.ended: list[Sequence] = []

    @property
    def without_blocks(self) -> tuple[Sequence, ...]:
        """Waiting sequences, then choices that wait for their prompt."""
        return (*self.waiting, *(s for choices in self.choices.values() for s in choices))

    @property
    def empty(self) -> bool:
        return not (self.waiting or self.running or self.choices or self.ended)

    def wait(self, sequence: Sequence, choices: list[Sequence]) -> None:
        insort(self.waiting, sequence, key=lambda s: s.order)
        if choices:
            self.choices[sequence.number] = choices

    def run(self, sequence: Sequence, table: BlockTable, computed: int) -> None:
        """Runs a sequence with these blocks, in which `computed` tokens are filled."""
        sequence.table = table
        if sequence.request.adapter:
            self._adapters.hold(sequence.request.adapter)
        sequence.computed, sequence.state = computed, SequenceState.RUNNING
        insort(self.running, sequence, key=lambda s: s.order)

    def make_room(self, sequence: Sequence) -> bool:
        """Gets blocks for all tokens of a running sequence, preempting the youngest ones. Returns
        False if it is preempted itself."""
        assert sequence.table is not None
        while not self._blocks.grow(sequence.table, sequence.length):
            youngest = self.running.pop()
            self._release_blocks(youngest)
            youngest.state = SequenceState.PREEMPTED
            self.wait(youngest, [])
            if youngest is sequence:
                return False
        return True

    def fork(self, sequence: Sequence, first: Sequence, *, has_row: bool) -> None:
        """Continues another choice from the prompt that the first has read. It waits if there is no
        row or no block for it."""
        assert first.table is not None
        table = self._blocks.fork(first.table, first.computed) if has_row else None
        if table is None:
            sequence.state = SequenceState.PREEMPTED
            self.wait(sequence, [])
        else:
            sequence.chain = table.chain
            self.run(sequence, table, first.computed)

    def end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a sequence. If other choices wait for it, the first of them reads the prompt
        instead."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        for first, choices in list(self.choices.items()):
            if sequence in choices:
                choices.remove(sequence)
                if not choices:
                    del self.choices[first]
        if choices := self.choices.pop(sequence.number, []):
            self.wait(choices[0], choices[1:])
        self._release_blocks(sequence)
        sequence.state, sequence.reason, sequence.error = SequenceState.FINISHED, reason, error
        self.ended.append(sequence)

    def unread_blocks(self, s: Sequence) -> list[bytes]:
        """Names of the full blocks that a running sequence has yet to compute."""
        return s.chain.names[s.computed // self._blocks.tokens_per_block :]

    def will_be_cached(self, s: Sequence, reading: set[bytes]) -> bool:
        """Whether a running sequence is about to compute the first block that this one lacks."""
        if not self._blocks.shares:
            return False
        s.chain.extend_to(s.length, s.between)
        usable = s.chain.names[: (s.length - 1) // self._blocks.tokens_per_block]
        missing = next((name for name in usable if not self._blocks.knows(name)), None)
        return missing in reading

    def wanted(self) -> list[Identity]:
        """Adapters of waiting sequences, next needed first: these can be loaded ahead."""
        return list(dict.fromkeys(s.request.adapter for s in self.waiting if s.request.adapter))

    def ask_adapters(self) -> dict[Identity, int]:
        """Returns the prefix lengths of ready adapters. Ends sequences whose adapter will never be
        ready."""
        places: dict[Identity, int] = {(): 0}
        for adapter in self.wanted():
            try:
                prefix = self._adapters.ready(adapter)
            except VeneerError as error:
                for s in self.without_blocks:
                    if s.request.adapter == adapter:
                        self.end(s, FinishReason.ERROR, error)
                continue
            if prefix is not None:
                places[adapter] = prefix
        return places

    def take_ended(self) -> tuple[Sequence, ...]:
        ended, self.ended = tuple(self.ended), []
        return ended

    def _release_blocks(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self._blocks.close(sequence.table)
            sequence.table, sequence.computed = None, 0
            if sequence.request.adapter:
                self._adapters.release(sequence.request.adapter)
