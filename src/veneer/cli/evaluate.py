"""The loss of a base on rows, with or without an adapter, and how its answers compare with theirs.

For instance:

  veneer evaluate --base smollm2-135m --data held_out.jsonl
  veneer evaluate --adapter runs/tickets --data held_out.jsonl --metrics exact_match,field_f1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from veneer.cli.common import add_base, add_data, add_json, load_base, make_console, print_json
from veneer.cli.generate import at_least_one
from veneer.train.wording import number

UNITS = {"loss": "nats per trained token", "tokens": "trained tokens"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="D", help="rows: .jsonl, .json, .csv or .parquet")
    add_base(parser)
    parser.add_argument(
        "--metrics",
        default="",
        metavar="M,M",
        help="also answer every row and compare: exact_match, json_validity, field_f1",
    )
    add_data(parser)
    parser.add_argument(
        "--max-tokens", type=at_least_one, default=256, metavar="N", help="longest answer, tokens"
    )
    parser.add_argument("--batch", type=at_least_one, default=16, metavar="N", help="rows computed at once")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write every row's answer there, as JSONL"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from veneer import api

    base = load_base(args)
    result = api.evaluate(
        base,
        args.data,
        metrics=[name.strip() for name in args.metrics.split(",") if name.strip()],
        length=args.length,
        format=args.format,
        train_on=args.train_on,
        max_new_tokens=args.max_tokens,
        batch=args.batch,
        predictions=args.predictions,
    )
    if args.json:
        print_json({"base": base.source, "adapter": args.adapter, "data": args.data, **result})
    else:
        _print_table(result)
    return 0


def _print_table(result: dict[str, Any]) -> None:
    console = make_console(json=False)
    intervals = result.get("intervals", {})
    for name, value in result.items():
        if name == "intervals":
            continue
        beside = UNITS.get(name, "")
        if name in intervals:
            low, high = intervals[name]
            beside = f"95% interval {100 * low:.1f} to {100 * high:.1f}%"
            said = f"{100 * value:.1f}%"
        else:
            said = f"{value:,}" if isinstance(value, int) else number(value)
        console.print(f"{name:<15}{said:>10}  {beside}".rstrip(), soft_wrap=True)
