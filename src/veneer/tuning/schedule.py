"""Divides the minutes between the search and the training of the winner, from measured step times.

    T     seconds that a run to its end takes; from it the steps of every candidate
    rungs at f/4, f/2 and f of a run's steps; 8, 4 and 2 of 8 candidates train up to these rungs,
          so the search takes 4 f T seconds. If the first would be after fewer than LEAST_RUNG
          steps there are two rungs, or one, and the last leaves one candidate in any case
    f     is chosen so that the search with its evaluations takes a third of the time, or more if a
          single rung after LEAST_RUNG steps needs more

Several candidates in one forward are faster than one after the other, so the search usually ends
before its third is over. The winner also stops at its last evaluation within the time, but its
rate is not zero there, so a tenth of the training's time is kept free.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError
from veneer.tuning.candidates import EVALUATIONS, MOST_WARMUP, Candidate

SEARCH_SHARE = 1 / 3
SPARE = 0.1
"""Share of the training's time that is not planned."""
MOST_EPOCHS = 8
"""Most passes over the training rows, however much time there is."""
LEAST_STEPS = 10
"""Fewest steps of a run that has a meaning."""
LARGEST_RUNG = 0.5
LEAST_RUNG = 5
"""Fewest steps of the largest batch before the first rung: earlier, chance decides."""
ROUNDING = 1e-6


@dataclass(frozen=True)
class Pace:
    """Measured times. seconds_per_row: of training, by batch size. evaluation: of one evaluation.
    start: of loading the base and trying the largest batch. probe: of the measurement itself."""

    seconds_per_row: dict[int, float]
    evaluation: float
    start: float
    probe: float

    @property
    def longest_step(self) -> float:
        """Seconds of a step of the batch that takes longest."""
        return max(batch * seconds for batch, seconds in self.seconds_per_row.items())


def read_pace(
    batches: Sequence[int],
    records: Sequence[Sequence[Mapping[str, Any]]],
    row_tokens: float,
    seconds: float,
) -> Pace:
    """Reads the times of measuring runs, one of each batch size, from their records.

    Their few rows may be shorter or longer than most, so a row's time is that of row_tokens, the
    mean number of tokens. seconds: of the whole measurement
    """
    of_rows: dict[int, float] = {}
    training, evaluations = 0.0, list[float]()
    for batch, run in zip(batches, records, strict=True):
        steps = [record for record in run if record["kind"] == "step"]
        times, tokens = ([step[field] for step in steps] for field in ("seconds", "tokens"))
        # The first step is slower: it allocates.
        of_rows[batch] = sum(times[1:]) / sum(tokens[1:]) * row_tokens
        training += sum(times)
        evaluations += [record["seconds"] for record in run if record["kind"] == "evaluation"]
    start = max(seconds - training - sum(evaluations), 0.0)
    return Pace(of_rows, sum(evaluations) / len(evaluations), start, seconds)


@dataclass(frozen=True)
class Schedule:
    """steps: of a run to its end, by batch size. rungs: shares of these steps, rising.
    evaluation_seconds: of one evaluation. is_whole: by batch size, the time allows MOST_EPOCHS
    passes."""

    steps: dict[int, int]
    rungs: Sequence[float]
    search_seconds: float
    evaluation_seconds: float
    warmup: float
    is_whole: dict[int, bool]


def schedule(candidates: Sequence[Candidate], rows: int, pace: Pace, seconds: float) -> Schedule:
    """Plans the search and the training within so many seconds: with as many rungs as halve the
    candidates to one, or fewer if the first would be too early.

    rows: to train on. Raises ConfigError if the time is too short.
    """
    most = max(1, int(math.log2(len(candidates))))
    for rungs in range(most, 0, -1):
        plan = _with_rungs(rungs, candidates, rows, pace, seconds)
        if plan is not None and (rungs == 1 or _first_rung(plan) >= LEAST_RUNG):
            return plan
    raise ConfigError(
        "the time is too short to search and train",
        [f"about {_needed_minutes(candidates, pace)} minutes are needed on this machine"],
        "Give more --minutes, or a smaller base.",
    )


