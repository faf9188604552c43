"""One answer on its way: what was asked, which stays as it is, and how far the answer has come.

    waiting ──> running ──> finished: stop, length, cancelled, deadline, error
                │     ▲     from any state
                ▼     │
               preempted    its blocks were needed; what it has said stays, and is read again later

Knows nothing of models and texts: tokens are ids. States change in decoding/schedule/scheduler.py
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from veneer.bounds import (
    CHOICES,
    NEW_TOKENS,
    PRIORITY,
    SEED,
    TIME,
    TOKEN,
    WAITS,
    WEIGHT,
    number_faults,
)
from veneer.decoding.sampling.sampling import GREEDY, Constraint, Sampling, TokenChance
from veneer.decoding.schedule.blocks import BlockNames, BlockTable, Identity
from veneer.errors import ConfigError


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked. ConfigError: all that is wrong: numbers, an empty prompt, an adapter named
    twice.

    prompt          ids, at least one
    adapter         (content hash, weight) of each that acts; empty: the base
    max_new_tokens  where the answer is cut
    min_new_tokens  before as many, no stop token is drawn, and none would stop anything
    stops           ids that end the answer
    choices         answers to the prompt, which is read once for all of them
    sampling        how tokens are drawn
    constraints     makes what allows each token, for each choice; None: all may follow
    checks          makes for each choice what is told each new token once, in order: whether the
                    answer ends with it
    seed            of the draws; choice i draws by (seed, i), whatever is computed beside it
    arrival         seconds on the caller's clock; older requests go first
    deadline        seconds on the same clock, when it ends with what there is; None: never
    priority        higher ones go first
    salt            requests of different salts find none of each other's keys and values
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: Identity = ()
    min_new_tokens: int = 0
    stops: frozenset[int] = frozenset()
    choices: int = 1
    sampling: Sampling = GREEDY
    constraints: Callable[[], Constraint] | None = None
    checks: Callable[[], Callable[[int], bool]] | None = None
    seed: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    priority: int = 0
    salt: str = ""

    def __post_init__(self) -> None:
        faults = number_faults(
            max_new_tokens=(NEW_TOKENS, self.max_new_tokens),
            min_new_tokens=(WAITS, self.min_new_tokens),
            choices=(CHOICES, self.choices),
            seed=(SEED, self.seed),
            arrival=(TIME, self.arrival),
            deadline=(TIME, self.deadline),
            priority=(PRIORITY, self.priority),
            **{
                f"weight {place}": (WEIGHT, weight)
                for place, (_, weight) in enumerate(self.adapter, 1)
            },
        )
        if not self.prompt:
            faults.append("the prompt is empty")
        for name, ids in (("the prompt", self.prompt), ("stops", self.stops)):
            if wrong := [
                i for i in ids if type(i) is not int or not TOKEN.least <= i <= TOKEN.most
            ]:
                faults.append(f"{name} has {str(wrong[0])[:40]!r}: an id is {TOKEN.said}")
        contents = [own for own, _ in self.adapter]
        faults += [
            f"adapter {own[:12]} acts twice"
            for own in sorted(set(contents))
            if contents.count(own) > 1
        ]
        if not faults and self.min_new_tokens > self.max_new_tokens:
            faults.append(
                f"min_new_tokens {self.min_new_tokens:,} is above max_new_tokens"
                f" {self.max_new_tokens:,}"
            )
        if faults:
            raise ConfigError("this cannot be asked", faults)

    @property
    def most_places(self) -> int:
        """Tokens whose keys and values may be held: the last new one is never read."""
        return len(self.prompt) + self.max_new_tokens - 1


class Sequence:
    """One choice of a request. All of it is read by anyone and changed by the scheduler alone.

    number         of its scheduler, from 0 on; later ones are higher
    choice         which of the request's choices, from 0 on
    order          lower goes first: priority, then age
    new            ids drawn so far, a stop token included
    logprobs       of each of them its chance, if they are told (Sampling.logprobs)
    computed       tokens of prompt and new ones whose keys and values are in its blocks
    cached_tokens  of the prompt, found and not computed when it first ran; for usage
    table          its blocks, while it runs
    overtaken      younger ones that went ahead while it waited for one of the places for adapters
    """

    def __init__(self, number: int, request: Request, choice: int, chain: BlockNames) -> None:
        self.number, self.request, self.choice, self.chain = number, request, choice, chain
        self.order = (-request.priority, request.arrival, number)
        self.state = SequenceState.WAITING
        self.reason: FinishReason | None = None
        self.error: Exception | None = None
        self.new: list[int] = []
        self.logprobs: list[TokenChance] = []
        self.computed = 0
        self.cached_tokens: int | None = None
        self.table: BlockTable | None = None
        self.overtaken = 0
        self.cancelled = False

    def __repr__(self) -> str:
        what = self.reason.value if self.reason else self.state.value
        return (
            f"<Sequence {self.number} {what}: {len(self.request.prompt)} + {len(self.new)} tokens>"
        )

    @property
    def length(self) -> int:
        """Tokens of the prompt and the new ones."""
        return len(self.request.prompt) + len(self.new)

    @property
    def most_left(self) -> int:
        """Tokens that it may still have to compute."""
        return self.request.most_places - self.computed

    @property
    def answer(self) -> list[int]:
        """The new ids without the stop token."""
        stopped = (
            self.new and self.reason is FinishReason.STOP and self.new[-1] in self.request.stops
        )
        return self.new[:-1] if stopped else list(self.new)

    def between(self, start: int, stop: int) -> list[int]:
        """Its tokens start to stop - 1, the prompt's first."""
        prompt = self.request.prompt
        cut = len(prompt)
        return [*prompt[start:stop], *self.new[max(start - cut, 0) : max(stop - cut, 0)]]

    def ended_by(self, token: int) -> FinishReason | None:
        """Why it ends after its newest token, which is `token`; None: it goes on."""
        if token in self.request.stops and len(self.new) > self.request.min_new_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.new) >= self.request.max_new_tokens else None
