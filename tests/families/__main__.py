"""Holds every causal LM of transformers that can be built small against transformers and PEFT.

    python -m tests.families              all of them; writes docs/families.md (an hour)
    python -m tests.families mamba jamba  these rows of the page again
    python -m tests.families --left       those that the page lists as not compared yet

Each small random model is saved as a folder and goes the way of a user from there: `veneer.load`
and the command line on one side, transformers and PEFT on the same folder on the other. Two
adapters of Veneer's, a and b, have values as if they were trained. The columns of the table:

    path       what execution/proofs/structure.py found: how rows are computed, and why not packed
    loaded     the loaded base: every attribute and all logits as transformers has them
    loss       of a step over rows that share prompts and rows that do not, on both sides of every
               window and rotary switch: ours, and the sum of PEFT's rows one by one
    gradient   of every trained value: ours, and torch's through the model's own forward, one row
               at a time
    several    losses and gradients of one step in which a, b and no adapter act on rows of their
               own
    run        three steps of `veneer train --from a`: losses and the logits of the file, against
               AdamW on a in PEFT
    goes on    the first loss of a run from run + 0.5 b, against PEFT's merges of the files in
               transformers' weights
    to PEFT    our file in PEFT: the same logits
    from PEFT  PEFT's own file here, as its training could have left it: the same logits
    answers    greedy, prompts of four lengths at once, and transformers' own loop in PEFT, one at a
               time; `veneer generate` with the file of the run
    merged     the folder of `veneer merge` in transformers: the logits of the run's file in PEFT
    .gguf      the file of `veneer export --merged`: its values in `gguf`, its logits here,
               llama.cpp's answers

Each family is measured in a process of its own, whose memory is free again afterwards. What
differs for a reason that is not ours is declared in declared.py; anything else is a fault.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.families.measure import measure
from tests.families.models import names
from tests.families.page import PAGE, page, rows_of


def main(arguments: list[str]) -> None:
    rows = rows_of(PAGE.read_text()) if arguments and PAGE.exists() else {}
    missing = [name for name in names() if name not in rows]
    chosen = missing if arguments == ["--left"] else arguments or names()
    spawn = multiprocessing.get_context("spawn")
    for name in chosen:
        start = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            result = pool.submit(measure, name).result()
        rows[name] = result.row
        numbers = {
            cell: f"{value:.1e}" if isinstance(value, float) else value
            for cell, value in result.cells.items()
        }
        seconds = time.perf_counter() - start
        print(f"{name}  {seconds:.1f} s  {result.built or result.path}\n    {numbers}", flush=True)
        for fault in result.wrong:
            print(f"    WRONG {fault}", flush=True)
        PAGE.write_text(page(rows, names()))


if __name__ == "__main__":
    main(sys.argv[1:])
