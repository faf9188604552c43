"""The actions convert, split, sample and gc of `veneer data`; replay is in data_replay.py."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.bounds import COUNT, DAYS, SEED, SHARE
from veneer.cli.common import add_action, add_json, add_map, make_console, parse_columns, print_json
from veneer.cli.flags import add_switch, add_value
from veneer.cli.rows import data_replay
from veneer.wording import shown, size

if TYPE_CHECKING:
    from veneer.data.files.writing import WriteReport

Run = Callable[[Namespace], int]


def add_row_actions(actions: Any) -> None:
    def verb(name: str, run: Run, help: str) -> ArgumentParser:
        action_parser = add_action(actions, name, help)
        action_parser.set_defaults(act=run)
        return action_parser

    def reading(parser: ArgumentParser) -> None:
        from veneer.data.config import DataConfig

        formats = DataConfig.model_fields["format"]
        add_value(
            parser, "--format", "F", "format of the rows; default: auto", default=formats.default
        )
        add_map(parser)
        add_switch(
            parser, "--leave-out", "skip rows that cannot be read; otherwise they are an error"
        )
        add_json(parser)

    convert = verb("convert", _convert, "write rows as chat, prompt and completion, or pairs")
    add_value(
        convert,
        "data",
        "D",
        "rows: files, folders, glob patterns, URLs or Hugging Face datasets",
        nargs="+",
    )
    add_value(convert, "--out", "FILE", ".jsonl or .jsonl.gz", required=True)
    reading(convert)
    split = verb(
        "split", _split, "split rows into training, validation and test without shared prompts"
    )
    add_value(split, "data", "D", "rows: file, folder, glob pattern, URL or Hugging Face dataset")
    add_value(
        split,
        "--out",
        "DIR",
        "new folder for train.jsonl, validation.jsonl and test.jsonl",
        required=True,
    )
    add_value(
        split,
        "--validation",
        "S",
        "share of the validation rows; default: 0.05",
        type=SHARE,
        default=0.05,
    )
    add_value(split, "--test", "S", "share of the test rows; default: 0", type=SHARE, default=0.0)
    reading(split)
    sample = verb("sample", _sample, "sample rows at random")
    add_value(sample, "data", "D", "rows: file, folder, glob pattern, URL or Hugging Face dataset")
    add_value(sample, "count", "N", "number of rows", type=COUNT)
    add_value(sample, "--out", "FILE", ".jsonl or .jsonl.gz", required=True)
    add_value(sample, "--seed", "N", "random seed; default: 0", type=SEED, default=0)
    reading(sample)
    data_replay.add_arguments(
        verb(
            "replay",
            data_replay.run,
            "generate rows with the base, to mix into training against forgetting",
        )
    )
    gc = verb("gc", _gc, "show unused tokens of large data sets; with --yes, delete them")
    add_value(gc, "--days", "N", "days without use; default: 30; 0: all", type=DAYS, default=30)
    add_switch(gc, "--yes", "delete them")
    add_json(gc)


def _convert(args: Namespace) -> int:
    from veneer.data.files.writing import convert

    return _write_rows(args, lambda out, **how: convert(args.data, out, **how))


def _split(args: Namespace) -> int:
    from veneer.data.files.writing import split_rows
    from veneer.errors import ConfigError

    if args.validation + args.test >= 1:
        raise ConfigError(
            "--validation and --test take all rows", next_step="Leave some to train on."
        )
    shares = {"validation": args.validation, "test": args.test}
    return _write_rows(args, lambda out, **how: split_rows(args.data, out, **shares, **how))


def _sample(args: Namespace) -> int:
    from veneer.data.files.writing import sample_rows

    return _write_rows(
        args, lambda out, **how: sample_rows(args.data, args.count, out, seed=args.seed, **how)
    )


def _write_rows(args: Namespace, write: Callable[..., WriteReport]) -> int:
    written = write(
        Path(args.out), format=args.format, columns=parse_columns(args), leave_out=args.leave_out
    )
    if args.json:
        print_json(
            {"rows": written.rows, "problems": [problem.to_dict() for problem in written.problems]}
        )
        return 0
    console = make_console()
    for file, rows in written.rows.items():
        console.print(f"{shown(file)}: {rows:,} rows")
    for problem in written.problems:
        said = "skipped: " if problem.fatal else ""
        console.print(f"  {said}{shown(problem)}", style="yellow")
    return 0


def _gc(args: Namespace) -> int:
    from veneer.data.files.unused import find_unused, remove_unused
    from veneer.data.large import tokens_folder

    sets = (remove_unused if args.yes else find_unused)(tokens_folder(), args.days)
    total = sum(token_set.bytes for token_set in sets)
    if args.json:
        listed = [
            {"folder": str(s.folder), "bytes": s.bytes, "days": s.days, "files": [*s.files]}
            for s in sets
        ]
        print_json({"sets": listed, "bytes": total, "removed": args.yes})
        return 0
    console = make_console()
    for token_set in sets:
        file_names = ", ".join(map(shown, token_set.files[:3])) + (
            " and others" if len(token_set.files) > 3 else ""
        )
        console.print(
            f"  {size(token_set.bytes)}, last used {token_set.days:.0f} days ago: {file_names}"
        )
        console.print(f"      {shown(token_set.folder)}")
    counts = f"tokens of {len(sets):,} set{'' if len(sets) == 1 else 's'}, {size(total)}"
    console.print(f"{'removed' if args.yes else f'not used for {args.days} days'}: {counts}")
    if sets and not args.yes:
        console.print("A run that needs them builds them again.")
        console.print(f"To delete them: veneer data gc --days {args.days} --yes")
    return 0
