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

import argparse
from typing import TYPE_CHECKING

from veneer.bounds import PART, RANK, SEED, WEIGHT
from veneer.cli.bases import locate_base_and_adapter, pair_with_weights
from veneer.cli.common import add_json, add_library, make_console, pause_collection, print_json
from veneer.cli.early import check_base, check_new
from veneer.wording import size

if TYPE_CHECKING:
    from veneer.merge.combine.combine_run import CombineReport

HOWS = ("cat", "linear", "svd", "ties", "dare", "magnitude")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "veneer combine A [A ...] [--weights W [W ...]] [--how METHOD] --out DIR ..."
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="A",
        help="names in the library, or folders of adapters or runs",
    )
    parser.add_argument(
        "--weights", nargs="+", type=WEIGHT, metavar="W", help="one weight per adapter; default: 1"
    )
    parser.add_argument(
        "--how", choices=HOWS, default="cat", help="method, see above; default: cat"
    )
    parser.add_argument(
        "--rank",
        type=RANK,
        metavar="R",
        help="rank of the result; default: the largest for svd, the sum for pruning",
    )
    parser.add_argument(
        "--density", type=PART, metavar="D", help="share of entries to keep; default: 0.5"
    )
    parser.add_argument("--seed", type=SEED, metavar="N", help="random seed of dare; default: 0")
    parser.add_argument(
        "--base", metavar="B", help="base of all adapters; default: that of the first"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the adapter")
    add_library(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_new(args.out)
    base, _ = locate_base_and_adapter(args.base, args.adapters[0], args.library)
    adapters = pair_with_weights(args.adapters, args.weights, args.library)
    check_base(base)
    from veneer.training.output.working import working

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
    console = make_console(json=False)
    ranks = sorted(set(report.ranks.values()))
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    console.print(
        f"{report.out}: {size(report.bytes)}, {len(report.ranks)} places, {rank_text}",
        soft_wrap=True,
    )
    exact = "the exact weighted sum of the updates"
    if report.how == "cat":
        console.print(f"  {exact}", soft_wrap=True)
        return
    subject = (
        exact if report.how in ("linear", "svd") else f"what {report.how} makes of the updates"
    )
    console.print(f"  error {report.error:.2%} of {subject}", soft_wrap=True)
    worst = sorted(report.errors.items(), key=lambda item: -item[1])[:3]
    for where, error in worst if report.error > 1e-6 else []:
        console.print(f"  {error:>7.2%} {where}", soft_wrap=True)
