"""Serve a base and its adapters, with a page on which you train new ones.

For instance:

  veneer studio
  veneer studio --base HuggingFaceTB/SmolLM2-360M-Instruct --port 9000

Open the address that it prints in a browser. docs/guides/studio.md shows the steps. Everything that
`veneer serve` serves is served too.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.bases.names.named import NAMED
from veneer.cli.answers.server import ListeningServer, add_server_flags, run_server, start_here
from veneer.cli.flags import add_repeated, add_value
from veneer.errors import ConfigError
from veneer.files.home import expanded

if TYPE_CHECKING:
    from veneer.library.library import Library
    from veneer.serve.http.keys import ApiKeys
    from veneer.serve.start import ServeSettings

DEFAULT_BASE = next(iter(NAMED))


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer studio [--base B] [--library DIR] [--bases DIR] [--jobs DIR] ..."
    add_value(
        parser,
        "--base",
        "B",
        f"hub id, folder, .gguf file or named default; default: {DEFAULT_BASE}",
        default=DEFAULT_BASE,
    )
    add_server_flags(parser, trains=True)
    add_repeated(
        parser,
        "--bases",
        "DIR",
        (
            "folder of models and .gguf files that the page offers as bases, beside those in the"
            " hub's cache; may be repeated"
        ),
    )


def run(args: Namespace) -> int:
    return run_server(args, _start_studio)


def _start_studio(
    args: Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
) -> ListeningServer:
    folders = [expanded(folder) for folder in args.bases]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ConfigError("--bases names no folder", missing)
    return start_here(args, replace(settings, studio=True, bases=folders), keys, library)
