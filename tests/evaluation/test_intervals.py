"""Intervals against published values, and how often they hold the truth (more in
benchmarks/interval_coverage.py)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veneer.evaluation.intervals import Counts, _beta_cdf, _t_quantile, interval, paired_difference
from veneer.evaluation.metrics.json_fields import field_f1
from veneer.evaluation.metrics.metric import ratio

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"


def shares(*values: float) -> Counts:
    return np.array([[value, 1.0] for value in values])


def known(ends: list[float] | None) -> list[float]:
    assert ends is not None
    return ends


@pytest.fixture(scope="module")
def coverage() -> Any:
    spec = importlib.util.spec_from_file_location("interval_coverage", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [  # R's binom.test
        (7, 7, 0.5903836, 1.0),
        (0, 20, 0.0, 0.1684335),
        (19, 20, 0.7512672, 0.9987349),
        (81, 263, 0.2527367, 0.3676219),
    ],
)
def test_a_share_of_rows_has_the_exact_interval(
    right: int, rows: int, low: float, high: float
) -> None:
    found = interval(shares(*[1.0] * right, *[0.0] * (rows - right)), ratio)
    assert found == pytest.approx([low, high], abs=1e-7)


def test_a_share_of_a_million_rows_has_the_width_of_theory() -> None:
    low, high = known(interval(shares(*[1.0, 0.0] * 500_000), ratio))
    assert high - low == pytest.approx(2 * 1.959964 / 2000, rel=2e-3)


def test_students_quantiles_are_those_of_tables() -> None:
    for degrees, quantile in (
        (1, 12.7062),
        (4, 2.77645),
        (9, 2.26216),
        (199, 1.97196),
        (1e7, 1.95996),
    ):
        assert _t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-5)
    assert _t_quantile(0.995, 9) == pytest.approx(3.24984, rel=1e-5)
    assert _beta_cdf(0.0, 2, 3) == 0 and _beta_cdf(1.0, 2, 3) == 1
    assert _beta_cdf(0.3, 2, 3) == pytest.approx(6 * 0.3**2 - 8 * 0.3**3 + 3 * 0.3**4)


def test_the_interval_of_a_loss_is_students_where_rows_are_symmetric() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) + 7
    far = 2.77645 * values.std(ddof=1) / math.sqrt(5)
    assert interval(shares(*values), ratio) == pytest.approx([7 - far, 7 + far], rel=1e-5)


def test_a_long_tail_moves_both_ends_towards_it() -> None:
    values = np.random.default_rng(0).exponential(size=30)
    far = _t_quantile(0.975, 29) * values.std(ddof=1) / math.sqrt(30)
    low, high = known(interval(shares(*values), ratio))
    assert low > values.mean() - far and high > values.mean() + far
    mirrored = known(interval(shares(*-values), ratio))
    assert mirrored == pytest.approx([-high, -low])


def test_hall_transformation_maps_the_ends_back_to_students_quantiles() -> None:
    values = np.random.default_rng(0).exponential(size=30)
    error = values.std(ddof=1) / math.sqrt(30)
    skew = ((values - values.mean()) ** 3).mean() / (30**2 * error**3)
    for end, quantile in zip(
        known(interval(shares(*values), ratio)), (2.04523, -2.04523), strict=True
    ):
        x = (values.mean() - end) / error
        assert x + skew * x**2 / 3 + skew**2 * x**3 / 27 + skew / 6 == pytest.approx(
            quantile, rel=1e-5
        )


def test_a_ratio_depends_on_rows_with_all_their_counts() -> None:
    table = np.array([[2.0, 4.0], [50.0, 100.0]] * 15)  # every row has the ratio of all
    assert interval(table, ratio) is None
    random = np.random.default_rng(4)
    tokens = random.integers(5, 50, 200)
    nats = tokens * random.normal(2, 0.5, 200)
    low, high = known(interval(np.stack([nats, tokens], axis=1), ratio))
    residuals = nats - ratio(np.array([nats.sum(), tokens.sum()])) * tokens
    linear = 2 * 1.972 * residuals.std(ddof=1) / math.sqrt(200) / tokens.mean()  # the delta method
    assert high - low == pytest.approx(linear, rel=0.03)


def test_a_share_always_has_a_width_and_stays_within_its_scale() -> None:
    for rows in (1, 2, 5, 20, 200):
        for value, edge in ((1.0, 1), (0.0, 0)):
            assert known(interval(shares(*[value] * rows), ratio))[edge] == value
            fields = np.array([[2.0 * value, 4.0]] * rows)
            low, high = known(interval(fields, field_f1, share=True))
            assert 0 <= low <= value <= high <= 1 and high - low > 2 / (rows + 3)
            ends = known(paired_difference(fields, fields, field_f1, share=True)[1])
            assert ends[0] == -ends[1] and 1 / (rows + 2) < ends[1] <= 1
            same = known(
                paired_difference(shares(*[value] * rows), shares(*[value] * rows), ratio)[1]
            )
            assert same == pytest.approx(ends)


def test_figures_without_bounds_have_no_interval_where_rows_do_not_determine_one() -> None:
    for table in (
        shares(0.3),
        shares(0.25, 0.25, 0.25),
        shares(1.5, math.inf),
        shares(1.5, math.nan),
    ):
        assert interval(table, ratio) is None
    assert paired_difference(shares(2.0), shares(3.0), ratio) == (-1.0, None)
    assert paired_difference(shares(2.0, 5.0), shares(3.0, 6.0), ratio) == (-1.0, None)


def test_a_difference_that_is_the_same_in_all_rows_has_no_interval() -> None:
    """Such as points of rows that are mostly alike: 10 rows are often all alike, and [d, d] would
    miss the truth."""
    random, alike = np.random.default_rng(6), 0
    for _ in range(100):
        theirs = random.normal(50, 10, 10)
        change = np.where(random.random(10) < 0.05, 9.0, 1.0)  # 1.4 in the mean of endless rows
        difference, ends = paired_difference(shares(*(theirs + change)), shares(*theirs), ratio)
        same = bool((change == change[0]).all())
        alike += same
        assert (ends is None) == same and (not same or difference == pytest.approx(1.0))
    assert alike > 40


def test_a_loss_is_not_below_zero_but_a_difference_may_be() -> None:
    ours, theirs = shares(0.01, 0.02, 3.0), shares(0.02, 0.01, 0.5)
    assert (
        known(interval(ours, ratio))[0] == 0 and known(interval(ours - [1.0, 0.0], ratio))[0] < -1
    )
    assert known(paired_difference(ours, theirs, ratio)[1])[0] < 0


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        interval(np.zeros((0, 2)), ratio)


def test_a_higher_level_gives_a_wider_interval() -> None:
    for values in (
        shares(*np.random.default_rng(0).normal(size=200)),
        shares(1, 0, 1, 1),
        shares(0.5, 0.2, 0.9),
    ):
        narrow, wide = (known(interval(values, ratio, level=level)) for level in (0.5, 0.99))
        assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_difference_on_the_same_rows_is_much_narrower_than_two_intervals() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(size=300)
    ours, theirs = hard + random.normal(0.1, 0.01, 300), hard
    difference, ends = paired_difference(shares(*ours), shares(*theirs), ratio)
    low, high = known(ends)
    assert difference == pytest.approx((ours - theirs).mean()) and low < difference < high
    assert high - low == pytest.approx(
        2 * 1.96796 * (ours - theirs).std(ddof=1) / math.sqrt(300), rel=0.01
    )
    own = known(interval(shares(*ours), ratio))
    assert own[1] - own[0] > 20 * (high - low)


def test_the_difference_of_two_shares_counts_a_row_more_for_either_side() -> None:
    """Bonett and Price with Student's quantile: 12 rows, 5 right here alone, 1 there alone."""
    ours, theirs = shares(*[1] * 9, *[0] * 3), shares(*[0] * 5, *[1] * 4, *[0] * 2, 1)
    difference, ends = paired_difference(ours, theirs, ratio)
    assert difference == pytest.approx(4 / 12)
    centre, square = (5 - 1) / 14, (6 + 2) / 14
    far = _t_quantile(0.975, 13) * math.sqrt((square - centre**2) / 13)
    assert ends == pytest.approx([centre - far, centre + far])


