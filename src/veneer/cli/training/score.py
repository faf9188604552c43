"""Write the log-probability of the answers in rows, for one adapter or several at once.

For instance:

  veneer score --base smollm2-135m --data rows.jsonl --out scores.jsonl
  veneer score --data rows.jsonl --adapter tickets@1 tickets@2 \\
      --out scores.jsonl
  veneer score --data rows.jsonl --adapter runs/tickets --per-token \\
      --out scores.jsonl

The output has a line for each row: row, sum, mean (nats, higher is likelier) and tokens; with
several adapters, these by adapter in `adapters`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.bounds import ROWS
from veneer.cli.bases import (
    add_base,
    load_bare_base,
    locate_adapter,
    locate_base_and_adapter,
    resolve_weight_format,
)
from veneer.cli.common import (
    add_data,
    add_json,
    add_map,
    add_preamble,
    make_console,
    parse_columns,
    parse_variables,
    print_json,
    working,
)
from veneer.cli.early import check_new, check_rows
from veneer.cli.flags import add_switch, add_value
from veneer.wording import number, shown

if TYPE_CHECKING:
    from veneer.base import Base
    from veneer.evaluation.scores import Score


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer score [--base B] [--adapter A ...] --data D --out FILE [--per-token] ..."
    add_value(parser, "--data", "D", "rows: .jsonl, .json, .csv or .parquet", required=True)
    add_value(parser, "--out", "FILE", "new file of scores, as JSONL", type=Path, required=True)
    add_base(parser, several=True)
    add_switch(parser, "--per-token", "also write the log-probability of every token")
    add_preamble(parser)
    add_data(parser)
    add_map(parser)
    add_value(
        parser,
        "--batch",
        "N",
        "rows of each adapter computed at once; default: 16",
        type=ROWS,
        default=16,
    )
    add_json(parser)


def run(args: Namespace) -> int:
    check_rows(args.data)
    check_new(args.out)
    names: list[str] = list(dict.fromkeys(args.adapter))
    scored: list[str | None] = [*names] or [None]
    base = _load_base(args, names)
    from veneer.data.files.writing import write_records

    with working("scoring") as show_progress:
        scores = base.score(
            args.data,
            adapter=scored,
            per_token=args.per_token,
            system=args.system,
            variables=parse_variables(args),
            length=args.length,
            format=args.format,
            train_on=args.train_on,
            columns=parse_columns(args),
            batch=args.batch,
            progress=lambda done, total: show_progress("scoring", done, total),
        )
    write_records(args.out, _lines(scores))
    _report(args, base, scores)
    return 0


def _load_base(args: Namespace, names: Sequence[str]) -> Base:
    """Loads the base of --base, or that of the first adapter, with every adapter."""
    source, folder = locate_base_and_adapter(args.base, names[0] if names else None, args.library)
    quantize, keep_dense = resolve_weight_format(args.quantize, folder, force_base=args.force_base)
    folders = [locate_adapter(name, args.library) for name in names]
    base = load_bare_base(source, args, quantize, keep_dense)
    for name, folder in zip(names, folders, strict=True):
        base.load_adapter(folder, name=name, force_base=args.force_base)
    return base


def _lines(scores: Mapping[str | None, Sequence[Score]]) -> Iterator[dict[str, Any]]:
    """Yields the line of each row: its only score, or the scores by adapter."""
    for of_row in zip(*scores.values(), strict=True):
        by_adapter = dict(zip(scores, (score.to_dict() for score in of_row), strict=True))
        if len(by_adapter) == 1:
            yield {"row": of_row[0].row, **of_row[0].to_dict()}
        else:
            yield {"row": of_row[0].row, "adapters": by_adapter}


def _report(args: Namespace, base: Base, scores: Mapping[str | None, Sequence[Score]]) -> None:
    totals = {
        name: {
            "rows": len(row_scores),
            "tokens": sum(score.tokens for score in row_scores),
            "mean": sum(score.sum for score in row_scores)
            / sum(score.tokens for score in row_scores),
        }
        for name, row_scores in scores.items()
    }
    if args.json:
        of_adapters = [{"adapter": name, **figures} for name, figures in totals.items()]
        print_json({"base": base.source, "data": args.data, "scores": of_adapters})
        return
    console = make_console()
    for name, figures in totals.items():
        mean, tokens = number(figures["mean"]), f"{figures['tokens']:,} tokens"
        console.print(
            f"{shown(name or base.source)}  {mean} nats a token · {figures['rows']:,} rows ·"
            f" {tokens}"
        )
    console.print(f"{shown(str(args.out))} written")
