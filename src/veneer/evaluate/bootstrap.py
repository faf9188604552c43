"""Intervals: how far a figure could move if the rows (and the seeds) had been others.

A metric gives every row a line of counts, and its figure is a function of their sums (metric.py). So a resample
of rows is a vector of how often each was drawn, and all resamples are one matrix product: corpus figures such
as BLEU cost no more than a mean. Two runs are compared on the same draws, row by row.

Shapes: S seeds, N rows, K counts of a row, R resamples.
Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile intervals);
Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation (paired draws).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
"""Draws: the ends of a 95% interval then move by about a twentieth of its width."""
CHUNK = 100
"""Resamples drawn at once: bounds the memory of the draws to CHUNK * N numbers."""
LEVEL = 0.95
SEED = 0
"""The interval of the same answers is the same."""

Counts = NDArray[np.float64]
"""(N, K): a line for each row; (K): their sum; (S, N, K): the same of several seeds."""
OfTotals = Callable[[Counts], float]
"""A figure from the sums of counts (K)."""


def interval(counts: Counts, of_totals: OfTotals, *, seed: int = SEED, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of the figure over resampled rows. counts (N, K), N at least 1; or (S, N, K), runs that differ in
    their seed, on the same rows: then over resampled seeds too.

    One seed is as none: how much another would change cannot be known from one.
    """
    return _ends([of_totals(totals) for totals in _resampled(counts, seed)], level)


def paired_difference(
    ours: Counts, theirs: Counts, of_totals: OfTotals, *, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float, float]:
    """(difference, low, high) of ours minus theirs on the same rows (and seeds), each draw taken for both. Both (N, K),
    or both (S, N, K)."""
    assert ours.shape == theirs.shape
    width = ours.shape[-1]
    drawn = _resampled(np.concatenate([ours, theirs], axis=-1), seed)
    low, high = _ends([of_totals(t[:width]) - of_totals(t[width:]) for t in drawn], level)
    own, other = (counts.reshape(-1, width).sum(axis=0) for counts in (ours, theirs))
    return of_totals(own) - of_totals(other), low, high


def _resampled(counts: Counts, seed: int) -> Iterator[Counts]:
    """Sums of counts (K) over draws of rows, and for each a draw of seeds: the same rows for every seed of a draw."""
    if not counts.size:
        raise ValueError("no rows to resample")
    counts = counts if counts.ndim == 3 else counts[None]
    seeds, of_seeds = len(counts), np.random.default_rng([seed, 1])
    flat = counts.transpose(1, 0, 2).reshape(counts.shape[1], -1)  # (N, S * K)
    rows, random = len(flat), np.random.default_rng(seed)
    for start in range(0, RESAMPLES, CHUNK):
        drawn = random.multinomial(rows, np.full(rows, 1 / rows), size=min(CHUNK, RESAMPLES - start))
        for totals in drawn @ flat:
            times = of_seeds.multinomial(seeds, np.full(seeds, 1 / seeds))
            yield times @ totals.reshape(seeds, -1)


def _ends(figures: list[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
