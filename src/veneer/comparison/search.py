"""The learning rate of each candidate, searched with the same care for all: otherwise a comparison
of methods is one of how well their defaults happen to fit.

Every rate trains once with seed 0 for the whole budget; the lowest held-out loss wins, and its run
is also the final run of seed 0. Where the best rate lies at an end, the search goes on in that
direction.
"""

from __future__ import annotations

import math

from veneer.comparison.execute import FinishedRun, JobRunner
from veneer.comparison.jobs import Asking, together
from veneer.comparison.plan import Candidate

PROBE_STEPS = 6


def steps_within(worker: JobRunner, candidate: Candidate, seconds: float) -> Asking[int]:
    """Optimizer steps that fit into this training time, by a short run of this candidate on this
    machine."""
    rate = candidate.config.peak_learning_rate(worker.hidden_size)
    done = yield from worker.train(
        candidate, rate=rate, seed=0, steps=PROBE_STEPS, with_result=False
    )
    if done.failure:
        return PROBE_STEPS  # what fails here fails in the search, and is told there
    # The first step is not in `seconds`: it compiles and allocates.
    return max(1, math.floor(seconds * (PROBE_STEPS - 1) / done.summary["seconds"]))


def search(
    worker: JobRunner, candidate: Candidate, steps: int
) -> Asking[tuple[list[tuple[float, FinishedRun]], int | None]]:
    """(rate, run) in rising order, and the place of the best; None where no run came to an end."""
    comparison = worker.comparison
    default = candidate.config.peak_learning_rate(worker.hidden_size)
    factors = sorted(comparison.factors)
    step = factors[-1] / factors[-2] if len(factors) > 1 else 3.0
    tried: dict[float, FinishedRun] = {}

    def rate_of(factor: float) -> float:
        return float(f"{default * factor:.3g}")

    left = comparison.extend if len(factors) > 1 else 0
    while True:
        new = [rate for rate in dict.fromkeys(map(rate_of, factors)) if rate not in tried]
        done = yield from together(
            worker.train(candidate, rate=rate, seed=0, steps=steps, with_result=False)
            for rate in new
        )
        tried.update(zip(new, done, strict=True))
        losses = [_loss(tried[rate_of(factor)]) for factor in factors]
        best = losses.index(min(losses))
        if not math.isfinite(losses[best]):
            best_place = None
            break
        best_place = best
        if left == 0 or 0 < best < len(factors) - 1:
            break
        left -= 1
        worker.pace.one_more()
        end = "lowest" if best == 0 else "highest"
        worker.say(
            f"{candidate.name} did best at the {end} learning rate that was tried,"
            f" {rate_of(factors[best]):g}: one more run tries a rate beyond it (--extend 0: none)"
        )
        factors = [factors[0] / step, *factors] if best == 0 else [*factors, factors[-1] * step]
    found = [(tried[f].config.learning_rate or 0.0, tried[f]) for f in map(rate_of, factors)]
    if best_place is not None:
        for each in tried.values():
            if each is not found[best_place][1]:
                worker.drop_result(each)
    return found, best_place


def _loss(done: FinishedRun) -> float:
    return math.inf if done.loss is None or not math.isfinite(done.loss) else done.loss
