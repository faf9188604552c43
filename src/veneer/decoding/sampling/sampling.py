"""Sampling settings of a request, in the order in which decoding/draws.py applies them.

forbidden    tokens that a constraint does not allow; stop tokens before min_new_tokens
logit_bias   added to logits
penalties    for ids in the answer (repetition: in the prompt too)
temperature  logits are divided by it
min_p, top_k, top_p    leave only likely tokens, in this order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

from veneer.bounds import (
    BIAS,
    LOGPROBS,
    MIN_P,
    PENALTY,
    REPETITION,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
    number_faults,
)
from veneer.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

COLDEST = 1e-9
"""At this temperature and below, the likeliest token is taken."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Raises ConfigError with every number that is out of bounds.

    temperature         0: the likeliest token
    top_k               number of likeliest tokens to draw from; 0: all
    top_p               draw from the fewest likeliest tokens with this total probability; 0: the
                        likeliest only
    min_p               draw from tokens with at least this fraction of the likeliest probability
    repetition_penalty  divides logits of ids in the prompt or answer; multiplies those below 0
    presence_penalty    subtracted from the logits of ids in the answer
    frequency_penalty   the same, times their count
    logit_bias          (id, value added to its logit), each id once
    logprobs            number of alternatives to report with each token's probability; None: none
                        and no probability
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        faults = number_faults(
            temperature=(TEMPERATURE, self.temperature),
            top_k=(TOP_K, self.top_k),
            top_p=(TOP_P, self.top_p),
            min_p=(MIN_P, self.min_p),
            repetition_penalty=(REPETITION, self.repetition_penalty),
            presence_penalty=(PENALTY, self.presence_penalty),
            frequency_penalty=(PENALTY, self.frequency_penalty),
            logprobs=(LOGPROBS, self.logprobs),
        )
        ids = [token for token, _ in self.logit_bias]
        faults += [
            f"logit_bias has {str(i)[:40]!r}: an id is {TOKEN.description}"
            for i in ids
            if not TOKEN.holds(i)
        ]
        biases = [(f"logit_bias of {str(i)[:40]}", bias) for i, bias in self.logit_bias]
        faults += [
            fault for name, bias in biases for fault in number_faults(**{name: (BIAS, bias)})
        ]
        if len(set(ids)) < len(ids):
            faults.append("logit_bias has an id twice")
        if faults:
            raise ConfigError("tokens cannot be drawn like this", faults)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature <= COLDEST or self.top_p <= 0 or self.top_k == 1

    @property
    def edits(self) -> bool:
        """Whether logits are edited before temperature."""
        return bool(self.logit_bias) or self.penalises

    @property
    def penalises(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def cuts(self) -> bool:
        """Whether top_k, top_p or min_p may leave tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


GREEDY = Sampling()
"""The likeliest token, without probabilities."""


class Constraint(Protocol):
    """Which tokens an answer may have, for instance by a grammar. One object per choice, asked in
    the order of its tokens."""

    def allowed(self, new: Sequence[int]) -> Tensor | np.ndarray:
        """Returns the allowed ids, (V) bool or shorter: ids past its end are not allowed. new: the
        answer so far."""

    def ended(self, new: Sequence[int]) -> bool:
        """Whether the answer ends with its newest token."""


@dataclass(frozen=True)
class TokenChance:
    """A drawn token with its log probability and the likeliest alternatives (id, log probability).

    They are the model's own, before constraints, biases, penalties and temperature.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, choice: int, place: int) -> float:
    """Returns the random number in [0, 1) of a choice's new token number `place`. It depends on
    nothing else."""
    digest = blake2b(b"%d %d %d" % (seed, choice, place), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def seed_of(seed: int, number: int) -> int:
    """Returns the seed of prompt `number` among several that share a seed; the first one uses it as
    it is."""
    return (seed + number * 0x9E3779B1) % 2**32
