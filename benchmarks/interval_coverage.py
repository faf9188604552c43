"""How often the intervals of evaluation/intervals.py hold the truth, by figure and number of rows.

    python benchmarks/interval_coverage.py                  (two minutes on one core)
    python benchmarks/interval_coverage.py --draws 20000    (for the second digit)

Shares of right rows are computed exactly. Everything else is drawn: `--draws` sets of rows from a
known distribution, and for each whether its interval holds the true figure. One standard error of
2,000 draws is 0.5 points.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from veneer.evaluation.intervals import Counts, OfTotals, interval, paired_difference
from veneer.evaluation.metrics.metric import ratio

ROWS = (5, 10, 20, 50, 200)
SHARES = (0.5, 0.9, 0.97, 0.99)
PAIRS = ((0.5, 0.5), (0.9, 0.9), (0.99, 0.99), (0.97, 0.9), (0.9, 0.5), (0.99, 0.5))
Random = np.random.Generator


class Case(NamedTuple):
    """Draws one set of rows: (ours, theirs or None). truth: the figure of endless rows.

    prompts: gives each of N rows the number of its prompt; None if every row has its own
    """

    name: str
    draw: Callable[[Random, int], tuple[Counts, Counts | None]]
    truth: float
    share: bool = False
    of_totals: OfTotals = ratio
    prompts: Callable[[int], list[int]] | None = None


class Found(NamedTuple):
    share: float
    """Intervals that hold the truth."""
    width: float
    """Median."""


def exact_share(rows: int, share: float) -> float:
    """The probability that the interval of `rows` right or wrong rows holds the true share."""
    held = 0.0
    for right in range(rows + 1):
        low, high = _right(right, rows)
        if low <= share <= high:
            held += math.comb(rows, right) * share**right * (1 - share) ** (rows - right)
    return held


@cache
def _right(right: int, rows: int) -> tuple[float, float]:
    ends = interval(np.array([[1.0, 1.0]] * right + [[0.0, 1.0]] * (rows - right)), ratio)
    assert ends is not None
    return ends[0], ends[1]


def drawn(case: Case, rows: int, draws: int, *, seed: int) -> Found:
    random, held, widths = np.random.default_rng(seed), 0, []
    prompts = None if case.prompts is None else case.prompts(rows)
    for _ in range(draws):
        ours, theirs = case.draw(random, rows)
        if theirs is None:
            ends = interval(ours, case.of_totals, share=case.share, prompts=prompts)
        else:
            ends = paired_difference(
                ours, theirs, case.of_totals, share=case.share, prompts=prompts
            )[1]
        if ends is not None:
            held += ends[0] <= case.truth <= ends[1]
            widths.append(ends[1] - ends[0])
    return Found(held / draws, float(np.median(widths)) if widths else math.nan)


def _table(values: Counts, weights: Counts | None = None) -> Counts:
    weights = np.ones_like(values) if weights is None else weights
    return np.stack([values * weights, weights], axis=-1)


def paired_shares(ours: float, theirs: float, correlation: float = 0.5) -> Case:
    """Rows that are easy or hard for both: right where a normal value lies below each side's
    threshold."""
    limits = np.array([NormalDist().inv_cdf(share) for share in (ours, theirs)])

    def draw(random: Random, rows: int) -> tuple[Counts, Counts]:
        common = random.normal(size=(rows, 1)) * math.sqrt(correlation)
        right = common + random.normal(size=(rows, 2)) * math.sqrt(1 - correlation) < limits
        return _table(right[:, 0].astype(float)), _table(right[:, 1].astype(float))

    return Case(f"share {ours:g} minus {theirs:g}", draw, ours - theirs)


def seeded_shares(share: float, seeds: int, spread: float) -> Case:
    """Several seeds on the same rows; spread: between the thresholds of the seeds."""
    limit = NormalDist().inv_cdf(share) * math.sqrt(2 + spread**2)

    def draw(random: Random, rows: int) -> tuple[Counts, None]:
        hard = (
            random.normal(size=rows)
            + random.normal(size=(seeds, rows))
            + spread * random.normal(size=(seeds, 1))
        )
        return _table((hard < limit).astype(float)), None

    return Case(f"share {share:g}, {seeds} seeds", draw, share)


def graded(perfect: float) -> Case:
    """Rows in 0 to 1, such as ROUGE: this share of them perfect, the others anything."""

    def draw(random: Random, rows: int) -> tuple[Counts, None]:
        return _table(np.where(random.random(rows) < perfect, 1.0, random.random(rows))), None

    return Case(
        f"mean of rows in 0 to 1, {perfect:.0%} perfect",
        draw,
        perfect + (1 - perfect) / 2,
        share=True,
    )


def _tokens(random: Random, rows: int) -> Counts:
    return random.integers(5, 60, rows).astype(float)


def _one(name: str, draw: Callable[[Random, int], Counts], truth: float) -> Case:
    return Case(
        name, lambda random, rows: (_table(draw(random, rows), _tokens(random, rows)), None), truth
    )


def _change(name: str, draw: Callable[[Random, int], tuple[Counts, Counts]], truth: float) -> Case:
    def tables(random: Random, rows: int) -> tuple[Counts, Counts]:
        (ours, theirs), tokens = draw(random, rows), _tokens(random, rows)
        return _table(ours, tokens), _table(theirs, tokens)

    return Case(name, tables, truth)


def _normal_change(random: Random, rows: int) -> tuple[Counts, Counts]:
    before = random.normal(3, 1, rows)
    return before - random.normal(1, 0.5, rows), before


def _skewed_change(random: Random, rows: int) -> tuple[Counts, Counts]:
    before = random.gamma(2.0, 1.0, rows)
    return before * random.beta(2, 2, rows), before


LOSSES = {
    "normal": (
        _one("loss, rows normal", lambda random, rows: random.normal(3, 1, rows), 3.0),
        _change("change of the loss, rows normal", _normal_change, -1.0),
    ),
    "skewed": (
        _one(
            "loss, rows gamma(2): skewness 1.4",
            lambda random, rows: random.gamma(2.0, 1.0, rows),
            2.0,
        ),
        _one(
            "loss, rows exponential: skewness 2",
            lambda random, rows: random.exponential(1.0, rows),
            1.0,
        ),
        _change("change of the loss, rows gamma(2)", _skewed_change, -1.0),
    ),
    "very skewed": (
        _one(
            "loss, rows lognormal: skewness 6.2",
            lambda random, rows: random.lognormal(0, 1, rows),
            math.exp(0.5),
        ),
        _one(
            "loss, one row in ten 40 times the others",
            lambda random, rows: random.exponential(np.where(random.random(rows) < 0.1, 2.0, 0.05)),
            0.245,
        ),
    ),
}


def _uneven(random: Random, rows: int) -> tuple[Counts, None]:
    """Losses gamma(4, 0.5) of rows whose numbers of tokens are lognormal: a few rows hold most of
    the tokens."""
    tokens = np.ceil(random.lognormal(3, 1, rows))
    return _table(random.gamma(4.0, 0.5, rows), tokens), None


LOSSES["uneven"] = (Case("loss, tokens of a row lognormal", _uneven, 2.0),)


ANSWERS = 5
"""Rows of each prompt in SHARED."""


def _prompts(rows: int) -> list[int]:
    return [row // ANSWERS for row in range(rows)]


def _of_prompts(random: Random, rows: int) -> Counts:
    """Draws normal values with variance 1; rows of a prompt have a correlation of 0.7."""
    prompts = np.repeat(random.normal(size=-(-rows // ANSWERS)), ANSWERS)[:rows]
    return math.sqrt(0.7) * prompts + math.sqrt(0.3) * random.normal(size=rows)


def _shared_loss(random: Random, rows: int) -> tuple[Counts, None]:
    return _table(3 + _of_prompts(random, rows), _tokens(random, rows)), None


def _shared_change(random: Random, rows: int) -> tuple[Counts, Counts]:
    before, tokens = random.normal(3, 1, rows), _tokens(random, rows)
    after = before - 1 + 0.5 * _of_prompts(random, rows)
    return _table(after, tokens), _table(before, tokens)


def _shared_share(random: Random, rows: int) -> tuple[Counts, None]:
    return _table((_of_prompts(random, rows) < 0).astype(float)), None


def _shared_shares(random: Random, rows: int) -> tuple[Counts, Counts]:
    sides = [(_of_prompts(random, rows) < 0).astype(float) for _ in range(2)]
    return _table(sides[0]), _table(sides[1])


SHARED = {
    "loss": Case("loss, five rows a prompt", _shared_loss, 3.0, prompts=_prompts),
    "change": Case(
        "change of the loss, five rows a prompt", _shared_change, -1.0, prompts=_prompts
    ),
    "share": Case("share 0.5, five rows a prompt", _shared_share, 0.5, prompts=_prompts),
    "difference of shares": Case(
        "difference of shares, five rows a prompt", _shared_shares, 0.0, prompts=_prompts
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    print("| figure | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    for share in SHARES:
        cells = [f"{100 * exact_share(rows, share):.1f}%" for rows in ROWS]
        print(f"| share {share:g}, right or wrong rows | " + " | ".join(cells) + " |")
    cases = [paired_shares(*pair) for pair in PAIRS]
    cases += [graded(0.6), graded(0.97), seeded_shares(0.9, 3, 0.0), seeded_shares(0.5, 3, 0.3)]
    cases += [case for kind in LOSSES.values() for case in kind]
    for case in (*cases, *SHARED.values()):
        cells = []
        for rows in ROWS:
            found = drawn(case, rows, draws, seed=rows)
            cells.append(f"{100 * found.share:.1f}% ({found.width:.3g})")
        print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
