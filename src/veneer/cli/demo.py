"""Fine-tune a small real model on a real task, on this machine, in a few minutes.

Downloads a 135M-parameter model and a public data set (about 100 MB, kept for the next time), trains a
thin layer on 300 rows and shows held-out questions with the answers before and after.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the run; default: runs/demo")
    parser.add_argument("--again", action="store_true", help="train anew though DIR holds a finished demo")


def run(args: argparse.Namespace) -> int:
    from veneer.demo import run_demo

    run_demo(Path(args.out), again=args.again)
    return 0