def test_one_seed_is_the_rows_alone_and_more_seeds_add_their_spread() -> None:
    rows = shares(*np.random.default_rng(3).normal(size=100))
    assert interval(rows[None], ratio) == interval(rows, ratio)
    steady = known(interval(np.stack([rows] * 4), ratio))
    assert steady == pytest.approx(interval(rows, ratio))
    moved = np.stack([rows + np.array([shift, 0.0]) for shift in (-0.3, -0.1, 0.1, 0.3)])
    low, high = known(interval(moved, ratio))
    of_rows, of_seeds = 1 / 100, 0.05 * 4 / 3 / 4
    assert high - low == pytest.approx(
        2 * _t_quantile(0.975, 5) * math.sqrt(of_rows + of_seeds), rel=0.15
    )


def test_seeds_that_move_both_sides_alike_leave_the_difference_alone() -> None:
    apart = np.random.default_rng(5).normal(0.05, 0.01, 30)
    ours = np.stack([shares(*(level + apart)) for level in (0.1, 0.5, 0.9)])
    theirs = np.stack([shares(*[level] * 30) for level in (0.1, 0.5, 0.9)])
    _, ends = paired_difference(ours, theirs, ratio)
    assert ends == pytest.approx(interval(shares(*apart), ratio))


def test_shares_hold_the_truth_in_95_of_100_at_any_number_of_rows(coverage: Any) -> None:
    """Computed, not drawn: every number of right rows, weighed by how likely it is."""
    for rows in (1, 5, 10, 20, 50, 200):
        for share in (0.5, 0.9, 0.97, 0.99):
            assert coverage.exact_share(rows, share) >= 0.95


