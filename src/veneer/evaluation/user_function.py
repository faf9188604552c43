"""A metric that the user wrote: `FILE.py:FUNCTION`, a function (answer, references) -> number.

The file is the user's own code on the user's own machine, named on the command line or handed over
as a function. Nothing else leads here: no run file, no data, no adapter and no request can name a
file to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.evaluation.metric import Metric, mean_of

UserFunction = Callable[[str, list[str]], float]


def function_from_file(named: str) -> UserFunction:
    """The function that FILE.py:FUNCTION names; runs the file. Raises ConfigError."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"{path} is not there", next_step="Name a Python file and a function: FILE.py:FUNCTION"
        )
    spec = spec_from_file_location("veneer_user_metric", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as fault:
        raise ConfigError(f"{path} cannot be run: {type(fault).__name__}: {fault}") from fault
    found: Any = getattr(module, name, None)
    if not callable(found):
        functions = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        ]
        raise ConfigError(
            f"{path} has no function {name!r}",
            next_step=f"It has: {', '.join(functions) or 'no function'}.",
        )
    return found


def user_metric(name: str, function: UserFunction) -> Metric:
    """The mean of what `function` returns for each row. Raises ConfigError where that is no finite
    number."""

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
