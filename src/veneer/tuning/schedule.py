"""Divides the minutes between the search and the training of the winner, from measured step times.

    T     seconds that a run to its end takes; from it the steps of every candidate
    rungs at f/4, f/2 and f of a run's steps; 8, 4 and 2 of 8 candidates train up to these rungs,
          so the search takes 4 f T seconds
    f     is chosen so that the search with its evaluations takes a third of the time, or more if
          evaluations alone take nearly that long

Several candidates in one forward are faster than one after the other, so the search usually ends
before its third is over. The winner also stops at its last evaluation within the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.training.supervisor import halving_shares
from veneer.tuning.candidates import EVALUATIONS, MOST_WARMUP, Candidate

SEARCH_SHARE = 1 / 3
LEAST_SEARCH = 1.25
"""Least time of the search, times that of its evaluations."""
MOST_EPOCHS = 8
"""Most passes over the training rows, however much time there is."""
LEAST_STEPS = 8
"""Fewest steps of a run that has a meaning."""
LARGEST_RUNG = 0.5
ROUNDING = 1e-6


@dataclass(frozen=True)
class Pace:
    """Measured times. seconds_per_row: of training, by batch size. evaluation: of one evaluation.
    start: of loading the base and trying the largest batch."""

    seconds_per_row: dict[int, float]
    evaluation: float
    start: float


@dataclass(frozen=True)
class Schedule:
    """steps: of a run to its end, by batch size. rungs: shares of these steps, rising. is_whole:
    the time allows MOST_EPOCHS passes."""

    steps: dict[int, int]
    rungs: Sequence[float]
    search_seconds: float
    warmup: float
    is_whole: bool


def schedule(candidates: Sequence[Candidate], rows: int, pace: Pace, seconds: float) -> Schedule:
    """Plans the search and the training within so many seconds.

    rows: to train on. Raises ConfigError if the time is too short.
    """
    left = seconds - pace.start
    shares = halving_shares(len(candidates))
    running = [math.ceil(len(candidates) / 2**place) for place in range(len(shares))]
    # At each rung. Before the first step only those of other ranks: the probe's are remembered.
    first = len({(each.rank, each.batch) for each in candidates}) - len(pace.seconds_per_row)
    evaluations = (first + sum(running)) * pace.evaluation
    search = max(SEARCH_SHARE * left, LEAST_SEARCH * evaluations)
    train = left - search - EVALUATIONS * pace.evaluation
    whole = {batch: MOST_EPOCHS * rows * each for batch, each in pace.seconds_per_row.items()}
    steps = {
        batch: math.floor(min(train, whole[batch]) / (batch * each) + ROUNDING)
        for batch, each in pace.seconds_per_row.items()
    }
    if min(steps.values()) < LEAST_STEPS:
        longest_step = max(batch * each for batch, each in pace.seconds_per_row.items())
        after_search = LEAST_STEPS * longest_step + EVALUATIONS * pace.evaluation
        searching = max(
            LEAST_SEARCH * evaluations, SEARCH_SHARE / (1 - SEARCH_SHARE) * after_search
        )
        minutes = (pace.start + searching + after_search) / 60
        raise ConfigError(
            "the time is too short to search and train",
            [f"about {math.ceil(minutes)} minutes are needed on this machine"],
            "Give more --minutes, or a smaller base.",
        )
    # Of the rungs' shares of f, each stretch is trained by those that are left.
    stretches = [b - a for a, b in zip([0.0, *shares], shares, strict=False)]
    cost = sum(n * stretch for n, stretch in zip(running, stretches, strict=True)) / shares[-1]
    longest = max(min(train, seconds_whole) for seconds_whole in whole.values())
    last = min((search - evaluations) / (cost * longest), LARGEST_RUNG)
    rungs = [last * share / shares[-1] for share in shares]
    return Schedule(
        steps,
        rungs,
        search,
        # Over before the first rung, where rates are compared.
        min(MOST_WARMUP, rungs[0] / 2),
        min(train / value for value in whole.values()) >= 1,
    )
