"""Rebuild the report (report.html) of a run from its folder; also for a run that was stopped.

For instance:

  veneer report runs/tickets
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from veneer.cli.common import add_json, make_console, print_json
from veneer.cli.flags import add_value


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "run", "RUN", "folder of a run", type=Path)
    add_json(parser)


def run(args: Namespace) -> int:
    from veneer.report.page import write_report

    written = write_report(args.run)
    if args.json:
        print_json({"report": str(written)})
    else:
        make_console().print(str(written))
    return 0
