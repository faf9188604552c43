"""Fine-tune a small model on a real task in a few minutes.

Downloads a model of 135 M parameters and a public data set (about 100 MB, cached), trains an
adapter on 300 rows, and shows held-out questions with the answers before and after.
"""

import sys
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from veneer.bounds import COUNT
from veneer.cli.common import add_json, print_json
from veneer.cli.flags import add_switch, add_value

WHOLE, SHORT = "runs/demo", "runs/demo-short"
"""Default folders of a full demo and of one with --steps."""


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "--out", "DIR", f"folder of the run; default: {WHOLE}, with --steps {SHORT}")
    add_value(
        parser,
        "--steps",
        "N",
        "train only N small steps and answer two questions, to test the installation",
        type=COUNT,
    )
    add_switch(parser, "--again", "train again even if DIR holds a finished demo")
    add_json(parser)


def run(args: Namespace) -> int:
    from veneer.demo import run_demo

    out = args.out or (WHOLE if args.steps is None else SHORT)
    with (
        redirect_stdout(sys.stderr) if args.json else nullcontext()
    ):  # the demo's output is messages then
        figures = run_demo(Path(out), again=args.again, steps=args.steps)
    if args.json:
        print_json(figures)
    return 0
