"""Limits how many different adapters run at the same time.

A sequence whose adapters all run already, or that uses the base alone, needs no place. While all
places are taken, younger sequences may overtake one that waits, a bounded number of times. After
that, the running adapters that will be done soonest get no new sequences, and no place goes to a
younger sequence, until there is room.
"""

from collections.abc import Iterable

from veneer.decoding.schedule.sequence import Sequence


class AdapterPlaces:
    """The places of one round of starting sequences. most: number of different adapters."""

    def __init__(self, running: Iterable[Sequence], most: int, max_overtaken: int) -> None:
        self._left: dict[str, int] = {}
        """Running adapter -> tokens that its longest sequence may still compute."""
        self._most, self._max_overtaken = most, max_overtaken
        self._passed: list[Sequence] = []
        """Sequences of this round that lacked a place."""
        self._leaving: set[str] | None = None
        """Running adapters that get no new sequences, to free places. None: no such limit."""
        for sequence in running:
            self._count(sequence)

    def allow(self, sequence: Sequence) -> bool:
        """Whether a sequence may start now. If it lacks a place, sequences that are started later
        overtake it."""
        contents = {content for content, _ in sequence.request.adapter}
        missing, free = len(contents - self._left.keys()), self._most - len(self._left)
        if missing and (self._leaving is not None or missing > free):
            self._passed.append(sequence)
            if self._leaving is None and sequence.overtaken >= self._max_overtaken:
                soonest = sorted(
                    self._left.keys() - contents, key=lambda content: (self._left[content], content)
                )
                self._leaving = set(soonest[: missing - free])
            return False
        return not (self._leaving and self._leaving & contents)

    def started(self, sequence: Sequence) -> None:
        """Counts a sequence that has started."""
        self._count(sequence)
        for passed in self._passed:
            passed.overtaken += 1

    def _count(self, sequence: Sequence) -> None:
        for content, _ in sequence.request.adapter:
            self._left[content] = max(self._left.get(content, 0), sequence.most_left)
