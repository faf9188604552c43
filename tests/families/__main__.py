"""Every causal LM of transformers that can be built small, held against transformers and PEFT: the
table of families.

    python -m tests.families
        all of them; writes docs/families.md (half an hour)
    python -m tests.families mamba jamba  these rows of the page anew
    python -m tests.families --left
        those that the page lists as not compared yet: goes on after an interruption

Each small random model is saved as a folder and goes the way of a user from there: `veneer.load`
    and the command line
on one side, transformers and PEFT on the same folder on the other. Two adapters of Veneer's, a and
    b, have values as if
they were trained. path       what models/proof.py found: how rows are computed, and why not packed
    loaded     the loaded base: every attribute and all logits as transformers has them loss
    of a step over rows that share prompts and rows that do not, on both sides of every window and
    rotary switch: ours, and the sum of PEFT's rows one by one gradient   of every trained value:
    ours, and torch's through the model's own forward, one row at a time several    losses and
    gradients of one step in which a, b and no adapter act on rows of their own run        three
    steps of `veneer train --from a`: losses and the logits of the file, against AdamW on a in PEFT
    goes on    the first loss of a run from run + 0.5 b, against PEFT's merges of the files in
    transformers' weights to PEFT    our file in PEFT: the same logits from PEFT  PEFT's own file
    here, as its training could have left it: the same logits answers    greedy, prompts of four
    lengths at once, and transformers' own loop in PEFT, one at a time; `veneer generate` with the
    file of the run merged     the folder of `veneer merge` in transformers: the logits of the run's
    file in PEFT .gguf      the file of `veneer export --merged`: its values in `gguf`, its logits
    here, llama.cpp's answers
What is not so for a reason that is not ours is declared in tests/families/declared.py; anything
    else is a fault.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families import commands, compare
from tests.families.compare import NotInPeft, Trial
from tests.families.models import names
from tests.families.page import LIMITS, PAGE, Result, page, rows_of, words
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


def main(asked: list[str]) -> None:
    rows = rows_of(PAGE.read_text()) if asked and PAGE.exists() else {}
    left = [name for name in names() if name not in rows]
    for name in left if asked == ["--left"] else asked or names():
        start = time.perf_counter()
        result = measure(name)
        rows[name] = result.row
        cells = result.cells.items()
        numbers = {
            cell: f"{value:.1e}" if isinstance(value, float) else value for cell, value in cells
        }
        seconds = time.perf_counter() - start
        print(f"{name}  {seconds:.1f} s  {result.built or result.path}\n    {numbers}", flush=True)
        for fault in result.wrong:
            print(f"    WRONG {fault}", flush=True)
        PAGE.write_text(page(rows, names()))


if __name__ == "__main__":
    main(sys.argv[1:])
