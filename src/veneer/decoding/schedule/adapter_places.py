"""How many different adapters run at once: who gets a place in this step, and who has waited
enough.

A sequence whose adapters all run needs no place, nor does one of the base. Where all are taken,
younger sequences go ahead, a bounded number of times. Then the running adapters that are done
soonest get no new sequences, and no place goes to a younger one, until there is room.
"""

from __future__ import annotations

from collections.abc import Iterable

from veneer.decoding.schedule.sequence import Sequence


class AdapterPlaces:
    """For one round of letting sequences in, the first first. most: adapters, by their content, at
    once."""

    def __init__(self, running: Iterable[Sequence], most: int, max_overtaken: int) -> None:
        self._left: dict[
            str, int
        ] = {}  # of each running adapter, the most tokens that one of its sequences has left
        self._most, self._max_overtaken = most, max_overtaken
        self._passed: list[Sequence] = []
        self._leaving: set[str] | None = None
        for sequence in running:
            self._count(sequence)

    def allow(self, sequence: Sequence) -> bool:
        """Whether it may start now. If it lacks a place, those that `started` is told of go ahead
        of it."""
        own = {content for content, _ in sequence.request.adapter}
        missing, free = len(own - self._left.keys()), self._most - len(self._left)
        if missing and (self._leaving is not None or missing > free):
            self._passed.append(sequence)
            if self._leaving is None and sequence.overtaken >= self._max_overtaken:
                others = sorted(
                    self._left.keys() - own, key=lambda content: (self._left[content], content)
                )
                self._leaving = set(others[: missing - free])
            return False
        return not (self._leaving and self._leaving & own)

    def started(self, sequence: Sequence) -> None:
        """It runs from now on."""
        self._count(sequence)
        for other in self._passed:
            other.overtaken += 1

    def _count(self, sequence: Sequence) -> None:
        for content, _ in sequence.request.adapter:
            self._left[content] = max(self._left.get(content, 0), sequence.most_left)
