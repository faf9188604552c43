"""Fine-tune a small real model on a real task, on this machine, in a few minutes.

Downloads a 135M-parameter model and a public data set (about 100 MB, kept for the next time), trains a
thin layer on 300 rows and shows held-out questions with the answers before and after.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from veneer.cli.common import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the run; default: runs/demo")
    parser.add_argument("--again", action="store_true", help="train anew though DIR holds a finished demo")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from veneer.demo import run_demo

    with redirect_stdout(sys.stderr) if args.json else nullcontext():  # what is said is talk then
        figures = run_demo(Path(args.out), again=args.again)
    if args.json:
        print_json(figures)
    return 0
