"""Write an adapter for another program: PEFT, transformers, vLLM or llama.cpp; or base and adapter as one .gguf model.

  peft          PEFT's two files as they are
  transformers  the same, where its load_adapter applies them as they were trained
  vllm          one rank and one scaling for all modules, which is what vLLM reads
  llamacpp      a .gguf file for llama.cpp's --lora; with --merged the whole model, f16 or q8_0

For instance:

  veneer export runs/tickets --to vllm --out served
  veneer export runs/tickets --to llamacpp --out tickets.gguf
  veneer export runs/tickets --to llamacpp --merged --type q8_0 --out model.gguf
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from veneer.cli.common import add_json, add_library, base_and_adapter, held_as, make_console, print_json
from veneer.cli.early import check_base, check_new
from veneer.errors import ConfigError
from veneer.merge.programs import ONE_FILE, Program
from veneer.wording import size

if TYPE_CHECKING:
    from veneer.merge.gguf_model import GGUFReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="A", help="name in the library, or a folder of an adapter or a run")
    parser.add_argument("--to", required=True, choices=get_args(Program), help="the program")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="folder (llamacpp: file) to write; it must not exist"
    )
    parser.add_argument("--base", metavar="B", help="the base; default: the adapter's own")
    parser.add_argument("--merged", action="store_true", help="llamacpp: the base with the adapter in it")
    parser.add_argument(
        "--type",
        choices=["f32", "f16", "q8_0"],
        help="llamacpp: adapter f32 (default) or f16; merged f16 (default) or q8_0",
    )
    parser.add_argument(
        "--into", choices=["original", "dequantised"], help="merged, over a quantised base: the weights to add to"
    )
    parser.add_argument("--original", metavar="B", help="with --into original over a .gguf file: where they are")
    parser.add_argument("--force-base", action="store_true", help="merged: though it was trained on another base")
    add_library(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_new(args.out)
    base, folder = base_and_adapter(args.base, args.adapter, args.library)
    _check(args)
    check_base(base)
    from veneer import api

    console = make_console(json=args.json)
    assert folder is not None
    if args.merged:
        quantize, keep_dense = held_as(None, folder, force_base=args.force_base)
        report = api.export_merged_gguf(
            [(folder, 1.0)],
            base=base,
            out=args.out,
            type=args.type or "f16",
            quantize=quantize,
            keep_dense=keep_dense,
            into=args.into,
            original=args.original,
            force_base=args.force_base,
        )
        if args.json:
            print_json(
                {"out": str(report.out), "bytes": report.bytes, "type": report.type, "survival": report.total.share}
            )
        else:
            console.print("\n".join(_merged_lines(report)), soft_wrap=True)
        return 0
    made = api.export_adapter(folder, to=args.to, base=base, out=args.out, dtype=args.type or "f32")
    if args.json:
        print_json({"out": str(made.out), "bytes": made.bytes, "notes": made.notes})
    else:
        console.print(
            "\n".join([f"{made.out}: {size(made.bytes)}, for {args.to}", *(f"  {n}" for n in made.notes)]),
            soft_wrap=True,
        )
    return 0


def _check(args: argparse.Namespace) -> None:
    faults = []
    if args.to not in ONE_FILE:
        faults += ["--merged: a merged folder is made by veneer merge"] if args.merged else []
        faults += [f"--type {args.type}: only .gguf files have one"] if args.type else []
    elif args.type == ("f32" if args.merged else "q8_0"):
        faults.append(
            f"--type {args.type}: " + ("merged models are f16 or q8_0" if args.merged else "adapters are f32 or f16")
        )
    for option, given in (("--into", args.into), ("--original", args.original)):
        if given and not args.merged:
            faults.append(f"{option} {given}: only a merged model is added to weights")
    if args.force_base and not args.merged:
        faults.append("--force-base: only a merged model is computed from the base's weights")
    if faults:
        raise ConfigError("these options do not go together", faults)


def _merged_lines(report: GGUFReport) -> list[str]:
    from veneer.cli.merge import survival_lines

    lines = [f"{report.out}: {size(report.bytes)}, {report.type}, sums in float32"]
    if report.f16_instead:
        lines.append(f"  {report.f16_instead} matrices stay f16: their rows are no multiple of 32")
    return lines + (survival_lines(report.total, report.layers) if report.weights else [])
