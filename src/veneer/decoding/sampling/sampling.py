"""How tokens are drawn, as it is asked for, and what a draw may tell. Numbers alone;
decoding/draws.py draws.

forbidden    what a constraint does not allow; stop tokens before min_new_tokens
logit_bias   added to logits
penalties    of ids that have been there (repetition: in the prompt too)
temperature  logits are divided by it
min_p, top_k, top_p    which of the likeliest are left, in this order, each of what the one before
                       left
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
"""From here on any two logits that differ are infinitely far apart: the likeliest token is
taken."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """ConfigError: all that is out of bounds.

    temperature         0: the likeliest token
    top_k               so many of the likeliest; 0: all
    top_p               the fewest of the likeliest that together have this chance; 0: the likeliest
                        alone
    min_p               those that have this part of the likeliest one's chance
    repetition_penalty  logits of ids in the prompt or the answer are divided by it, those below 0
                        multiplied
    presence_penalty    taken from the logits of ids in the answer
    frequency_penalty   the same, as often as they are there
    logit_bias          (id, what is added to its logit), each id once
    logprobs            how many alternatives are told beside each token's own chance; None: nothing
                        is told
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
            f"logit_bias has {str(i)[:40]!r}: an id is {TOKEN.said}"
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
        """Whether nothing is left to chance."""
        return self.temperature <= COLDEST or self.top_p <= 0 or self.top_k == 1

    @property
    def edits(self) -> bool:
        """Whether logits are changed before anything else."""
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
        """Whether some of the tokens may be left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


GREEDY = Sampling()
"""The likeliest token, and nothing told."""


class Constraint(Protocol):
    """What an answer may say, token by token: a grammar's. One for each choice, asked in the order
    of its tokens."""

    def allowed(self, new: Sequence[int]) -> Tensor | np.ndarray:
        """(V) bool, or shorter: ids behind it are not allowed. new: the answer so far."""

    def ended(self, new: Sequence[int]) -> bool:
        """Whether the answer ends with its newest token."""


@dataclass(frozen=True)
class TokenChance:
    """A drawn token, the logarithm of the chance that the model itself gave it, and the likeliest
    alternatives.

    Before constraints, biases, penalties and temperature. alternatives: (id, logarithm), the
    likeliest first
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, choice: int, place: int) -> float:
    """In [0, 1): what choice number `choice` draws for its new token number `place`, whatever is
    computed beside it."""
    digest = blake2b(b"%d %d %d" % (seed, choice, place), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def seed_of(seed: int, number: int) -> int:
    """Of prompt `number` among several that share a seed; the first one's is the seed itself."""
    return (seed + number * 0x9E3779B1) % 2**32
