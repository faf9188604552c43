"""A request, and its sequences: one answer each, with their progress.

    waiting ──> running ──> finished: stop, length, cancelled, deadline, error
                │     ▲     from any state
                ▼     │
               preempted    its blocks were needed; its tokens stay and are read again later

Tokens are ids; this module knows nothing of models and texts. Only decoding/schedule/queues.py and
scheduler.py change sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

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
from veneer.decoding.schedule.block_names import BlockNames, Identity
from veneer.decoding.schedule.blocks import BlockTable
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
    """A prompt and how to answer it. Raises ConfigError with every fault.

    prompt          ids, at least one
    adapter         (content hash, weight) of each adapter that acts; empty: the base
    activation      first token of the prompt on which the adapter acts; the base alone computes
                    those before (adapters/activation.py). The prompt's length: the base computes
                    all
    max_new_tokens  limit of the answer's length
    min_new_tokens  number of tokens before which no stop token is drawn
    stops           ids that end the answer
    choices         number of answers; the prompt is read once for all of them
    sampling        how tokens are drawn
    constraints     makes a constraint for each choice, which allows tokens; None: all are allowed
    checks          makes for each choice a function that gets each new token in order and returns
                    whether the answer ends with it
    seed            seed of the draws; choice i draws by (seed, i), independent of other requests
    arrival         seconds on the caller's clock; older requests go first
    deadline        time on the same clock at which the answer is cut; None: never
    priority        higher ones go first
    salt            requests with different salts share no keys and values
    prompt_logprobs report the probabilities of the prompt's tokens too, with as many alternatives
                    as those of new tokens; the whole prompt is then computed
    prompt_only     the caller discards the new tokens, so the last one takes no position
    prompt_states   called with the number of a prompt token and the last hidden states (rows, D) of
                    the tokens from there on, which are valid during the call; the whole prompt is
                    then computed. Tokens that are computed twice come twice
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: Identity = ()
    activation: int = 0
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
    prompt_logprobs: bool = False
    prompt_only: bool = False
    prompt_states: Callable[[int, Any], None] | None = None

    def __post_init__(self) -> None:
        faults = number_faults(
            max_new_tokens=(NEW_TOKENS, self.max_new_tokens),
            min_new_tokens=(WAITS, self.min_new_tokens),
            activation=(WAITS, self.activation),
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
                faults.append(f"{name} has {str(wrong[0])[:40]!r}: an id is {TOKEN.description}")
        contents = [content for content, _ in self.adapter]
        faults += [
            f"adapter {content[:12]} acts twice"
            for content in sorted(set(contents))
            if contents.count(content) > 1
        ]
        if not faults and self.min_new_tokens > self.max_new_tokens:
            faults.append(
                f"min_new_tokens {self.min_new_tokens:,} is above max_new_tokens"
                f" {self.max_new_tokens:,}"
            )
        if faults:
            raise ConfigError("the request is invalid", faults)

    @property
    def max_positions(self) -> int:
        """Most tokens whose keys and values are stored: the last new one is never read."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def acts_from(self) -> int:
        """Returns the first token on which the adapter acts. Without an activation in the prompt
        it is behind the answer: the adapter acts on no token."""
        if self.activation < len(self.prompt):
            return self.activation
        return len(self.prompt) + self.max_new_tokens

    def adapter_at(self, place: int) -> Identity:
        """Returns the adapters that act on the token at this place."""
        return self.adapter if place >= self.acts_from else ()

    @property
    def needed_positions(self) -> int:
        """Positions of prompt and longest answer."""
        return len(self.prompt) + self.max_new_tokens - self.prompt_only


class Sequence:
    """One choice of a request. Only the scheduler changes it.

    number         number in its scheduler, ascending from 0
    choice         number of the choice in its request, from 0
    order          sort key, lower goes first: priority, then age
    new            ids drawn so far, a stop token included
    logprobs       probabilities of the drawn tokens, if requested (Sampling.logprobs)
    prompt_logprobs  of the prompt's tokens from the second on, if requested; complete once a token
                   is drawn
    computed       number of tokens whose keys and values are in its blocks
    cached_tokens  prompt tokens that were cached when it first ran; for usage
    table          its blocks, while it runs
    overtaken      younger sequences that overtook it while it waited for an adapter's place
    """

    def __init__(self, number: int, request: Request, choice: int, chain: BlockNames) -> None:
        self.number, self.request, self.choice, self.chain = number, request, choice, chain
        self.order = (-request.priority, request.arrival, number)
        self.state = SequenceState.WAITING
        self.reason: FinishReason | None = None
        self.error: Exception | None = None
        self.new: list[int] = []
        self.logprobs: list[TokenChance] = []
        self.prompt_logprobs: list[TokenChance] = []
        self.computed = 0
        self.cached_tokens: int | None = None
        self.table: BlockTable | None = None
        self.overtaken = 0
        self.cancelled = False

    def __repr__(self) -> str:
        status = self.reason.value if self.reason else self.state.value
        tokens = f"{len(self.request.prompt)} + {len(self.new)} tokens"
        return f"<Sequence {self.number} {status}: {tokens}>"

    @property
    def length(self) -> int:
        """Number of tokens, prompt and answer."""
        return len(self.request.prompt) + len(self.new)

    @property
    def unread(self) -> int:
        """Returns the number of tokens that a step may compute; the same adapters act on all."""
        activation = self.request.acts_from
        stop = activation if self.computed < activation < self.length else self.length
        return stop - self.computed

    @property
    def acting(self) -> Identity:
        """Returns the adapters that act on the next token that is computed."""
        return self.request.adapter_at(self.computed)

    @property
    def scores_prompt(self) -> bool:
        """Whether probabilities of the prompt's tokens are still to be computed."""
        request = self.request
        return request.prompt_logprobs and len(self.prompt_logprobs) < len(request.prompt) - 1

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token of the prompt is computed, so that no cached block is used."""
        return self.scores_prompt or self.request.prompt_states is not None

    @property
    def most_left(self) -> int:
        """Most tokens that are still to be computed."""
        return self.request.max_positions - self.computed

    @property
    def answer(self) -> list[int]:
        """The new ids without the stop token."""
        stopped = (
            self.new and self.reason is FinishReason.STOP and self.new[-1] in self.request.stops
        )
        return self.new[:-1] if stopped else list(self.new)

    def between(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop - 1 of prompt and answer."""
        prompt = self.request.prompt
        cut = len(prompt)
        return [*prompt[start:stop], *self.new[max(start - cut, 0) : max(stop - cut, 0)]]

    def ended_by(self, token: int) -> FinishReason | None:
        """Returns the reason to end after the newest token, `token`. None if the answer
        continues."""
        if token in self.request.stops and len(self.new) > self.request.min_new_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.new) >= self.request.max_new_tokens else None
