"""The points of --sweep: every combination of the listed values, or random draws.

    learning_rate=3e-4,1e-3      values: YAML texts
    learning_rate=log:1e-4..3e-3 a range to draw from, its logarithm evenly
    warmup=even:0..0.1           a range to draw from evenly

Ends without a point or an exponent are whole numbers, and so are the values drawn between them.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from veneer.cli.config_file import FLAGS
from veneer.vocabulary import KeyPath

Point = list[tuple[str, KeyPath, str]]
"""Values of a sweep for one job: name, path and YAML text of each."""
MOST_TRIES = 50
"""Draws for each new point, before the sweep counts as having too few points."""


@dataclass(frozen=True)
class Range:
    """A range of numbers. by_log: its logarithm is drawn evenly."""

    low: float
    high: float
    by_log: bool
    whole: bool

    def draw(self, chance: random.Random) -> str:
        """Returns a number within the range, rounded to three digits, or to a whole number."""
        if self.whole and not self.by_log:
            return str(chance.randint(int(self.low), int(self.high)))
        if self.by_log:
            value = math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = chance.uniform(self.low, self.high)
        rounded = round(value) if self.whole else float(f"{value:.3g}")
        value = min(max(rounded, self.low), self.high)
        return str(int(value)) if self.whole else f"{value:g}"


@dataclass(frozen=True)
class Axis:
    """One setting of a sweep: its name, its path, and its values or their range."""

    name: str
    path: KeyPath
    values: Sequence[str]
    range: Range | None = None

    def __len__(self) -> int:
        return len(self.values)

    def draw(self, chance: random.Random) -> str:
        return chance.choice(self.values) if self.range is None else self.range.draw(chance)


def read_axes(sweep: Sequence[str], *, ranges: bool, faults: list[str]) -> list[Axis]:
    """Reads --sweep; adds what cannot be read to faults. ranges: whether ranges are allowed."""
    axes: list[Axis] = []
    for text in sweep:
        name, sign, listed = text.partition("=")
        values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", listed)]
        if not sign or not name or not all(values):
            faults.append(f"C314 --sweep {text}: write name=value,value, for instance rank=8,32")
            continue
        path = FLAGS.get(name.replace("-", "_"), tuple(name.split(".")))
        if re.match("(log|even):", listed):
            drawn = _read_range(listed)
            if drawn is None:
                faults.append(
                    f"C314 --sweep {text}: write a range as log:LOW..HIGH or even:LOW..HIGH, with"
                    " LOW below HIGH, above 0 for log"
                )
            elif not ranges:
                faults.append(f"C314 --sweep {text}: a range needs --draws N")
            else:
                axes.append(Axis(name, path, [], drawn))
            continue
        axes.append(Axis(name, path, list(dict.fromkeys(values))))
    for path, count in Counter(axis.path for axis in axes).items():
        if count > 1:
            faults.append(
                f"C314 --sweep gives {'.'.join(path)} {count} times: write all its values in one"
                " list, for instance rank=8,16"
            )
    # A method is named before its settings are given: another name clears them.
    return sorted(axes, key=lambda axis: axis.path != FLAGS["method"])


def _read_range(text: str) -> Range | None:
    """Parses log:LOW..HIGH or even:LOW..HIGH; None if it is malformed."""
    kind, _, ends = text.partition(":")
    texts = [end.strip() for end in ends.split("..", 1)] if ".." in ends else []
    try:
        low, high = map(float, texts)
    except ValueError:
        return None
    by_log = kind == "log"
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (by_log and low <= 0):
        return None
    return Range(low, high, by_log, all(re.fullmatch(r"-?\d+", end) for end in texts))


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Returns every combination of the values."""
    return [
        [(axis.name, axis.path, value) for axis, value in zip(axes, values, strict=True)]
        for values in product(*(axis.values for axis in axes))
    ]


def draw(axes: Sequence[Axis], count: int, seed: int, faults: list[str]) -> list[Point]:
    """Draws so many different points, the same ones for the same seed."""
    chance = random.Random(seed)
    points: dict[tuple[str, ...], None] = {}
    for _ in range(MOST_TRIES * count if axes else 0):
        if len(points) == count:
            break
        points[tuple(axis.draw(chance) for axis in axes)] = None
    if axes and len(points) < count:
        faults.append(
            f"C314 --draws {count}: the sweep has only {len(points)} different points; leave"
            " --draws out to train them all"
        )
    return [
        [(axis.name, axis.path, value) for axis, value in zip(axes, values, strict=True)]
        for values in points
    ]
