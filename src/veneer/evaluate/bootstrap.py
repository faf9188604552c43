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
"""(N, K): a line for each row; (K): their sum."""
OfTotals = Callable[[Counts], float]
"""A figure from the sums of counts (K)."""


def interval(
    counts: Counts, of_totals: OfTotals, *, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float]:
    """(low, high) of the figure over resampled rows. counts (N, K), N at least 1."""
    return _ends([of_totals(totals) for totals in _resampled(counts, seed)], level)


def paired_difference(
    ours: Counts, theirs: Counts, of_totals: OfTotals, *, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float, float]:
    """(difference, low, high) of ours minus theirs on the same rows, each draw taken for both. Both (N, K)."""
    assert ours.shape == theirs.shape
    width = ours.shape[1]
    drawn = _resampled(np.concatenate([ours, theirs], axis=1), seed)
    low, high = _ends([of_totals(t[:width]) - of_totals(t[width:]) for t in drawn], level)
    return of_totals(ours.sum(axis=0)) - of_totals(theirs.sum(axis=0)), low, high


def seeds_interval(
    counts: Counts, of_totals: OfTotals, *, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float]:
    """(low, high) over resampled seeds and rows. counts (S, N, K): runs that differ in their seed, on the same rows.

    With one seed this is `interval`: how much another seed would change cannot be known from one.
    """
    return _ends([of_totals(totals) for totals in _resampled_seeds(counts, seed)], level)


def seeds_difference(
    ours: Counts, theirs: Counts, of_totals: OfTotals, *, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float, float]:
    """(difference, low, high): as paired_difference, over seeds too. Both (S, N, K), seed by seed and row by row."""
    assert ours.shape == theirs.shape
    width = ours.shape[2]
    drawn = _resampled_seeds(np.concatenate([ours, theirs], axis=2), seed)
    low, high = _ends([of_totals(t[:width]) - of_totals(t[width:]) for t in drawn], level)
    return of_totals(ours.sum(axis=(0, 1))) - of_totals(theirs.sum(axis=(0, 1))), low, high


def _resampled(counts: Counts, seed: int) -> Iterator[Counts]:
    if not len(counts):
        raise ValueError("no rows to resample")
    rows, random = len(counts), np.random.default_rng(seed)
    even = np.full(rows, 1 / rows)
    for start in range(0, RESAMPLES, CHUNK):
        times = random.multinomial(rows, even, size=min(CHUNK, RESAMPLES - start))
        yield from times @ counts


def _resampled_seeds(counts: Counts, seed: int) -> Iterator[Counts]:
    """Draws of rows, and for each a draw of seeds: the same rows for every seed of a draw."""
    if not counts.size:
        raise ValueError("no rows to resample")
    seeds, random = len(counts), np.random.default_rng([seed, 1])
    flat = counts.transpose(1, 0, 2).reshape(counts.shape[1], -1)  # (N, S * K)
    for totals in _resampled(flat, seed):
        times = random.multinomial(seeds, np.full(seeds, 1 / seeds))
        yield times @ totals.reshape(seeds, -1)


def _ends(figures: list[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