@pytest.mark.parametrize("rows", [5, 10, 20, 50, 200])
def test_differences_of_shares_hold_the_truth(coverage: Any, rows: int) -> None:
    for pair in coverage.PAIRS:
        assert (
            coverage.drawn(coverage.paired_shares(*pair), rows, 150, seed=rows).share >= 0.92
        )  # 0.95 less 1.7 sd


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_losses_and_their_differences_hold_the_truth(coverage: Any, kind: str) -> None:
    for rows, floor in ((5, 0.88), (10, 0.89), (20, 0.91), (50, 0.92)):
        for case in coverage.LOSSES[kind]:
            assert coverage.drawn(case, rows, 400, seed=rows).share >= floor


def test_prompts_of_one_row_each_leave_the_interval_as_it_is() -> None:
    for rows in (shares(1, 0, 1, 1), shares(0.5, 0.2, 0.9), shares(1.0)):
        prompts = [9, 4, 7, 5][: len(rows)]
        assert interval(rows, ratio, prompts=prompts) == interval(rows, ratio)
        assert paired_difference(rows, rows[::-1], ratio, prompts=prompts) == paired_difference(
            rows, rows[::-1], ratio
        )


def test_the_rows_of_a_prompt_count_as_their_sum() -> None:
    random = np.random.default_rng(8)
    table = np.stack([random.gamma(2.0, 1.0, (3, 12)), random.integers(1, 9, (3, 12))], axis=-1)
    prompts = [3, 1, 3, 2, 1, 1, 8, 2, 3, 3, 8, 5]
    sums = np.stack(
        [table[:, np.array(prompts) == prompt].sum(axis=1) for prompt in (3, 1, 2, 8, 5)], axis=1
    )
    assert interval(table, ratio, prompts=prompts) == pytest.approx(interval(sums, ratio))
    ours, theirs = (side[:1] for side in (table, table[::-1]))
    ends = paired_difference(ours, theirs, ratio, prompts=prompts)[1]
    assert ends == pytest.approx(paired_difference(sums[:1], sums[2:], ratio)[1])
    right = shares(*[1.0] * 12)
    low, high = known(interval(right, ratio, prompts=[0, 1] * 6))
    assert high == 1 and low < known(interval(right, ratio))[0]


@pytest.mark.parametrize("kind", ["loss", "change", "share", "difference of shares"])
def test_rows_that_share_prompts_hold_the_truth(coverage: Any, kind: str) -> None:
    case = coverage.SHARED[kind]
    for prompts in (10, 40):
        assert coverage.drawn(case, 5 * prompts, 200, seed=prompts).share >= 0.90
    independent = case._replace(prompts=None)
    assert coverage.drawn(independent, 50, 200, seed=1).share < 0.85


def test_a_loss_of_rows_with_uneven_tokens_holds_the_truth_less_often(coverage: Any) -> None:
    for rows in (10, 20):
        share = coverage.drawn(*coverage.LOSSES["uneven"], rows, 400, seed=rows).share
        assert 0.87 <= share <= 0.95  # docs/guides/keep.md: 92.5% and 90.7%
