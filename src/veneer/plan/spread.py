"""A step over several processes: how long the one with most to compute takes, what goes over the
network, how long that takes on a link. Computed from the plan that the run itself makes
(training/processes/dealing.py), measured nowhere.

    gradient   one sum a step over a ring: 2 (N - 1) / N of its bytes from each process
    layers     in shards: each is gathered forward and again backward, (N - 1) / N of its bytes from
               each process. The last one is still whole when backward begins, the first when the
               next micro-batch does
    full       in shards: each layer's gradient goes to its owners behind every micro-batch, (N - 1)
               / N of its bytes
    small      what processes decide together: a few numbers, which cost their way alone

Every process is taken to be as fast as the others, and nothing is computed while something is sent.
Units: bytes, seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.bounds import LINK
from veneer.errors import ConfigError
from veneer.plan.counted import SUM_BYTES, DryRun
from veneer.training.processes.dealing import dealt, in_rounds
from veneer.training.processes.reduce import ReduceKind

HOP_SECONDS = 50e-6
"""From one process to the next, however little is sent: assumed, of TCP within a building."""
SMALL_SUMS = 6
"""Of a few numbers, in every step: losses and counts, faults, time by part, whether to stop
(training/loop.py)."""
VALUE_BYTES = {"plain": 4, "exact": SUM_BYTES}
"""Of each trained value, in the sum of a step's gradient."""

Costs = Sequence[Sequence[int]]
"""Of each step its micro-batches', in tokens."""


@dataclass(frozen=True)
class StepTraffic:
    """By each process in each step, bytes; it receives as many. hops: one after another."""

    gradient: int = 0
    layers: int = 0
    gradient_hops: int = 0
    layers_hops: int = 0


@dataclass(frozen=True)
class StepTime:
    """Of one step, at the process that computes for the mean time. wait: for the one that has most
    to compute."""

    compute: float
    wait: float = 0.0
    reduce: float = 0.0
    gather: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.wait + self.reduce + self.gather

    @property
    def efficiency(self) -> float:
        """Part of the time in which a process computes what one alone would compute too."""
        return self.compute / self.seconds


def sent(
    run: DryRun, processes: int, *, reduce: ReduceKind, shard: bool, rounds: float
) -> StepTraffic:
    """rounds: micro-batches that a process computes in a step."""
    if processes == 1:
        return StepTraffic()
    ring, small = 2 * (processes - 1), SMALL_SUMS
    runs = run.base.runs(processes) if shard else []
    gathered = [*runs, *reversed(runs[:-1])][1:]
    in_parts = shard and run.trainable_parameters == run.total_parameters
    times = rounds * (processes - 1) if in_parts else ring
    return StepTraffic(
        round(times / processes * VALUE_BYTES[reduce] * run.trainable_parameters),
        round(rounds * (processes - 1) * sum(gathered)),
        ring * (1 + small),
        # Before each one the processes tell each other that they ask for it: a small sum.
        round(rounds * len(gathered) * (ring + processes - 1)),
    )


def longest_share(costs: Costs, processes: int, *, together: bool) -> float:
    """Of all that is computed in a step, what its busiest process takes: 1 / processes at best.
    together: in rounds, each of which takes as long as its costliest micro-batch."""
    longest = total = 0
    for step in costs:
        total += sum(step)
        if together:
            longest += sum(
                max(step[number] for number in each) for each in in_rounds(step, processes)
            )
        else:
            shares = [0] * processes
            for cost, owner in zip(step, dealt(step, processes), strict=True):
                shares[owner] += cost
            longest += max(shares)
    return longest / total


def step_time(
    alone: float, share: float, processes: int, sends: StepTraffic, link: float | None
) -> StepTime:
    """alone: seconds in which one process computes the step. link: bytes a second; None: nothing is
    said of it, and sending takes no time."""
    compute = alone / processes
    wait = max(0.0, alone * share - compute)
    if link is None:
        return StepTime(compute, wait)
    return StepTime(
        compute,
        wait,
        sends.gradient / link + sends.gradient_hops * HOP_SECONDS,
        sends.layers / link + sends.layers_hops * HOP_SECONDS,
    )


def parse_link(text: str) -> float:
    """10Gb/s, 10 Gbit/s, 25Gbps, 3GB/s -> bytes a second: b is a bit, B a byte. ConfigError
    otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(b|bit|B)(?:/s|ps)\s*", text)
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    found = (
        0.0 if match is None else float(match[1]) * factor[match[2]] / (1 if match[3] == "B" else 8)
    )
    if match is None or not LINK.holds(found):
        raise ConfigError(
            f"{text[:40]!r} is no speed of a link",
            next_step="Write for instance 10Gb/s (bits) or 3GB/s (bytes), from 8kb/s on.",
        )
    return found
