"""Merge adapters into their base and write a plain model folder for transformers, vLLM and others.

The merge sums in float32, rounds once, measures how much of the update survives, loads the folder,
and compares its logits with the adapter on its base. If the update would be lost, the merge is
refused and nothing is written.

For instance:

  veneer merge --adapter runs/tickets --out merged
  veneer merge --base B --adapter A1 A2 --weights 1 -0.5 --out merged \\
      --dtype fp16
  veneer merge --base B --quantize nf4 --into dequantised --adapter A \\
      --out merged
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from veneer.bounds import SEED, WEIGHT
from veneer.cli.bases import locate_base_and_adapter, pair_with_weights, resolve_weight_format
from veneer.cli.common import (
    add_json,
    add_library,
    make_console,
    pause_collection,
    print_json,
    working,
)
from veneer.cli.early import check_base, check_new, check_rows
from veneer.cli.flags import add_switch, add_value
from veneer.quant.config import FORMATS
from veneer.wording import number, size

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.merge.fold.folder import MergeReport
    from veneer.merge.fold.rounding import Survival
    from veneer.merge.fold.verify import LogitCheck

DTYPES = ("bf16", "fp16", "fp32")


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer merge [--base B] --adapter A [A ...] [--weights W [W ...]] --out DIR ..."
    add_value(
        parser,
        "--base",
        "B",
        "hub id, folder, .gguf file or named default; default: the adapter's base",
    )
    add_value(
        parser,
        "--adapter",
        "A",
        "names in the library, or folders of adapters or runs",
        nargs="+",
        required=True,
    )
    add_value(
        parser, "--weights", "W", "one weight per adapter; default: 1", type=WEIGHT, nargs="+"
    )
    add_value(parser, "--out", "DIR", "new folder for the model", required=True)
    add_value(
        parser,
        "--dtype",
        None,
        "type of the weights; default: as the base stores them",
        choices=DTYPES,
    )
    add_switch(parser, "--stochastic", "round at random, so that rounding errors cancel on average")
    add_value(
        parser, "--seed", "N", "random seed of --stochastic; default: 0", type=SEED, default=0
    )
    add_value(
        parser,
        "--quantize",
        None,
        "format of the base in training; default: read from the adapter",
        choices=FORMATS,
    )
    add_value(
        parser,
        "--into",
        None,
        "for a quantised base: which weights to add the update to",
        choices=["original", "dequantised"],
    )
    add_value(
        parser, "--original", "B", "the original weights, for --into original with a .gguf file"
    )
    add_value(parser, "--data", "D", "rows to compare logits on; default: built-in texts")
    add_switch(parser, "--no-logits", "do not compare logits, for a base that does not run here")
    add_switch(parser, "--force-base", "merge even if the adapter was trained on another base")
    add_library(parser)
    add_json(parser)


def run(args: Namespace) -> int:
    check_new(args.out)
    base, folder = locate_base_and_adapter(args.base, args.adapter[0], args.library)
    adapters = pair_with_weights(args.adapter, args.weights, args.library)
    quantize, keep_dense = resolve_weight_format(args.quantize, folder, force_base=args.force_base)
    check_base(base)
    check_rows(args.data)
    with working("merging"):
        with pause_collection():
            from veneer import api
        report = api.merge_adapters(
            base,
            adapters,
            out=args.out,
            dtype=args.dtype,
            stochastic=args.stochastic,
            seed=args.seed,
            quantize=quantize,
            keep_dense=keep_dense,
            into=args.into,
            original=args.original,
            data=args.data,
            check_logits=not args.no_logits,
            force_base=args.force_base,
        )
    if args.json:
        print_json(report.to_dict())
    else:
        _print(report, make_console())
    return 0


def _print(report: MergeReport, console: Console) -> None:
    def line(text: str) -> None:
        console.print(text)

    rounding = "rounded at random" if report.stochastic else "rounded to nearest"
    line(f"{report.out}: {size(report.bytes)}, {report.dtype}, sums in float32, {rounding}")
    if report.untied:
        line("  weights that shared one tensor are now separate")
    console.print(*format_survival(report.total, report.layers), sep="\n")
    if report.logits is None:
        line("\n  logits: not compared (--no-logits)")
        return
    reference = (
        "the adapter on the weights merged into" if report.as_trained else "the adapter on its base"
    )
    line("")
    for text in format_logits(reference, report.logits):
        line(text)
    if report.as_trained is not None:
        line("")
        for text in format_logits(
            "the adapter on the quantised base of its training", report.as_trained
        ):
            line(text)


def format_survival(whole: Survival, layers: dict[str, Survival]) -> list[str]:
    """Formats the update's size, the share that survives rounding, and that share by layer."""
    lines = [
        f"  the update is {format_percent(whole.relative_size)} of the weights' size",
        f"  {whole.share:.1%} of it is left after rounding",
        f"  rounding adds an error of {format_percent(whole.rounding)} of the weights' size",
    ]
    if {f"{part.share:.1%}" for part in layers.values()} == {"100.0%"}:
        return lines
    lines.append("  left in each layer")
    numbered = [f"{name:>4} {part.share:>6.1%}" for name, part in layers.items() if name.isdigit()]
    lines += ["  " + "".join(numbered[start : start + 6]) for start in range(0, len(numbered), 6)]
    lines += [f"  {part.share:>6.1%} {name}" for name, part in layers.items() if not name.isdigit()]
    return lines


def format_percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def format_logits(
    what: str, check: LogitCheck, *, effect: str = "adapter against base"
) -> list[str]:
    return [
        f"  logits against {what}, {check.tokens} tokens",
        (
            f"    difference  {number(check.mean_difference):>9} on average,"
            f" {number(check.max_difference)} at most"
        ),
        (
            f"    effect      {number(check.mean_effect):>9} on average, {number(check.max_effect)}"
            f" at most ({effect})"
        ),
        (
            f"    KL          {number(check.kl):>9} nats a token · same first choice"
            f" {check.same_top:.1%}"
        ),
    ]
