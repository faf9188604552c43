"""Check, convert, split and sample rows. Nothing is trained.

For instance:

  veneer data check tickets.jsonl --base smollm2-135m
  veneer data convert old.csv --map question=prompt --map answer=completion \\
      --out rows.jsonl
  veneer data split rows.jsonl --out rows --validation 0.05 --test 0.1
  veneer data sample org/name 2000 --out general.jsonl
  veneer data replay --base smollm2-135m --out replay
  veneer data gc --days 30 --yes

check shows one row with its trained tokens marked, tokens by role, lengths, and every problem. Its
exit code is 4 if a run would refuse the data. replay lets the base generate rows; mixed into
training, they reduce forgetting.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from veneer.bounds import LINE
from veneer.cli.common import (
    add_action,
    add_data,
    add_json,
    add_map,
    add_variables,
    make_console,
    parse_columns,
    parse_variables,
    pause_collection,
    print_json,
    working,
)
from veneer.cli.early import check_base, check_rows
from veneer.cli.explain import point_to_codes
from veneer.cli.flags import add_value
from veneer.cli.rows.data_verbs import add_row_actions
from veneer.errors import InputError
from veneer.wording import folded, percent, shown, wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.data.checks.check import CheckReport
    from veneer.data.examples import Example

SAMPLE_CHARACTERS = 1200  # shown of one piece; longer ones lose their middle


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    help = "check rows and show what is trained; exit code 4 if a run would refuse them"
    parser = add_action(actions, "check", help)
    parser.set_defaults(act=_check)
    add_row_actions(actions)
    add_value(parser, "data", "D", "rows: file, folder, glob pattern, URL or Hugging Face dataset")
    add_value(
        parser,
        "--base",
        "B",
        "base that provides the tokenizer and the chat template",
        required=True,
    )
    add_value(parser, "--validation", "V", "held-out rows; also checked for rows that are in D")
    add_data(parser, "long_rows")
    add_variables(parser)
    add_map(parser)
    add_value(
        parser,
        "--activation",
        "TEXT",
        "method.activation of the run: every prompt must hold it",
        default="",
    )
    add_value(parser, "--row", "LINE", "line of the row to show; default: the first row", type=LINE)
    add_json(parser)


def run(args: Namespace) -> int:
    act: Callable[[Namespace], int] = args.act
    return act(args)


def _check(args: Namespace) -> int:
    check_base(args.base)
    check_rows(args.data, args.validation)
    with working(f"reading {args.data}"):
        with pause_collection():
            from veneer import api
        data, tokenizer = api.check_data(
            args.data,
            base=args.base,
            length=args.length,
            format=args.format,
            train_on=args.train_on,
            long_rows=args.long_rows,
            validation=args.validation,
            variables=parse_variables(args),
            columns=parse_columns(args),
            activation=args.activation,
        )
    if args.json:
        print_json(data.report.to_dict())
    else:
        console = make_console()
        _print_sample(console, [*data.train, *data.validation], tokenizer, args.row)
        _print_report(console, args.data, data.report)
    return 4 if data.report.refused else 0


def _print_sample(
    console: Console, examples: Sequence[Example], tokenizer: Any, line: int | None
) -> None:
    """Prints one row as the model sees it, with trained tokens in colour or between « and »."""
    from rich.text import Text

    from veneer.data.checks.check import render_sample

    matching = [example for example in examples if line is None or example.ref.line == line]
    if not matching:
        if line is None:
            return
        raise InputError(
            f"line {line} has no row to show", [], "Choose another line, or leave --row out."
        )
    coloured = console.color_system is not None and not console.no_color
    text = Text()
    for piece, trained, _ in render_sample(tokenizer, matching[0]):
        piece = shown(_middle_cut(piece))
        if not trained:
            text.append(piece, style="dim")
        else:
            text.append(piece if coloured else f"«{piece}»", style="bold green")
    marks = "in green" if coloured else "between « and »"
    head = f"{matching[0].ref}, as the model sees it; trained on: {marks}"
    console.print(_fit(console, head))
    console.print(text, soft_wrap=not console.is_terminal)
    console.print()


def _print_report(console: Console, data: str, report: CheckReport) -> None:
    problems = len(report.problems)
    problem_count = f"{problems} problem{'' if problems == 1 else 's'}"
    if not report.formats:
        head = f"{shown(data)}: no row can be read · {problem_count}"
        console.print(folded(head, console.width), style="bold")
    else:
        _print_counts(console, data, report, problem_count)
    for problem in report.problems:
        console.print(
            _fit(console, f"  {shown(problem)}"), style="red" if problem.fatal else "yellow"
        )
        if problem.next_step:
            console.print(_fit(console, f"      {shown(problem.next_step)}"))
    if report.refused:
        console.print("A run would refuse this data.")
    if report.problems:
        codes = list(dict.fromkeys(problem.code for problem in report.problems))
        console.print(_fit(console, point_to_codes(codes)))


def _print_counts(console: Console, data: str, report: CheckReport, problems: str) -> None:
    """Prints counts of rows and tokens."""
    facts = [
        f"{report.rows:,} rows"
        + (f", {report.examples:,} examples" if report.examples > report.rows else ""),
        f"{report.validation_rows:,} held out",
        " and ".join(report.formats),
        problems,
    ]
    console.print(folded(f"{shown(data)}: {' · '.join(facts)}", console.width), style="bold")
    console.print(f"  {'':<12}{'tokens':>12}{'trained':>12}", soft_wrap=False)
    rows = [
        (role or "plain text", n, report.trained_by_role.get(role, 0))
        for role, n in report.tokens_by_role.items()
    ]
    for role, tokens, trained in [*rows, ("all", report.tokens, report.trained_tokens)]:
        line = f"  {shown(role):<12}{tokens:>12,}{trained:>12,}  {percent(trained, tokens)}"
        console.print(line, soft_wrap=False)
    stops = " or ".join(map(shown, report.stop_tokens)) or "none"
    facts = [
        f"stop token trained: {report.stop_token_trained} ({stops})",
        f"length median {report.median:,}",
    ]
    facts += [f"longest {report.longest:,} of {report.length:,} tokens"]
    console.print(folded("  " + " · ".join(facts), console.width))
    if any(report.reasons.get(kind) for kind in ("reasons", "empty", "lost")):
        labels = {
            "reasons": "with reasoning",
            "none": "without",
            "empty": "with an empty block",
            "lost": "whose reasoning the template drops",
        }
        counts = [
            f"{report.reasons[kind]:,} {words}"
            for kind, words in labels.items()
            if report.reasons.get(kind)
        ]
        console.print(folded(f"  answers: {' · '.join(counts)}", console.width))
    if pairs := report.pairs:
        unequal = pairs["longer_preferred"] + pairs["shorter_preferred"]
        facts = [f"pairs of answers: {pairs['pairs']:,}"]
        facts += [f"{pairs[name]:,} {name}" for name in ("identical", "swapped")]
        facts.append(f"longer preferred in {percent(pairs['longer_preferred'], unequal)}")
        console.print(folded("  " + " · ".join(facts), console.width))
    most = max((rows for _, rows in report.histogram), default=0)
    for longest, count in report.histogram:
        bar = "█" * max(round(30 * count / most), 1 if count else 0)
        console.print(f"  up to {longest:>7,} tokens {count:>8,} {bar}".rstrip(), soft_wrap=False)


def _fit(console: Console, line: str) -> str:
    """Wraps a line at a terminal's width; a file or a pipe gets it whole."""
    return wrapped(line, console.width) if console.is_terminal else line


def _middle_cut(text: str) -> str:
    """Cuts the middle of a long piece; its ends show where the mask begins and stops."""
    half = SAMPLE_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"
