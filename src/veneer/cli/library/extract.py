"""Extract an adapter from a fully fine-tuned model: its difference from the base, at low rank.

For instance:

  veneer extract --base smollm2-135m --model runs/full/model --rank 32 \\
      --out extracted
  veneer extract --base B --model DIR --energy 0.9 --keep --out extracted
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from veneer.bounds import ENERGY, RANK
from veneer.cli.common import add_json, make_console, pause_collection, print_json, working
from veneer.cli.early import check_base, check_new
from veneer.cli.flags import add_switch, add_value
from veneer.wording import size

if TYPE_CHECKING:
    from veneer.merge.combine.extract import ExtractReport


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "--base", "B", "base that the model was trained from", required=True)
    add_value(parser, "--model", "DIR", "folder of the fine-tuned model", required=True)
    add_value(parser, "--rank", "R", "rank of every update", type=RANK)
    add_value(
        parser,
        "--energy",
        "E",
        "instead of --rank: share of the squared difference to keep per module",
        type=ENERGY,
    )
    add_switch(parser, "--keep", "also keep changed norms, embeddings, head and biases in full")
    add_value(parser, "--out", "DIR", "new folder for the adapter", required=True)
    add_switch(parser, "--no-logits", "do not compare logits with the model")
    add_json(parser)


def run(args: Namespace) -> int:
    check_new(args.out)
    check_base(args.base)
    check_base(args.model)
    with working("extracting"):
        with pause_collection():
            from veneer import api
        report = api.extract_adapter(
            args.base,
            args.model,
            out=args.out,
            rank=args.rank,
            energy=args.energy,
            keep=args.keep,
            check_logits=not args.no_logits,
        )
    if args.json:
        print_json(report.to_dict())
    else:
        _print(report)
    return 0


def _print(report: ExtractReport) -> None:
    from veneer.cli.library.merge import format_logits, format_percent

    console = make_console()
    lines = [
        f"{report.out}: {size(report.bytes)}",
        "  module            places   change     rank    error",
    ]
    for kind, part in report.parts.items():
        low, high = part.ranks
        ranks = str(low) if low == high else f"{low}-{high}"
        lines.append(
            f"  {kind:<16}{part.modules:>8} {format_percent(part.relative_size):>8} {ranks:>8}"
            f" {part.error:>8.1%}"
        )
    lines.append(
        f"  {'all':<16}{sum(p.modules for p in report.parts.values()):>8} {'':>8} {'':>8}"
        f" {report.error:>8.1%}"
    )
    if report.kept:
        lines.append(f"  kept in full: {len(report.kept)} other changed weights")
    if report.left_out:
        lines.append(f"  dropped: {len(report.left_out)} other changed weights; --keep keeps them")
        largest = sorted(report.left_out.items(), key=lambda item: -item[1])[:4]
        lines += [f"    {format_percent(share):>8} {name}" for name, share in largest]
    lines += [f"  note: {note}" for note in report.notes]
    if report.logits is not None:
        lines += [
            "",
            *format_logits(
                "the fine-tuned model", report.logits, effect="the model against its base"
            ),
        ]
    console.print("\n".join(lines))
