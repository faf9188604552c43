"""A step over several processes: its longest share of computing, what is sent, and how long that
takes.

Computed from the plan that the run itself makes (training/processes/assignment.py); nothing is
measured.

    gradient   one sum a step over a ring: each process sends 2 (N - 1) / N of its bytes
    layers     sharded: each is gathered forward and again backward, (N - 1) / N of its bytes from
               each process
    full       sharded: after every micro-batch each layer's gradient goes to its owners, (N - 1)
               / N of its bytes; what lies outside of the layers is gathered once
    small      common decisions: a few numbers, which cost latency alone

Assumes equally fast processes, and that nothing is computed while something is sent. Units: bytes,
seconds.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.bounds import LINK
from veneer.errors import ConfigError
from veneer.plan.simulation.step_counts import SUM_BYTES, DryRun
from veneer.training.processes.assignment import assign_by_cost, group_by_cost
from veneer.training.processes.reduce import ReduceKind

HOP_SECONDS = 50e-6
"""Latency from one process to the next: assumed, for TCP within a building."""
SMALL_SUMS = 6
"""Sums of a few numbers in every step: losses and counts, faults, time by part, whether to stop
(training/loop.py)."""
VALUE_BYTES = {"plain": 4, "exact": SUM_BYTES}
"""Bytes per trained value in the sum of a step's gradient."""

Costs = Sequence[Sequence[int]]
"""Tokens of each micro-batch, by step."""


@dataclass(frozen=True)
class StepTraffic:
    """Counts bytes that each process sends in a step; it receives as many. hops: successive
    messages.
    """

    gradient: int = 0
    layers: int = 0
    gradient_hops: int = 0
    layers_hops: int = 0


@dataclass(frozen=True)
class StepTime:
    """Divides the seconds of a step, at a process with a mean share. wait: for the slowest
    process. answers: in which one process writes the student's own answers.
    """

    compute: float
    wait: float = 0.0
    reduce: float = 0.0
    gather: float = 0.0
    answers: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.wait + self.reduce + self.gather + self.answers

    @property
    def efficiency(self) -> float:
        """Returns the share of the time that a single process would compute, too."""
        return (self.compute + self.answers) / self.seconds


def sent(
    run: DryRun, processes: int, *, reduce: ReduceKind, shard: bool, rounds: float
) -> StepTraffic:
    """Predicts what each process sends. rounds: micro-batches that a process computes in a step."""
    if processes == 1:
        return StepTraffic()
    ring, small = 2 * (processes - 1), SMALL_SUMS
    runs = run.base.runs(processes) if shard else []
    in_parts = shard and run.trainable_parameters >= run.total_parameters
    outside = (run.base.total - sum(run.base.layers)) // processes
    gathered = [*runs, *runs, *([outside] if in_parts else [])]
    times = rounds * (processes - 1) if in_parts else ring
    return StepTraffic(
        round(times / processes * VALUE_BYTES[reduce] * run.trainable_parameters),
        round(rounds * (processes - 1) * sum(gathered)),
        ring * (1 + small),
        # Before each layer the processes agree to gather it: a small sum.
        round(rounds * len(gathered) * (ring + processes - 1)),
    )


def longest_share(costs: Costs, processes: int, *, together: bool) -> float:
    """Returns the share of a step's computing at its busiest process, 1 / processes at best.

    together: in rounds, each as long as its costliest micro-batch.
    """
    longest = total = 0
    for step in costs:
        total += sum(step)
        if together:
            longest += sum(
                max(step[number] for number in numbers)
                for numbers in group_by_cost(step, processes)
            )
        else:
            shares = [0] * processes
            for cost, owner in zip(step, assign_by_cost(step, processes), strict=True):
                shares[owner] += cost
            longest += max(shares)
    return longest / total


def step_time(
    single_seconds: float, share: float, processes: int, traffic: StepTraffic, link: float | None
) -> StepTime:
    """Predicts a step over processes. alone: seconds on one process.

    link: bytes a second; None: unknown, and sending takes no time.
    """
    compute = single_seconds / processes
    wait = max(0.0, single_seconds * share - compute)
    if link is None:
        return StepTime(compute, wait)
    return StepTime(
        compute,
        wait,
        traffic.gradient / link + traffic.gradient_hops * HOP_SECONDS,
        traffic.layers / link + traffic.layers_hops * HOP_SECONDS,
    )


def parse_link(text: str) -> float:
    """Parses 10Gb/s, 10 Gbit/s, 25Gbps, 3GB/s to bytes a second (b: bit, B: byte), or raises
    ConfigError.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(b|bit|B)(?:/s|ps)\s*", text)
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    speed = (
        0.0 if match is None else float(match[1]) * factor[match[2]] / (1 if match[3] == "B" else 8)
    )
    if match is None or not LINK.holds(speed):
        raise ConfigError(
            f"{text[:40]!r} is no speed of a link",
            next_step="Write for instance 10Gb/s (bits) or 3GB/s (bytes), from 8kb/s on.",
        )
    return speed
