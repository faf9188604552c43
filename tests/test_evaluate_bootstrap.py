"""Intervals against theory, and paired draws against a plain reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veneer.evaluate.bootstrap import Counts, _ends, interval, paired_difference
from veneer.evaluate.metric import ratio


def shares(*values: float) -> Counts:
    return np.array([[value, 1.0] for value in values])


def test_the_interval_holds_the_mean_and_has_the_width_of_theory() -> None:
    low, high = interval(shares(*[1.0] * 40, *[0.0] * 60), ratio)
    width = 2 * 1.96 * math.sqrt(0.4 * 0.6 / 100)
    assert low < 0.4 < high
    assert math.isclose(high - low, width, rel_tol=0.15)  # 1000 draws place each end to about 5%


def test_each_end_leaves_half_of_what_the_level_leaves_on_its_side() -> None:
    figures = [float(place) for place in range(1001)]
    for level in (0.5, 0.9, 0.95, 0.99):
        outside = (1 - level) / 2 * 1000
        assert _ends(figures, level) == pytest.approx((outside, 1000 - outside))
    values = np.random.default_rng(0).exponential(size=400)
    low, high = interval(shares(*values), ratio)
    for end in (low - values.mean(), values.mean() - high):
        assert math.isclose(-end, 1.96 * values.std() / 20, rel_tol=0.12)


def test_a_higher_level_gives_a_wider_interval() -> None:
    values = shares(*np.random.default_rng(0).normal(size=200))
    narrow, wide = (interval(values, ratio, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    values = shares(*np.random.default_rng(0).normal(size=50))
    assert interval(values, ratio, seed=3) == interval(values, ratio, seed=3)
    assert interval(values, ratio, seed=3) != interval(values, ratio, seed=4)


def test_values_that_are_all_equal_have_no_width() -> None:
    assert interval(shares(*[0.25] * 7), ratio) == (0.25, 0.25)


def test_a_ratio_resamples_rows_with_all_their_counts() -> None:
    table = np.array([[2.0, 4.0], [50.0, 100.0]] * 15)  # every resample is one half
    assert interval(table, ratio) == (0.5, 0.5)


def test_no_rows_have_no_interval() -> None:
    with pytest.raises(ValueError, match="no rows"):
        interval(np.zeros((0, 2)), ratio)


def test_a_difference_on_the_same_rows_is_much_narrower_than_two_intervals() -> None:
    hard = np.random.default_rng(1).normal(size=300)
    ours, theirs = shares(*(hard + 0.1)), shares(*hard)
    difference, low, high = paired_difference(ours, theirs, ratio)
    assert math.isclose(difference, 0.1) and math.isclose(low, 0.1) and math.isclose(high, 0.1)
    own = interval(ours, ratio)
    assert own[1] - own[0] > 0.15


def test_the_difference_has_the_width_of_the_rows_own_differences() -> None:
    random = np.random.default_rng(2)
    a, b = random.normal(size=400), random.normal(size=400)
    difference, low, high = paired_difference(shares(*a), shares(*b), ratio)
    assert math.isclose(difference, (a - b).mean())
    assert math.isclose(high - low, 2 * 1.96 * (a - b).std() / 20, rel_tol=0.15)


def test_one_seed_is_the_rows_alone_and_more_seeds_add_their_spread() -> None:
    rows = shares(*np.random.default_rng(3).normal(size=100))
    assert interval(rows[None], ratio) == interval(rows, ratio)
    steady = np.stack([shares(*[0.5] * 100)] * 4)
    assert interval(steady, ratio) == (0.5, 0.5)
    apart = np.stack([shares(*[level] * 100) for level in (0.4, 0.5, 0.6, 0.7)])
    low, high = interval(apart, ratio)
    assert low < 0.5 < 0.6 < high


def test_seeds_that_move_both_sides_alike_leave_the_difference_alone() -> None:
    ours = np.stack([shares(*[level + 0.05] * 30) for level in (0.1, 0.5, 0.9)])
    theirs = np.stack([shares(*[level] * 30) for level in (0.1, 0.5, 0.9)])
    difference, low, high = paired_difference(ours, theirs, ratio)
    assert all(math.isclose(each, 0.05, abs_tol=1e-9) for each in (difference, low, high))
