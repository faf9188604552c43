"""What a step computes, as the scheduler says it, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from veneer.decoding.sampling.sampling import TokenChance
from veneer.decoding.schedule.blocks import BlockCopy, Identity, PrefixWrite
from veneer.decoding.schedule.sequence import Sequence
from veneer.errors import VeneerError


class Span(NamedTuple):
    """Tokens start to stop - 1 of a sequence, computed in this step.

    draws   who draws a token from what follows the last of them: nobody while the prompt is not all
            read, then the sequence itself, and the first time the request's other choices too
    """

    sequence: Sequence
    start: int
    stop: int
    draws: tuple[Sequence, ...]

    @property
    def tokens(self) -> list[int]:
        return self.sequence.between(self.start, self.stop)


@dataclass(frozen=True)
class StepPlan:
    """One step. First `fronts` are written and `copies` made, in any order; then the spans are
    computed.

    spans   the base's first, then adapter by adapter; of each, single tokens before chunks, the
            oldest first
    ended   sequences that ended since the last call, without a new token
    number  of the plan; follows: that of the one before, where this is each of its spans' next
            token and nothing else
    """

    spans: tuple[Span, ...]
    fronts: tuple[PrefixWrite, ...]
    copies: tuple[BlockCopy, ...]
    ended: tuple[Sequence, ...]
    number: int = 0
    follows: int | None = None

    @property
    def parts(self) -> tuple[tuple[Identity, int], ...]:
        """Each adapter with its number of tokens, in the order of the spans."""
        counts: dict[Identity, int] = {}
        for span in self.spans:
            adapter = span.sequence.request.adapter
            counts[adapter] = counts.get(adapter, 0) + span.stop - span.start
        return tuple(counts.items())


@dataclass(frozen=True)
class SampledToken:
    """A token of which more is to be said.

    ends    whether its sequence stops with it, as the caller has found: a stop string, the end of a
            grammar
    chance  of those that are told
    """

    token: int
    ends: bool = False
    chance: TokenChance | None = None


SampleResult = int | SampledToken | VeneerError
"""A token; one of which more is to be said; why there is none, which ends this sequence alone."""
