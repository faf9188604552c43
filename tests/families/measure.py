"""Measures one family for the table: each cell is a number, or in words why there is none."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families import commands, compare
from tests.families.compare import NotInPeft, Trial
from tests.families.page import LIMITS, Result, words
from veneer.bases.quiet_transformers import quiet
from veneer.errors import VeneerError


def measure(name: str) -> Result:
    """The row of one family."""
    result = Result(name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quiet():
                trial = Trial(name, Path(folder))
                result.cells["loaded"] = _tried(lambda: compare.loaded(trial))
                paths = trial.base.paths  # which hands attention over
        except VeneerError as refusal:
            result.built = _in_words(refusal)
            return result
        except Exception as fault:
            result.built = f"not built: {type(fault).__name__}: {words(str(fault))}"
            return result
        lines = [line for line in paths.lines if not line.startswith("logits only")]
        result.path = re.sub(r" by [\d.]+e[+-]\d+", "", "; ".join(lines)).replace(
            "|", "/"
        )  # not the last digit
        with quiet():
            _fill(result, trial)
    return result


def _fill(result: Result, trial: Trial) -> None:
    """Every cell of the row."""
    cells = result.cells
    try:
        trial.attach()
    except Exception as fault:
        cells.update(dict.fromkeys(list(LIMITS)[1:], _in_words(fault)))
        return
    untrained = None if trial.untrained is None else _in_words(trial.untrained)
    twin, no_twin = _in_peft(trial, "a")
    reference = trial.beside("a").model if twin is None else twin
    cells["loss"] = untrained or _tried(lambda: compare.loss(trial, reference))
    for cell, compared in (("gradient", compare.gradient), ("several", compare.several)):
        cells[cell] = untrained or _tried(lambda compared=compared: compared(trial))
    cells["to PEFT"] = no_twin or _tried(lambda: compare.to_peft(trial, twin))
    cells["from PEFT"] = _tried(lambda: compare.from_peft(trial))
    cells["answers"] = _tried(lambda: compare.answers(trial, reference))
    for cell, compared in (("run", commands.run), ("goes on", commands.goes_on)):
        cells[cell] = untrained or _tried(lambda compared=compared: compared(trial))
    if (trial.place / "run" / "adapter").is_dir():
        trial.final = "run/adapter"
        twin, _ = _in_peft(trial, trial.final)
        reference = trial.beside(trial.final).model if twin is None else twin
    if isinstance(cells["answers"], float):
        cells["answers"] = _tried(
            lambda: max(cells["answers"], commands.generated(trial, reference))
        )
    cells["merged"] = _tried(lambda: commands.merged(trial, reference))
    cells[".gguf"] = _tried(lambda: commands.in_gguf(trial))


def _in_peft(trial: Trial, adapter: str) -> tuple[Any, str]:
    """Our file in PEFT; None and why there is none."""
    try:
        return trial.in_peft(adapter), ""
    except Exception as fault:
        return None, _in_words(fault)


def _tried(run: Callable[[], float | None]) -> float | str:
    """A number, or in words why there is none."""
    try:
        value = run()
        return "not written" if value is None else value
    except Exception as fault:
        return _in_words(fault)


def _in_words(fault: Exception) -> str:
    if isinstance(fault, VeneerError):
        return "refused: " + words(fault.faults[0] if fault.faults else fault.headline)
    if isinstance(fault, NotInPeft):
        return "not in PEFT: " + words(str(fault))
    return f"FAULT {type(fault).__name__}: {words(str(fault), 200)}"
