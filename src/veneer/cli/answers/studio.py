"""Serve a base and its adapters, with a page on which you train new ones.

For instance:

  veneer studio
  veneer studio --base HuggingFaceTB/SmolLM2-360M-Instruct --port 9000

Open the address that it prints in a browser. docs/guides/studio.md shows the steps. Everything that
`veneer serve` serves is served too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.bases.names.named import NAMED
from veneer.cli.answers.server import ListeningServer, add_server_flags, run_server, start_here

if TYPE_CHECKING:
    from veneer.library.library import Library
    from veneer.serve.http.keys import ApiKeys
    from veneer.serve.start import ServeSettings

DEFAULT_BASE = next(iter(NAMED))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "veneer studio [--base B] [--library DIR] [--jobs DIR] [--port N] ..."
    parser.add_argument(
        "--base",
        default=DEFAULT_BASE,
        metavar="B",
        help=f"hub id, folder, .gguf file or named default; default: {DEFAULT_BASE}",
    )
    add_server_flags(parser, trains=True)


def run(args: argparse.Namespace) -> int:
    return run_server(args, _start_studio)


def _start_studio(
    args: argparse.Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
) -> ListeningServer:
    return start_here(args, replace(settings, studio=True), keys, library)
