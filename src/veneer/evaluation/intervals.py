"""95% intervals of figures over rows (and seeds).

    a share of rows, each right or wrong     Clopper and Pearson: exact, covers at least 95% at any
                                             number of rows
    other shares, differences of two shares  Student's t over the rows and two more, one at each end
                                             of the scale (Bonett and Price): never without width
    losses, points and their differences     Student's t, corrected for skewness (Hall)

A metric gives every row a line of counts, and its figure is a function of their sums (metric.py).
What each row adds to the figure is its jackknife pseudo-value, so a corpus figure such as BLEU is
treated as a mean is. A difference is taken row by row on the same rows. Several seeds add the
variance of the seeds' own figures, with Satterthwaite's degrees of freedom; rows of unequal weight
count as fewer. Rows that share a prompt depend on each other: their counts are summed, and a prompt
is left out as a whole (the jackknife over clusters). `benchmarks/interval_coverage.py` prints how
often the intervals hold the truth.

Shapes: S seeds, N rows, K counts of a row. Sources: Clopper and Pearson 1934, Biometrika 26; Bonett
and Price 2012, J. Educ. Behav. Stat. 37 (4); Hall 1992, J. R. Stat. Soc. B 54 (1), the monotone
cubic transformation; Efron 1982, The Jackknife; Satterthwaite 1946, Biometrics 2 (6); Kish 1965,
Survey Sampling.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_TINY = 1e-300

Counts = NDArray[np.float64]
"""(N, K): a line for each row; (K): their sum; (S, N, K): the same of several seeds."""
Figures = dict[str, Any]
"""Figures by name, ready for JSON."""
OfTotals = Callable[[Counts], float]
"""A figure from the sums of counts (K)."""
Ends = list[float]
"""Low and high, as JSON has them."""


def interval(
    counts: Counts,
    of_totals: OfTotals,
    *,
    share: bool = False,
    signed: bool = False,
    prompts: Sequence[int] | None = None,
    level: float = LEVEL,
) -> Ends | None:
    """Returns [low, high] of the figure. counts (N, K), N at least 1; or (S, N, K): runs that
    differ in their seed, on the same rows, and the interval is then over seeds too. One seed says
    nothing of what another would change.

    share    the figure lies between 0 and 1. A mean of rows that are all 0 or 1 is a share by
             itself
    signed   the figure may be below 0 and is no share, whatever the rows count
    prompts  (N) equal numbers for rows with the same prompt; None if every row has its own
    Returns None if the rows do not determine an interval: a single row of a figure without bounds,
    rows that are all alike, or a figure that is not finite.
    """
    counts = _with_seeds(counts)
    if not share and not signed:
        share = _right_or_wrong(counts)
    counts = _sum_prompts(counts, prompts)
    if len(counts) == 1 and not signed and _right_or_wrong(counts):
        return list(_share_of_rows(int(counts[0, :, 0].sum()), counts.shape[1], level))
    bounds = [0.0, 1.0] if share else None
    ends = _student(*_pseudo_values(counts, of_totals), _effective_rows(counts), bounds, level)
    if ends is not None and not signed and counts.min() >= 0:  # losses and points are never below 0
        ends[0] = max(ends[0], 0.0)
    return ends


def paired_difference(
    ours: Counts,
    theirs: Counts,
    of_totals: OfTotals,
    *,
    share: bool = False,
    prompts: Sequence[int] | None = None,
    level: float = LEVEL,
) -> tuple[float, Ends | None]:
    """Ours minus theirs on the same rows (and seeds), and its [low, high]. Both (N, K), or both (S,
    N, K). share, prompts: as for `interval`.

    The interval is None in the cases that `interval` names. A difference that is the same in all
    rows is one of them: [d, d] would claim that no other row differs otherwise, and rows without
    any spread do not show that.
    """
    assert ours.shape == theirs.shape
    ours, theirs = _with_seeds(ours), _with_seeds(theirs)
    share = share or (_right_or_wrong(ours) and _right_or_wrong(theirs))
    ours, theirs = _sum_prompts(ours, prompts), _sum_prompts(theirs, prompts)
    figure, rows, seeds = _pseudo_values(ours, of_totals)
    other_figure, other_rows, other_seeds = _pseudo_values(theirs, of_totals)
    bounds, effective = (
        [-1.0, 1.0] if share else None,
        min(_effective_rows(ours), _effective_rows(theirs)),
    )
    ends = _student(
        figure - other_figure, rows - other_rows, seeds - other_seeds, effective, bounds, level
    )
    return figure - other_figure, ends


def _with_seeds(counts: Counts) -> Counts:
    if not counts.size:
        raise ValueError("no rows to compute an interval from")
    return counts if counts.ndim == 3 else counts[None]


def _sum_prompts(counts: Counts, prompts: Sequence[int] | None) -> Counts:
    """Sums the counts of rows with the same prompt, (S, P, K), in the order of the first rows."""
    if prompts is None:
        return counts
    places: dict[int, int] = {}
    place_of_row = [places.setdefault(prompt, len(places)) for prompt in prompts]
    if len(places) == counts.shape[1]:
        return counts
    sums = np.zeros((len(counts), len(places), counts.shape[2]))
    for row, place in enumerate(place_of_row):
        sums[:, place] += counts[:, row]
    return sums


def _right_or_wrong(counts: Counts) -> bool:
    """True if each row counts 0 or 1 of 1: the figure is then a share of the rows."""
    if counts.shape[-1] != 2:
        return False
    values, weights = counts[..., 0], counts[..., 1]
    return bool((weights == 1).all() and ((values == 0) | (values == 1)).all())


def _effective_rows(counts: Counts) -> float:
    """Returns the number of equally weighted rows with the same information (Kish 1965)."""
    rows = counts.sum(axis=0)
    if rows.shape[-1] != 2 or not rows[:, 1].any():
        return float(len(rows))
    return float(rows[:, 1].sum() ** 2 / (rows[:, 1] ** 2).sum())


def _pseudo_values(counts: Counts, of_totals: OfTotals) -> tuple[float, Counts, Counts]:
    """Returns the figure, and pseudo-values of each row (N) and each seed (S), whose mean is about
    the figure.
    """
    totals = counts.sum(axis=(0, 1))
    figure = of_totals(totals)
    rows, seeds = (_jackknife(counts.sum(axis=axis), totals, figure, of_totals) for axis in (0, 1))
    return figure, rows, seeds


def _jackknife(parts: Counts, totals: Counts, figure: float, of_totals: OfTotals) -> Counts:
    count = len(parts)
    if count == 1:
        return np.array([figure])
    with np.errstate(invalid="ignore"):  # a figure that is not finite has no interval
        return count * figure - (count - 1) * np.array([of_totals(totals - part) for part in parts])


def _student(
    figure: float, rows: Counts, seeds: Counts, effective: float, bounds: Ends | None, level: float
) -> Ends | None:
    """Computes an interval around the figure, from pseudo-values of rows (N) and seeds (S)."""
    rows = rows - rows.mean() + figure
    if bounds is not None:
        rows, effective = np.append(rows, bounds), effective + 2
    of_rows, of_seeds = _variance_of_mean(rows), _variance_of_mean(seeds)
    error = math.sqrt(of_rows + of_seeds)
    if not (math.isfinite(figure) and error > 1e-12 * abs(figure)):
        return None
    in_squares = of_rows**2 / max(effective - 1, 1.0) + of_seeds**2 / max(len(seeds) - 1, 1)
    quantile = _t_quantile((1 + level) / 2, error**4 / in_squares)
    if bounds is not None:
        low, high = float(rows.mean()) - quantile * error, float(rows.mean()) + quantile * error
        return [max(low, bounds[0]), min(high, bounds[1])]
    skew = float(((rows - figure) ** 3).mean()) / (len(rows) ** 2 * error**3)
    return [figure - error * _unskewed(quantile, skew), figure - error * _unskewed(-quantile, skew)]


def _variance_of_mean(values: Counts) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _unskewed(quantile: float, skew: float) -> float:
    """Corrects a quantile for skew: inverts x + skew x²/3 + skew² x³/27 + skew/6."""
    if abs(skew) < 1e-9:
        return quantile
    return float(np.cbrt(1 + skew * (quantile - skew / 6)) - 1) * 3 / skew


@lru_cache(maxsize=1024)
def _share_of_rows(right: int, rows: int, level: float) -> tuple[float, float]:
    """Returns Clopper and Pearson's interval of `right` of `rows`."""
    outside = (1 - level) / 2
    low = 0.0 if right == 0 else _solved(lambda p: _beta_cdf(p, right, rows - right + 1), outside)
    high = (
        1.0
        if right == rows
        else _solved(lambda p: _beta_cdf(p, right + 1, rows - right), 1 - outside)
    )
    return low, high


@lru_cache(maxsize=1024)
def _t_quantile(probability: float, degrees: float) -> float:
    """Returns the quantile of Student's t for a probability above one half."""
    ratio = _solved(lambda x: 1 - _beta_cdf(x, degrees / 2, 0.5) / 2, probability, falling=True)
    return math.sqrt(degrees * (1 - ratio) / ratio)


def _solved(function: Callable[[float], float], value: float, *, falling: bool = False) -> float:
    """Finds where a monotone function on 0 to 1 takes the value."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if (function(middle) < value) != falling:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Computes the regularised incomplete beta function, by Lentz's continued fraction (DLMF
    8.17.22).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d, c = 1 / _nonzero(1 + step * d), _nonzero(1 + step / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return math.exp(front) * fraction / a


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
