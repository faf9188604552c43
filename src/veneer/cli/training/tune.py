"""From a file of rows to an adapter and a verdict: search, train and judge within some minutes.

For instance:

  veneer tune --base smollm2-135m --data tickets.jsonl --out runs/tuned
  veneer tune --base smollm2-135m --data tickets.jsonl --out runs/tuned \\
      --minutes 30 --library lib
  veneer tune --base smollm2-135m --data pairs.jsonl --out runs/preferred

The rows are checked and divided into three parts: to train on, to search with, to judge with. Eight
settings of LoRA around the plan's advice train together. The worse half stops, again and again, and
the best one trains on. Then base and adapter are compared once, on rows that nothing has seen. The
command shows what it plans and asks before it starts. Ctrl-C keeps the best adapter so far.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.bounds import MINUTES, SEED
from veneer.cli.common import (
    add_json,
    add_map,
    make_console,
    parse_columns,
    pause_collection,
    print_json,
    working,
)
from veneer.cli.early import check_base, check_rows
from veneer.cli.flags import add_switch, add_value
from veneer.errors import ConfigError, RunInterrupted
from veneer.training.state.place import locked_folder, refuse_unless_new
from veneer.wording import shown, wrapped

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer tune --base B --data D --out DIR [--minutes M] [--library L] [--yes]"
    add_value(parser, "--base", "B", "hub id, folder, .gguf file or named default", required=True)
    add_value(parser, "--data", "D", "rows: .jsonl, .json, .csv or .parquet", required=True)
    add_value(parser, "--out", "DIR", "new folder for the result", required=True)
    add_value(
        parser,
        "--minutes",
        "M",
        "time for search and training; judging comes after it; default: 10",
        type=MINUTES,
        default=10.0,
    )
    add_value(
        parser,
        "--library",
        "L",
        "library folder to add the adapter to, under the name of DIR; default: none",
    )
    add_value(
        parser,
        "--objective",
        "O",
        "answers, dpo, ipo or orpo; default: dpo for rows of pairs, else answers",
    )
    add_value(parser, "--seed", "N", "seed of the runs; default: 0", type=SEED, default=0)
    add_value(parser, "--format", "F", "format of the rows; default: auto", default="auto")
    add_map(parser)
    add_switch(parser, "--yes", "start without asking")
    add_json(parser)


def run(args: Namespace) -> int:
    out = Path(args.out)
    columns = parse_columns(args)
    asks = not args.yes
    if asks and not sys.stdin.isatty():
        raise ConfigError(
            "tune asks before it starts, and there is no terminal to ask on",
            next_step="Start it without asking: --yes.",
        )
    check_base(args.base)
    check_rows(args.data)
    refuse_unless_new(out)
    with locked_folder(out):
        pass
    with working("checking"), pause_collection():
        from veneer.tuning.tune import tune
    console = make_console(json=True)

    def say(text: str) -> None:
        console.print(wrapped("  " + shown(text), console.width))

    with _judging_status(console) as show_judging:
        result = tune(
            args.base,
            args.data,
            out=out,
            library=args.library,
            minutes=args.minutes,
            seed=args.seed,
            objective=args.objective,
            format=args.format,
            columns=columns,
            say=say,
            confirm=_confirm if asks else None,
            progress=show_judging,
        )
    if args.json:
        print_json(result)
    else:
        screen = make_console()
        for line in result["verdict"]:
            screen.print(wrapped(shown(line), screen.width))
        screen.print(f"{out / 'adapter'} · page: {out / 'tune.html'}")
    return RunInterrupted.exit_code if result["interrupted"] else 0


@contextmanager
def _judging_status(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows what is judged in a line that disappears; it begins with the judging."""
    status = console.status("")

    def show(label: str, done: int, total: int) -> None:
        status.update(f"{label} {done}/{total}" if done < total else "measuring losses")
        status.start()

    try:
        yield show
    finally:
        status.stop()


def _confirm() -> bool:
    sys.stderr.write("  start? [Y/n] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    return answer.strip().lower() in ("", "y", "yes") and answer.endswith("\n")
