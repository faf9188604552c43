"""Generates rows with the base (`veneer data replay`), to mix into training against forgetting."""

import json
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from veneer.bounds import COUNT, NEW_TOKENS, SEED
from veneer.cli.bases import add_base_format, load_bare_base
from veneer.cli.common import (
    add_json,
    add_variables,
    make_console,
    parse_variables,
    print_json,
    working,
)
from veneer.cli.early import check_base, check_files, check_new
from veneer.cli.flags import add_value
from veneer.errors import ConfigError, DataError
from veneer.wording import shown

SHARE = 0.2
"""Share of an epoch for the generated rows, as measured in docs/benchmarks.md."""


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "--base", "B", "hub id, folder, .gguf file or named default", required=True)
    add_value(parser, "--out", "DIR", "new folder for answers.jsonl and texts.jsonl", required=True)
    add_value(
        parser,
        "--rows",
        "N",
        "number of rows, half answers and half plain text; default: 200",
        type=COUNT,
        default=200,
    )
    add_value(
        parser,
        "--questions",
        "FILE",
        "questions, one per line; default: the base writes them too",
        type=Path,
    )
    add_value(parser, "--system", "TEXT", "system message of every question; default: none")
    add_variables(parser)
    add_value(
        parser,
        "--max-new-tokens",
        "N",
        "longest answer or text in tokens; default: 128",
        type=NEW_TOKENS,
        default=128,
    )
    add_value(parser, "--seed", "N", "random seed; default: 0", type=SEED, default=0)
    add_base_format(parser, "as it is stored")
    add_json(parser)


def run(args: Namespace) -> int:
    out = Path(args.out)
    check_base(args.base)
    check_new(out)
    check_files([args.questions])
    questions = [] if args.questions is None else read_questions(args.questions)
    variables = parse_variables(args)
    base = load_bare_base(args.base, args, args.quantize)
    from veneer.data.files.writing import write_records
    from veneer.decoding.replay import draw_replay
    from veneer.files.atomic import atomic_folder

    with atomic_folder(out) as folder:
        with working("generating") as tell:
            generated = draw_replay(
                base,
                args.rows,
                questions=questions,
                system=args.system,
                variables=variables,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
                progress=tell,
            )
        for name, rows in generated.items():
            write_records(folder / f"{name}.jsonl", rows)
    sets: list[dict[str, Any]] = [
        {
            "path": str(out / f"{name}.jsonl"),
            "share": SHARE / len(generated),
            "name": f"replay of {name}",
        }
        for name in generated
    ]
    unfinished = {
        name: sum("unfinished" in row for row in rows) for name, rows in generated.items()
    }
    if args.json:
        counts = {
            row_set["path"]: len(rows)
            for row_set, rows in zip(sets, generated.values(), strict=True)
        }
        print_json({"rows": counts, "unfinished": sum(unfinished.values()), "train": sets})
        return 0
    lines = [
        f"{row_set['path']}: {len(rows):,} rows,"
        f" {unfinished[name]:,} cut after {args.max_new_tokens:,} tokens"
        for row_set, (name, rows) in zip(sets, generated.items(), strict=True)
    ]
    lines += [
        "In a run file, to make them a fifth of an epoch beside your rows:",
        "  data:",
        "    train:",
    ]
    lines += ["      - {path: ROWS.jsonl}", *(f"      - {_as_yaml(row_set)}" for row_set in sets)]
    console = make_console()
    for line in lines:
        console.print(shown(line))
    return 0


def read_questions(file: Path) -> list[str]:
    """Reads one question per line.

    Raises DataError if the file is not UTF-8, and ConfigError if it has no question.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{file} cannot be read: {fault}", next_step="Give a UTF-8 text file."
        ) from None
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise ConfigError(
            f"{file} holds no question", next_step="Write one per line, or leave --questions out."
        )
    return questions


def _as_yaml(one: dict[str, Any]) -> str:
    """Formats a set as in a run file: {path: a.jsonl, share: 0.1}."""
    plain = re.fullmatch(r"[A-Za-z./][\w./-]*", one["path"], re.ASCII)
    path = one["path"] if plain else json.dumps(one["path"], ensure_ascii=False)
    return f"{{path: {path}, share: {one['share']:g}, name: {one['name']}}}"
