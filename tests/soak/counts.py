"""How many rounds the loops of this folder run: a few in `make test`, any number in `make soak`.

A round is one number, and the number is the seed: the same number is the same round everywhere.
`python -m tests.soak` runs the loops in slices and sets, for each slice:

VENEER_SOAK_KILLS=50        rounds of the loop "kills"
VENEER_SOAK_FIRST=200       number of the first round

Without them a loop runs its few rounds from number 0.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rounds(name: str, *, ci: int) -> range:
    """Returns the numbers of the rounds to run of the loop `name`."""
    number = int(os.environ.get(f"VENEER_SOAK_{name.upper()}", ci))
    first = int(os.environ.get("VENEER_SOAK_FIRST", "0"))
    return range(first, first + number)


def chosen(cases: Sequence[T], name: str, *, ci: int) -> list[T]:
    """Returns the cases to run of a loop whose rounds are the cases of a list; none behind its
    end."""
    numbers = rounds(name, ci=ci)
    return list(cases[numbers.start : numbers.stop])
