"""Check whether another program can load an adapter correctly; exit code 4 if it cannot.

For instance:

  veneer lint runs/tickets --for vllm
"""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import get_args

from veneer.cli.bases import locate_base_and_adapter
from veneer.cli.common import add_json, add_library, make_console, pause_collection, print_json
from veneer.cli.early import check_base
from veneer.cli.flags import add_value
from veneer.merge.programs import Program


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "adapter", "A", "name in the library, or folder of an adapter or a run")
    parser.add_argument(
        "--for", dest="consumer", required=True, choices=get_args(Program), help="target program"
    )
    add_value(parser, "--base", "B", "base; default: the adapter's base")
    add_library(parser)
    add_json(parser)


def run(args: Namespace) -> int:
    base, folder = locate_base_and_adapter(args.base, args.adapter, args.library)
    assert folder is not None
    check_base(base)
    with pause_collection():
        from veneer import api

    findings = api.lint_adapter(folder, args.consumer, base=base)
    console = make_console(json=args.json)
    if args.json:
        print_json(
            {
                "adapter": str(folder),
                "for": args.consumer,
                "findings": [asdict(f) for f in findings],
            }
        )
    for finding in findings:
        kind = "silently wrong" if finding.silent else "refused"
        console.print(f"{kind:<15}{finding.what}")
        if finding.mended:
            console.print(f"{'':<15}→ {finding.mended}")
    if not findings:
        console.print(f"{args.consumer} can load {args.adapter}")
    return 4 if findings else 0
