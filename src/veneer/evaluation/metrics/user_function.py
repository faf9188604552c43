"""A metric that the user wrote: `FILE.py:FUNCTION`, a function (answer, references) -> number.

The file is the user's own code, named on the command line or passed as a function. No run file,
data, adapter or request can name a file to run.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.evaluation.metrics.metric import Metric, mean_of

UserFunction = Callable[[str, list[str]], float]


def function_from_file(named: str) -> UserFunction:
    """Runs the file of FILE.py:FUNCTION and returns the function. Raises ConfigError."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist",
            next_step="Give a Python file and a function: FILE.py:FUNCTION",
        )
    spec = spec_from_file_location("veneer_user_metric", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as fault:
        raise ConfigError(f"{path} cannot be run: {type(fault).__name__}: {fault}") from fault
    function: Any = getattr(module, name, None)
    if not callable(function):
        functions = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        ]
        raise ConfigError(
            f"{path} has no function {name!r}",
            next_step=f"It has: {', '.join(functions) or 'no function'}.",
        )
    return function


def user_metric(name: str, function: UserFunction) -> Metric:
    """Makes the mean of `function` over rows. ConfigError if a result is not a finite number."""

    def value(answer: str, references: Sequence[str]) -> float:
        try:
            number = float(function(answer, list(references)))
        except (Exception, SystemExit) as fault:
            raise ConfigError(
                f"{name} failed: {type(fault).__name__}: {fault}", [f"answer: {answer[:200]!r}"]
            ) from fault
        if not math.isfinite(number):
            raise ConfigError(f"{name} gave {number}", [f"answer: {answer[:200]!r}"])
        return number

    return mean_of(name, value, unit="points")
