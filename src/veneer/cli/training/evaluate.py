"""Measure a base, with or without an adapter, on held-out rows: loss, metrics of its answers, and
forgetting.

For instance:

  veneer evaluate --base smollm2-135m --data held_out.jsonl
  veneer evaluate --adapter runs/tickets --data held_out.jsonl \\
      --metrics exact_match,field_f1
  veneer evaluate --adapter runs/intents --data held_out.jsonl \\
      --labels intents.txt
  veneer evaluate --adapter runs/sums --data sums.jsonl \\
      --metric 'regex:####\\s*(-?[0-9.]+)'
  veneer evaluate --adapter runs/sums --data sums.jsonl \\
      --metric score.py:closeness --general
  veneer evaluate --adapter runs/b --data D --predictions b.jsonl \\
      --against a.jsonl

Metrics: exact_match, json_validity, field_f1, accuracy (picks the likeliest label), bleu, chrf,
rouge1, rouge2, rougeL. A row may have `references`, a list of other correct answers.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.bounds import NEW_TOKENS, ROWS
from veneer.cli.bases import add_base, load_base
from veneer.cli.common import (
    add_data,
    add_json,
    add_lookup,
    add_map,
    add_preamble,
    make_console,
    parse_columns,
    parse_variables,
    pause_collection,
    print_json,
    resolve_preamble,
    working,
)
from veneer.cli.early import check_files, check_rows, check_writable
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.cli.training.label_lines import label_lines
from veneer.wording import cut, folded, number, shown, wrapped

UNITS = {"loss": "nats a token", "tokens": "trained tokens", "cut_answers": "at --max-new-tokens"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = (
        "veneer evaluate [--base B] [--adapter A] --data D [--metrics M,M] [--general] ..."
    )
    add_value(parser, "--data", "D", "rows: .jsonl, .json, .csv or .parquet", required=True)
    add_base(parser)
    add_value(parser, "--metrics", "M,M", "metrics of the answers, from the list above", default="")
    add_repeated(
        parser,
        "--metric",
        "M",
        (
            "one more metric: a name, regex:PATTERN, or FILE.py:FUNCTION, a function of the answer"
            " and the list of correct answers that returns a number; may be repeated"
        ),
    )
    add_value(
        parser,
        "--labels",
        "L",
        (
            "choose the likeliest of these labels for each row: A,B,C, a file with one label per"
            " line, or auto, the rows' own answers; shows accuracy, confusions and calibration"
        ),
    )
    add_switch(parser, "--length-normalised", "rank labels by log-probability per token")
    add_preamble(parser)
    add_data(parser)
    add_map(parser)
    add_value(
        parser,
        "--max-new-tokens",
        "N",
        "longest answer in tokens; default: 256",
        type=NEW_TOKENS,
        default=256,
    )
    add_lookup(parser)
    add_value(parser, "--batch", "N", "rows computed at once; default: 16", type=ROWS, default=16)
    add_value(
        parser,
        "--predictions",
        "FILE",
        "write the answer and figures of every row, as JSONL",
        type=Path,
    )
    add_value(
        parser,
        "--against",
        "FILE",
        "--predictions of another evaluation of the same rows, to compare with",
        type=Path,
    )
    add_value(
        parser,
        "--general",
        "FILE",
        (
            "measure forgetting: loss on general text, from a text file (documents separated by"
            " ---) or, without FILE, from a short built-in one"
        ),
        nargs="?",
        const="built-in",
    )
    add_json(parser)


def run(args: Namespace) -> int:
    from veneer.evaluation.labels import AUTO, read_labels, with_accuracy
    from veneer.evaluation.metrics.registry import find_metrics
    from veneer.evaluation.metrics.user_function import function_from_file

    metrics = [
        function_from_file(name) if _is_file(name) else name
        for name in with_accuracy(_list_metrics(args), args.labels or ())
    ]
    find_metrics(metrics)  # refuses a misspelt name before anything is loaded
    check_rows(args.data)
    check_files([args.against])
    check_writable(args.predictions)
    labels = [] if args.labels in (None, "", AUTO) else read_labels(args.labels)
    base = load_base(args)
    with pause_collection():
        from veneer import api
    resolve_preamble(args, base)
    with working("evaluating") as show_progress:
        result = api.evaluate(
            base,
            args.data,
            metrics=metrics,
            labels=labels,
            length_normalised=args.length_normalised,
            general=args.general,
            against=args.against,
            lookup=args.lookup,
            length=args.length,
            format=args.format,
            train_on=args.train_on,
            max_new_tokens=args.max_new_tokens,
            batch=args.batch,
            predictions=args.predictions,
            system=args.system,
            variables=parse_variables(args),
            columns=parse_columns(args),
            progress=show_progress,
        )
    if args.json:
        print_json({"base": base.source, "adapter": args.adapter, "data": args.data, **result})
    else:
        _print_table(result)
    return 0


def _list_metrics(args: Namespace) -> list[str]:
    return [name for part in args.metrics.split(",") if (name := part.strip())] + args.metric


def _is_file(name: str) -> bool:
    file, _, function = name.rpartition(":")
    return file.endswith(".py") and function.isidentifier()


def _print_table(result: dict[str, Any]) -> None:
    console = make_console()
    intervals, units = result.get("intervals", {}), result.get("units", {})
    against = result.get("against", {})
    has_head = "kind" in result.get("labels", {})

    def line(name: str, figure: str, *notes: str) -> None:
        """Prints a figure and its notes; notes that do not fit go on the next line."""
        row, room = f"{shown(name):<15}{figure:>10}", console.width - 27
        for facts in folded(" · ".join(notes), room).split("\n"):
            for part in wrapped(facts, room).split("\n"):
                console.print(f"{row}  {part}".rstrip())
                row = " " * 25

    for name, value in result.items():
        if name in ("intervals", "units", "general", "against", "labels"):
            continue
        share = units.get(name) == "share"
        notes = [UNITS[name]] if name in UNITS and not has_head else []
        if name in intervals:
            notes.append(f"95% interval {_format_range(intervals[name], share)}")
        elif name == "loss" or name in units:
            notes.append("no interval: it cannot be computed from these rows")
        if name in against:
            other = against[name]
            notes.append(
                f"{_format_signed(other['difference'], share)}"
                f" ({_format_range(other['interval'], share, signed=True)})"
            )
        figure = (
            f"{value:,}"
            if isinstance(value, int)
            else f"{100 * value:.1f}%"
            if share
            else number(value)
        )
        line(name, figure, *notes)
    if "labels" in result:
        details = result["labels"]
        origin = "as given"
        if has_head:
            origin = "of the score head"
        elif details["own"]:
            origin = "from the rows' answers"
        if details["names"]:
            names = cut(", ".join(map(shown, details["names"])), 60)
            line("labels", f"{len(details['names']):,}", f"choices, {origin}: {names}")
        for name, figure, *notes in label_lines(details):
            line(name, figure, *notes)
    if "general" in result:
        details = result["general"]
        notes = ["nats a token of general text", f"{details['documents']} documents"]
        if "forgetting" in details:
            notes.append(f"{number(details['before'])} before")
        line("general", number(details["loss"]), *notes)
        if "forgetting" in details:
            bounds = details["forgetting_interval"]
            figure = _format_range(bounds, False, signed=True)
            figure = (
                f"nats · 95% interval over documents {figure}"
                if bounds
                else f"nats · {figure} over documents"
            )
            line("forgetting", f"{details['forgetting']:+.3f}", figure)
    if against:
        console.print(
            f"differences from {shown(against['file'])}, with 95% intervals over the same rows"
        )


def _format_range(bounds: Sequence[float] | None, share: bool, *, signed: bool = False) -> str:
    if bounds is None:
        return "no interval"
    low, high = bounds
    if share:
        return f"{_format_percent(low, signed)} to {_format_percent(high, signed)}%"
    return f"{low:+.3f} to {high:+.3f}" if signed else f"{number(low)} to {number(high)}"


def _format_percent(value: float, signed: bool) -> str:
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def _format_signed(value: float, share: bool) -> str:
    return f"{100 * value:+.1f}%" if share else f"{value:+.3f}"
