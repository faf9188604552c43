"""Assigns whole micro-batches to the processes of a run by cost; every process makes the same
plan.
"""

from collections.abc import Sequence


def assign_by_cost(costs: Sequence[int], size: int) -> list[int]:
    """Returns the process of each micro-batch. Goes from the costliest micro-batch to the cheapest,
    and gives each to the process with the lowest total so far.

    Longest processing time first (Graham 1969): the longest total is at most 4/3 of the best
    plan's.
    """
    shares = [0] * size
    owner = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owner[number] = min(range(size), key=lambda rank: (shares[rank], rank))
        shares[owner[number]] += costs[number]
    return owner


def group_by_cost(costs: Sequence[int], size: int) -> list[list[int]]:
    """Groups micro-batches into rounds of at most `size` that are computed at the same time.

    Micro-batches of similar cost share a round, because all processes wait for the costliest.
    """
    order = sorted(range(len(costs)), key=lambda n: (-costs[n], n))
    return [order[start : start + size] for start in range(0, len(order), size)]
