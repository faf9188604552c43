"""Write a base in 4 bits in bitsandbytes' format, which Veneer, transformers and others load.

For instance:

  veneer quantize --base smollm2-135m --out smollm2-nf4
  veneer train --base smollm2-nf4 --data tickets.jsonl --out runs/tickets

Training over this folder gives the same bits as training with --quantize nf4; the original weights
are no longer needed.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from veneer.cli.bases import add_dtype, storage_dtype
from veneer.cli.common import add_json, make_console, pause_collection, print_json, working
from veneer.cli.early import check_base, check_new
from veneer.cli.flags import add_repeated, add_value
from veneer.quant.config import FOUR_BITS, formats_that


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "--base", "B", "hub id, folder or named default", required=True)
    add_value(parser, "--out", "DIR", "new folder for the base", required=True)
    add_value(
        parser,
        "--quantize",
        None,
        f"4-bit format; default: {FOUR_BITS}",
        default=FOUR_BITS,
        choices=formats_that("writes_folder"),
    )
    add_repeated(
        parser, "--keep-dense", "NAME", "module to leave in full precision; may be repeated"
    )
    add_dtype(parser)
    add_json(parser)


def run(args: Namespace) -> int:
    check_new(args.out)
    check_base(args.base)
    with working(f"quantising {args.base}"):
        with pause_collection():
            from veneer import api
        base = api.load(
            args.base,
            dtype=storage_dtype(args.dtype),
            device="cpu",
            quantize=args.quantize,
            keep_dense=args.keep_dense,
        )
        written = api.write_quantized(base, args.out)
    from veneer.bases.identity.weight_table import weight_table

    table = weight_table(base.model)
    console = make_console(json=args.json, wraps=True)
    console.print(f"{'':<18}{'held in':<10}{'modules':>9}{'M values':>11}{'MB':>9}")
    for group in table:
        console.print(
            f"{group.what:<18}{group.held:<10}{group.modules:>9}"
            f"{group.values / 1e6:>11.1f}{group.bytes / 1e6:>9.1f}"
        )
    console.print(f"written: {written.path}, {written.bytes / 1e6:.1f} MB of weights")
    if not written.others_read:
        console.print(
            "fused experts are packed too: Veneer reads them, transformers with bitsandbytes"
            " does not"
        )
    if args.json:
        groups = [asdict(group) for group in table]
        print_json({"path": str(written.path), "bytes": written.bytes, "weights": groups})
    return 0
