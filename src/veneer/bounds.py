"""Defines the bounds of all numbers that a user gives in run files, flags and Python arguments.

field: Annotated[int, RANK] = 16
    in a pydantic model: a number out of bounds is one fault, in words
parser.add_argument("--rank", type=RANK)      on the command line
check_numbers(rank=(RANK, rank), seed=(SEED, seed))   in a function

Infinity and NaN are refused, and True is not 1. The bounds are generous: they refuse obvious
mistakes (a typo, an overflow), not unusual values. Imports neither torch nor pydantic.
"""

from __future__ import annotations

import operator
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Number:
    """Bounds of a whole or real number. The ends are included unless `above` or `below` excludes
    one."""

    kind: type[int] | type[float]
    least: float
    most: float
    above: bool = False
    below: bool = False

    @property
    def description(self) -> str:
        """Describes the bounds: a whole number from 1 to 4,096; a number above 0 and at most 1."""
        kind = "a whole number" if self.kind is int else "a number"
        if not self.above and not self.below:
            return f"{kind} from {_format_value(self.least)} to {_format_value(self.most)}"
        low = (
            f"above {_format_value(self.least)}"
            if self.above
            else f"at least {_format_value(self.least)}"
        )
        return f"{kind} {low} and {'below' if self.below else 'at most'} {_format_value(self.most)}"

    def holds(self, value: object) -> bool:
        """Whether `value` is a number within the bounds. numpy's numbers count too."""
        if isinstance(value, bool | str | bytes) or type(value).__name__.startswith("bool"):
            return False
        try:
            number = operator.index(value) if self.kind is int else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return False
        low = self.least < number if self.above else self.least <= number  # false for nan
        return low and (number < self.most if self.below else number <= self.most)

    def holds_ints(self, values: Sequence[Any]) -> bool:
        """Whether these are plain ints within the bounds, at least one. Faster than `holds` for
        each."""
        return (
            set(map(type, values)) == {int} and self.holds(min(values)) and self.holds(max(values))
        )

    def __call__(self, text: str) -> Any:
        """Parses a flag, as an argparse type."""
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = None
        if not self.holds(value):
            raise ArgumentTypeError(f"{text[:40]!r} is not {self.description}")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import PydanticCustomError, ValidationError, core_schema

        def validate(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            try:
                number = None if isinstance(value, bool) else inner(value)
            except ValidationError:
                number = None
            if not self.holds(number):
                raise PydanticCustomError(
                    "number", "Input should be {said}", {"said": self.description}
                )
            return number

        return core_schema.no_info_wrap_validator_function(validate, handler(source))


def check_numbers(**numbers: tuple[Number, object]) -> None:
    """Checks name=(bounds, value); None is skipped. Raises ConfigError with every fault."""
    if faults := number_faults(**numbers):
        raise ConfigError("a number is out of bounds", faults)


def check_weights(weights: Sequence[object]) -> None:
    """Checks the weights of several adapters. Raises ConfigError with every weight out of
    bounds."""
    check_numbers(
        **{f"weight {number}": (WEIGHT, weight) for number, weight in enumerate(weights, 1)}
    )


def number_faults(**numbers: tuple[Number, object]) -> list[str]:
    """Returns the faults that `check_numbers` would raise, one line each."""
    return [
        f"{name} is {str(value)[:40]}: should be {bounds.description}"
        for name, (bounds, value) in numbers.items()
        if value is not None and not bounds.holds(value)
    ]


def _format_value(value: float) -> str:
    whole = isinstance(value, int) or (value < 10**12 and value == int(value))
    return f"{value:,}" if whole else f"{value:g}"


COUNT = Number(int, 1, 10**9)
"""Steps, evaluations, checkpoints, variants: how often or how many."""
PROCESSES = Number(int, 1, 2**16)
"""Processes of one run."""
ROWS = Number(int, 1, 2**20)
"""Rows computed together."""
LENGTH = Number(int, 2, 2**24)
"""Tokens of a row: a token is only trained after another one."""
NEW_TOKENS = Number(int, 1, 2**24)
DAYS = Number(int, 0, 36500)
EPOCHS = Number(float, 0, 10**6, above=True)
LEARNING_RATE = Number(float, 0, 1000, above=True)
SHARE = Number(float, 0, 1, below=True)
"""Warm-up, held-out rows, dropout: less than 1."""
PART = Number(float, 0, 1, above=True)
"""Density: more than 0."""
PROBABILITY = Number(float, 0, 1)
ENERGY = Number(float, 0, 1, above=True, below=True)
WEIGHT_DECAY = Number(float, 0, 1000)
CLIP = Number(float, 0, 10**12, above=True)
DIVISOR = Number(float, 0, 10**12, above=True)
"""Number by which a summed gradient is divided."""
SEED = Number(int, 0, 2**32 - 1)
RANK = Number(int, 1, 4096)
ALPHA = Number(float, 0, 10**6, above=True)
SCALING = Number(float, 0, 10**6, above=True)
RATIO = Number(float, 0, 10**6, above=True)
"""Ratio of two learning rates."""
POWER_ITERATIONS = Number(int, 0, 1000)
LAYER = Number(int, 0, 10**5)
"""The number of a layer, counted from 0."""
WIDTH = Number(int, 1, 2**20)
"""Width of a small network, or its reduction factor."""
PLACES = Number(int, 1, 4096)
FROZEN_PLACES = Number(int, 0, 4096)
"""Tokens of a prefix."""
SET_WEIGHT = Number(float, 0, 1000, above=True)
"""How often an epoch uses each row of a set."""
WEIGHT = Number(float, -(10**6), 10**6)
"""Weight of an adapter among several; a negative weight subtracts it."""
BETA = Number(float, 0, 1000, above=True)
FACTOR = Number(float, 0, 1000)
SMOOTHING = Number(float, 0, 0.5, below=True)
TEMPERATURE = Number(float, 0, 100)
TOP_P = Number(float, 0, 1)
"""0 allows only the likeliest token, 1 allows all."""
TOP_K = Number(int, 0, 10**9)
"""0 allows all tokens."""
MIN_P = Number(float, 0, 1)
REPETITION = Number(float, 0.01, 100)
"""Divisor of the logits of earlier tokens; 1 changes nothing, and near 0 they would overflow."""
PENALTY = Number(float, -100, 100)
BIAS = Number(float, -1000, 1000)
"""Added to one token's logit."""
LOGPROBS = Number(int, 0, 20)
"""Alternatives listed for each token."""
SEEDS = Number(int, 1, 1000)
EXTENSIONS = Number(int, 0, 100)
SECONDS = Number(float, 0, 10**9, above=True)
MINUTES = Number(float, 0, 10**6, above=True)
PRICE = Number(float, 0, 10**9)
LINE = Number(int, 1, 2**53)
"""Line of a file, counted from 1."""
BYTES = Number(int, 1, 2**60)
LINK = Number(float, 1000, 10**15)
"""Bytes a second between two processes."""
BLOCK = Number(int, 1, 4096)
"""Tokens of a block of keys and values."""
TOKEN = Number(int, 0, 2**31 - 1)
"""Id of a token."""
CHOICES = Number(int, 1, 128)
"""Answers to one prompt."""
PRIORITY = Number(int, -1000, 1000)
WAITS = Number(int, 0, 10**9)
"""Waiting requests, and those that may overtake one."""
TIME = Number(float, -(10**12), 10**12)
"""Seconds on some clock."""
PORT = Number(int, 0, 65535)
MIB = Number(int, 1, 2**40)
"""Units of 2**20 bytes."""
