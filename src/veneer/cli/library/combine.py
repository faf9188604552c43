"""Combine several adapters into one. A negative weight removes a skill.

  cat        exact sum; the ranks add up (default)
  linear     exact sum at the smallest rank
  svd        best approximation of the sum at --rank; prints its error
  magnitude  keeps the largest entries of each update (--density), then svd
  ties       as magnitude, then elects signs and averages updates that agree
  dare       drops entries at random (--density, --seed) and scales up the rest

For instance:

  veneer combine runs/tickets runs/tone --weights 1 0.5 --out both
  veneer combine A B --how svd --rank 16 --out both
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from veneer.bounds import PART, RANK, SEED, WEIGHT
from veneer.cli.bases import locate_base_and_adapter, pair_with_weights
from veneer.cli.common import (
    add_json,
    add_library,
    make_console,
    pause_collection,
    print_json,
    working,
)
from veneer.cli.early import check_base, check_new
from veneer.cli.flags import add_value
from veneer.wording import size

if TYPE_CHECKING:
    from veneer.merge.combine.combine_run import CombineReport

HOWS = ("cat", "linear", "svd", "ties", "dare", "magnitude")


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer combine A [A ...] [--weights W [W ...]] [--how METHOD] --out DIR ..."
    add_value(
        parser, "adapters", "A", "names in the library, or folders of adapters or runs", nargs="+"
    )
    add_value(
        parser, "--weights", "W", "one weight per adapter; default: 1", type=WEIGHT, nargs="+"
    )
    add_value(parser, "--how", None, "method, see above; default: cat", default="cat", choices=HOWS)
    add_value(
        parser,
        "--rank",
        "R",
        "rank of the result; default: the largest for svd, the sum for pruning",
        type=RANK,
    )
    add_value(parser, "--density", "D", "share of entries to keep; default: 0.5", type=PART)
    add_value(parser, "--seed", "N", "random seed of dare; default: 0", type=SEED)
    add_value(parser, "--base", "B", "base of all adapters; default: that of the first")
    add_value(parser, "--out", "DIR", "new folder for the adapter", required=True)
    add_library(parser)
    add_json(parser)


def run(args: Namespace) -> int:
    check_new(args.out)
    base, _ = locate_base_and_adapter(args.base, args.adapters[0], args.library)
    adapters = pair_with_weights(args.adapters, args.weights, args.library)
    check_base(base)
    with working("combining"):
        with pause_collection():
            from veneer import api
        from veneer.merge.combine.combine import Recipe

        recipe = Recipe(args.how, rank=args.rank, density=args.density, seed=args.seed)
        report = api.combine_adapters(adapters, recipe, base=base, out=args.out)
    if args.json:
        print_json(report.to_dict())
    else:
        _print(report)
    return 0


def _print(report: CombineReport) -> None:
    console = make_console()
    ranks = sorted(set(report.ranks.values()))
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    console.print(f"{report.out}: {size(report.bytes)}, {len(report.ranks)} places, {rank_text}")
    exact = "the exact weighted sum of the updates"
    if report.how == "cat":
        console.print(f"  {exact}")
        return
    subject = (
        exact if report.how in ("linear", "svd") else f"what {report.how} makes of the updates"
    )
    console.print(f"  error {report.error:.2%} of {subject}")
    worst = sorted(report.errors.items(), key=lambda item: -item[1])[:3]
    for where, error in worst if report.error > 1e-6 else []:
        console.print(f"  {error:>7.2%} {where}")