def _first_rung(plan: Schedule) -> float:
    """Returns the steps of the largest batch before the first rung."""
    return plan.rungs[0] * min(plan.steps.values()) + ROUNDING


def _running(candidates: Sequence[Candidate], rungs: int) -> list[int]:
    """Returns how many candidates train up to each rung."""
    return [math.ceil(len(candidates) / 2**place) for place in range(rungs)]


def _evaluation_seconds(candidates: Sequence[Candidate], rungs: int, pace: Pace) -> float:
    """Returns the time of the search's evaluations: at each rung, and before the first step those
    of other ranks than the probe's, whose results are remembered."""
    first = len({(point.rank, point.batch) for point in candidates}) - len(pace.seconds_per_row)
    return (first + sum(_running(candidates, rungs))) * pace.evaluation


def _start_seconds(candidates: Sequence[Candidate], pace: Pace) -> float:
    """Returns the time until the search begins: the probe's start, and the largest batch once for
    each further candidate."""
    steps = [point.batch * pace.seconds_per_row[point.batch] for point in candidates]
    in_probe = sum(batch * seconds for batch, seconds in pace.seconds_per_row.items())
    return pace.start + sum(steps) - in_probe


def _shares(rungs: int) -> list[float]:
    """Returns the rungs as shares of the last."""
    return [2.0 ** (place - rungs + 1) for place in range(rungs)]


def _cost(candidates: Sequence[Candidate], rungs: int) -> float:
    """Returns the training of a search: how often one candidate's up to the last rung."""
    shares = _shares(rungs)
    # Each stretch up to a rung is trained by those that are left.
    stretches = [end - start for start, end in zip([0.0, *shares], shares, strict=False)]
    running = _running(candidates, rungs)
    return sum(count * stretch for count, stretch in zip(running, stretches, strict=True))


def _least_search(candidates: Sequence[Candidate], rungs: int, pace: Pace) -> float:
    """Returns the seconds of a search whose first rung is after LEAST_RUNG steps."""
    up_to_last = LEAST_RUNG * pace.longest_step / _shares(rungs)[0]
    return _evaluation_seconds(candidates, rungs, pace) + _cost(candidates, rungs) * up_to_last


def _with_rungs(
    rungs: int, candidates: Sequence[Candidate], rows: int, pace: Pace, seconds: float
) -> Schedule | None:
    """Returns the schedule with so many rungs; None if the time is too short for them. A single
    rung may take more than the search's share."""
    left = seconds - pace.probe - _start_seconds(candidates, pace)
    search, least = SEARCH_SHARE * left, _least_search(candidates, rungs, pace)
    if least > search and rungs > 1:
        return None
    search = max(search, least)
    train = (1 - SPARE) * (left - search) - EVALUATIONS * pace.evaluation
    whole = {batch: MOST_EPOCHS * rows * cost for batch, cost in pace.seconds_per_row.items()}
    steps = {
        batch: math.floor(min(train, whole[batch]) / (batch * cost) + ROUNDING)
        for batch, cost in pace.seconds_per_row.items()
    }
    if min(steps.values()) < LEAST_STEPS:
        return None
    training = search - _evaluation_seconds(candidates, rungs, pace)
    longest = max(min(train, seconds_whole) for seconds_whole in whole.values())
    last = min(training / (_cost(candidates, rungs) * longest), LARGEST_RUNG)
    rung_shares = [last * share for share in _shares(rungs)]
    is_whole = {batch: train >= seconds_whole for batch, seconds_whole in whole.items()}
    # The warm-up is over before the first rung, where rates are compared.
    warmup = min(MOST_WARMUP, rung_shares[0] / 2)
    return Schedule(steps, rung_shares, search, pace.evaluation, warmup, is_whole)


def _needed_minutes(candidates: Sequence[Candidate], pace: Pace) -> int:
    """Returns the minutes that the shortest search and training need."""
    training = (LEAST_STEPS * pace.longest_step + EVALUATIONS * pace.evaluation) / (1 - SPARE)
    share = SEARCH_SHARE / (1 - SEARCH_SHARE) * training
    search = max(_least_search(candidates, 1, pace), share)
    before = pace.probe + _start_seconds(candidates, pace)
    return math.ceil((before + search + training) / 60)
