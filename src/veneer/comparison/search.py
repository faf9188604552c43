"""Searches each candidate's learning rate, so that methods are compared rather than defaults.

Every rate trains once with seed 0 (sweep.py), and the lowest held-out loss wins. If the best rate
is at an end, the search continues in that direction, one rate at a time.
"""

import math

from veneer.comparison.execute import FinishedRun, JobRunner
from veneer.comparison.jobs import JobGenerator
from veneer.comparison.plan import Candidate
from veneer.comparison.sweep import train_rates

PROBE_STEPS = 6


def steps_within(runner: JobRunner, candidate: Candidate, seconds: float) -> JobGenerator[int]:
    """Returns the optimizer steps that fit into this training time, from a short run on this
    machine.
    """
    rate = candidate.usual_rate
    probe = yield from runner.train(
        candidate, rate=rate, seed=0, steps=PROBE_STEPS, with_result=False
    )
    if probe.failure:
        return PROBE_STEPS  # what fails here also fails in the search, which reports it
    # `seconds` excludes the first step, which compiles and allocates.
    return max(1, math.floor(seconds * (PROBE_STEPS - 1) / probe.summary["seconds"]))


def search(
    runner: JobRunner, candidate: Candidate, steps: int
) -> JobGenerator[tuple[list[tuple[float, FinishedRun]], int | None]]:
    """Returns ((rate, run) by increasing rate, index of the best or None if every run failed)."""
    comparison = runner.comparison
    default = candidate.usual_rate
    factors = sorted(comparison.factors)
    step = factors[-1] / factors[-2] if len(factors) > 1 else 3.0
    runs: dict[float, FinishedRun] = {}

    def rate_of(factor: float) -> float:
        return float(f"{default * factor:.3g}")

    extensions_left = comparison.extend if len(factors) > 1 else 0
    while True:
        new = [rate for rate in dict.fromkeys(map(rate_of, factors)) if rate not in runs]
        runs |= yield from train_rates(runner, candidate, new, steps)
        losses = [_loss(runs[rate_of(factor)]) for factor in factors]
        best = losses.index(min(losses))
        if not math.isfinite(losses[best]):
            best_place = None
            break
        best_place = best
        if extensions_left == 0 or 0 < best < len(factors) - 1:
            break
        extensions_left -= 1
        runner.pace.one_more()
        end = "lowest" if best == 0 else "highest"
        runner.say(
            f"{candidate.name} did best at the {end} learning rate tried,"
            f" {rate_of(factors[best]):g}: one more run tries a rate beyond it (--extend 0: none)"
        )
        factors = [factors[0] / step, *factors] if best == 0 else [*factors, factors[-1] * step]
    results = [
        (runs[rate].config.learning_rate or 0.0, runs[rate]) for rate in map(rate_of, factors)
    ]
    if best_place is not None:
        for run in runs.values():
            if run is not results[best_place][1]:
                runner.drop_result(run)
    return results, best_place


def _loss(run: FinishedRun) -> float:
    return math.inf if run.loss is None or not math.isfinite(run.loss) else run.loss
