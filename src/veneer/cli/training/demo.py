"""Fine-tune a small real model on a real task, on this machine, in a few minutes.

Downloads a 135M-parameter model and a public data set (about 100 MB, kept for the next time),
trains a thin layer on 300 rows and shows held-out questions with the answers before and after.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from veneer.bounds import COUNT
from veneer.cli.common import add_json, print_json

WHOLE, SHORT = "runs/demo", "runs/demo-short"
"""Where the demo is kept: a whole one, and one of a few steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help=f"folder of the run; default: {WHOLE}, or with --steps {SHORT}"
    )
    parser.add_argument(
        "--steps",
        type=COUNT,
        metavar="N",
        help="train N small steps, answer two questions: does all of it work here?",
    )
    parser.add_argument(
        "--again", action="store_true", help="train anew though DIR holds a finished demo"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from veneer.demo import run_demo

    out = args.out or (WHOLE if args.steps is None else SHORT)
    with redirect_stdout(sys.stderr) if args.json else nullcontext():  # what is said is talk then
        figures = run_demo(Path(out), again=args.again, steps=args.steps)
    if args.json:
        print_json(figures)
    return 0
