"""veneer data convert, split, sample: rows from where and how they lie into files that are read as they stand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.bounds import COUNT, SEED, SHARE
from veneer.cli.common import add_json, add_map, columns_of, make_console, print_json
from veneer.wording import shown

if TYPE_CHECKING:
    from veneer.data.writing import Written

Run = Callable[[argparse.Namespace], int]


def add_verbs(actions: Any) -> None:
    def verb(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=help, allow_abbrev=False)
        made.set_defaults(act=run)
        return made

    def reading(parser: argparse.ArgumentParser) -> None:
        from veneer.data.config import DataConfig

        formats = DataConfig.model_fields["format"]
        parser.add_argument(
            "--format", default=formats.default, metavar="F", help="how a row is laid out; default: auto"
        )
        add_map(parser)
        parser.add_argument(
            "--leave-out", action="store_true", help="rows that cannot be read are left out; else nothing is written"
        )
        add_json(parser)

    convert = verb("convert", _convert, "write rows of any layout as chat, or as prompt and completion")
    convert.add_argument(
        "data", nargs="+", metavar="D", help="files, folders, patterns, addresses, data sets of the hub"
    )
    convert.add_argument("--out", required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    reading(convert)
    split = verb("split", _split, "divide rows into training, validation and test, no prompt in two of them")
    split.add_argument("data", metavar="D", help="file, folder, pattern, address, data set of the hub")
    split.add_argument("--out", required=True, metavar="DIR", help="gets train.jsonl, validation.jsonl, test.jsonl")
    split.add_argument("--validation", type=SHARE, default=0.05, metavar="S", help="share; default: 0.05")
    split.add_argument("--test", type=SHARE, default=0.0, metavar="S", help="share; default: 0")
    reading(split)
    sample = verb("sample", _sample, "draw some rows")
    sample.add_argument("data", metavar="D", help="file, folder, pattern, address, data set of the hub")
    sample.add_argument("count", type=COUNT, metavar="N", help="how many")
    sample.add_argument("--out", required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    sample.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the draw; default: 0")
    reading(sample)


def _convert(args: argparse.Namespace) -> int:
    from veneer.data.writing import convert

    return _told(args, lambda out, **how: convert(args.data, out, **how))


def _split(args: argparse.Namespace) -> int:
    from veneer.data.writing import split_rows
    from veneer.errors import ConfigError

    if args.validation + args.test >= 1:
        raise ConfigError("--validation and --test make up all of the rows", next_step="Leave some to train on.")
    shares = {"validation": args.validation, "test": args.test}
    return _told(args, lambda out, **how: split_rows(args.data, out, **shares, **how))


def _sample(args: argparse.Namespace) -> int:
    from veneer.data.writing import sample_rows

    return _told(args, lambda out, **how: sample_rows(args.data, args.count, out, seed=args.seed, **how))


def _told(args: argparse.Namespace, write: Callable[..., Written]) -> int:
    written = write(Path(args.out), format=args.format, columns=columns_of(args), leave_out=args.leave_out)
    if args.json:
        print_json({"rows": written.rows, "problems": [each.to_dict() for each in written.problems]})
        return 0
    console = make_console(json=False)
    for file, rows in written.rows.items():
        console.print(f"{shown(file)}: {rows:,} rows", soft_wrap=True)
    for problem in written.problems:
        console.print(f"  left out: {shown(problem)}", style="yellow", soft_wrap=True)
    return 0
