"""The plan of a step, and what each of its sequences draws."""

from dataclasses import dataclass
from typing import NamedTuple

from veneer.decoding.sampling.sampling import TokenChance
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockCopy, PrefixWrite
from veneer.decoding.schedule.sequence import Sequence
from veneer.errors import VeneerError


class Span(NamedTuple):
    """Tokens start to stop - 1 of a sequence, and guesses of the next, computed in this step.

    draws    sequences that draw a token from the last logits: none until the whole prompt is read,
             then the sequence itself, the first time with the request's other choices
    guesses  computed after the newest token (lookup.py): the sequence draws from the logits before
             and after each of them
    """

    sequence: Sequence
    start: int
    stop: int
    draws: tuple[Sequence, ...]
    guesses: tuple[int, ...] = ()

    @property
    def adapter(self) -> Identity:
        """Returns the adapters that act on its tokens."""
        return self.sequence.request.adapter_at(self.start)

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.between(self.start, self.stop), *self.guesses]

    @property
    def rows(self) -> int:
        return self.stop - self.start + len(self.guesses)

    @property
    def logits(self) -> int:
        """Number of its last tokens whose logits are computed."""
        return self.rows if self.sequence.scores_prompt else 1 + len(self.guesses)

    @property
    def scored(self) -> tuple[int, ...]:
        """Prompt tokens whose probabilities its logits give, the first by its first logits."""
        if not self.sequence.scores_prompt:
            return ()
        return self.sequence.request.prompt[self.start + 1 : self.stop + 1]


@dataclass(frozen=True)
class StepPlan:
    """A step: `prefix_writes` and `copies` are made, in any order; then the spans are computed.

    spans    the base's first, then adapter by adapter; in each group, single tokens before chunks,
             the oldest first
    ended    sequences that ended since the last call, without a new token
    number   number of the plan
    follows  number of the previous plan, if this one is exactly the next token of all its spans
    """

    spans: tuple[Span, ...]
    prefix_writes: tuple[PrefixWrite, ...]
    copies: tuple[BlockCopy, ...]
    ended: tuple[Sequence, ...]
    number: int = 0
    follows: int | None = None

    @property
    def parts(self) -> tuple[tuple[Identity, int], ...]:
        """Number of tokens of each adapter, in the order of the spans."""
        counts: dict[Identity, int] = {}
        for span in self.spans:
            counts[span.adapter] = counts.get(span.adapter, 0) + span.rows
        return tuple(counts.items())


@dataclass(frozen=True)
class SampledToken:
    """A drawn token with details.

    ends    whether the answer ends with it: a stop string, the end of a grammar
    chance  its probability, if the request asks for it
    """

    token: int
    ends: bool = False
    chance: TokenChance | None = None


SampleResult = int | SampledToken | VeneerError
"""A token, a token with details, or the error that ends the sequence."""
StepResult = SampleResult | list[SampleResult]
"""What a sequence draws in a step; a list if guesses were checked: one more than were accepted."""
