"""Defines the flags of `veneer serve` and `veneer studio`, and runs a server in this process."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.bounds import COUNT, MIB, PART, PORT, ROWS, SECONDS
from veneer.cli.bases import add_base_format
from veneer.cli.common import (
    add_library,
    add_lookup,
    add_variables,
    make_console,
    parse_variables,
    pause_collection,
    working,
)
from veneer.cli.early import check_base
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.errors import ConfigError
from veneer.private.argparse import Container
from veneer.wording import folded, shown, size

if TYPE_CHECKING:
    import socket

    from veneer.library.library import Library
    from veneer.serve.engine.fine_tuning import TrainSettings
    from veneer.serve.http.connection import Server
    from veneer.serve.http.keys import ApiKeys
    from veneer.serve.start import ServeSettings

NAMES_SHOWN = 6
COLUMNS = 80


@dataclass(frozen=True)
class ListeningServer:
    """A server that already listens.

    screen_lines   what to print when it starts
    close          releases what the server uses
    """

    server: Server
    socket: socket.socket
    screen_lines: list[str]
    close: Callable[[], None] = lambda: None


Start = Callable[[Namespace, "ServeSettings", "ApiKeys", "Library"], ListeningServer]
"""Loads the base and opens the port."""


def add_server_flags(parser: ArgumentParser, *, trains: bool = False) -> Container:
    """Adds the flags of a server, without its base and the place where it runs.

    trains: whether the server trains without --train. Returns the group of access flags.
    """
    add_library(parser)
    add_value(
        parser,
        "--host",
        None,
        "address to listen on; default: 127.0.0.1 (local)",
        default="127.0.0.1",
    )
    add_value(
        parser, "--port", "N", "port; 0 picks a free one; default: 8000", type=PORT, default=8000
    )
    add_value(parser, "--name", "NAME", "model name of the base; default: its --base name")
    add_value(
        parser,
        "--system",
        "TEXT",
        "default system message; default: the one each adapter was trained with; '': none",
    )
    add_variables(
        parser,
        "; default: as each adapter was trained; chat_template_kwargs of a request override it",
    )
    add_repeated(parser, "--pin", "A", "always keep this adapter in memory")
    add_switch(
        parser,
        "--auto",
        "send requests for model auto to the adapter whose training prompts are nearest",
    )
    add_value(parser, "--runs", "DIR", "folder of runs to show on the page")
    add_base_format(parser, "as it is stored")
    add_lookup(parser)
    training = parser.add_argument_group("training")
    if trains:
        parser.set_defaults(train=True)
    else:
        add_switch(
            training, "--train", "accept rows and training jobs: /v1/files and /v1/fine_tuning/jobs"
        )
    add_value(training, "--jobs", "DIR", "folder of jobs and uploaded files; default: your own")
    add_value(
        training,
        "--jobs-mib",
        "N",
        "MiB for jobs, runs and uploaded files together; default: 20480",
        type=MIB,
    )
    add_value(
        training,
        "--train-share",
        "S",
        (
            "share that training keeps: it uses this part of the threads, and is suspended while"
            " requests wait for their first token, for at most 1 - S of the time; default: 0.5"
        ),
        type=PART,
    )
    limits = parser.add_argument_group("limits")
    add_value(limits, "--rows", "N", "answers computed at once; default: 64", type=ROWS, default=64)
    add_value(
        limits,
        "--max-waiting",
        "N",
        "waiting requests before 429; default: 256",
        type=COUNT,
        default=256,
    )
    add_value(
        limits,
        "--max-adapters",
        "N",
        "adapters active at once; default: 64",
        type=COUNT,
        default=64,
    )
    add_value(
        limits,
        "--cache-mib",
        "N",
        "MiB for the key/value cache; default: a quarter of memory",
        type=MIB,
    )
    add_value(
        limits, "--adapters-mib", "N", "MiB for adapters; default: 1024", type=MIB, default=1024
    )
    add_value(
        limits,
        "--seconds",
        "S",
        "time limit of a request; default: 600",
        type=SECONDS,
        default=600.0,
    )
    add_value(
        limits,
        "--drain",
        "S",
        "seconds for open requests after SIGTERM; default: 30",
        type=SECONDS,
        default=30.0,
    )
    access = parser.add_argument_group("access")
    add_value(
        access,
        "--keys",
        "FILE",
        (
            "file with hashes of API keys; VENEER_API_KEY, VENEER_TRAIN_KEY and VENEER_ADMIN_KEY"
            " also work"
        ),
    )
    add_repeated(access, "--allow-host", "NAME", "extra host name to accept")
    add_repeated(access, "--allow-origin", "URL", "web site whose pages may send requests")
    return access


def run_server(args: Namespace, start: Start) -> int:
    """Serves until a signal."""
    _require_extra()
    check_base(args.base)
    from veneer.library.library import Library

    # Errors hide the library's path, and a relative path may equal a word of their text.
    library = Library(args.library and Path(args.library).resolve())
    if args.train:
        library.make()
    library.entries()  # checks the library before a base is loaded
    with working(f"loading {args.base}"):
        with pause_collection():
            from veneer.serve.run import listening, run

            listening(args.host, args.port).close()  # checks the port before a base is loaded
            from veneer.serve.start import keys_of
        settings = _read_settings(args)
        keys = keys_of(settings, os.environ)
        server = start(args, settings, keys, library)
    _configure_logging()
    console = make_console()
    for line in server.screen_lines:
        console.print(shown(line))
    try:
        run(server.server, [server.socket])
    finally:
        server.close()
    console.print("stopped")
    return 0


def start_here(
    args: Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
) -> ListeningServer:
    """Starts a server in this process."""
    with pause_collection():
        from veneer import api
        from veneer.serve.start import open_server
    base = api.load(args.base, dtype=args.dtype, device=args.device, quantize=args.quantize)
    server = open_server(base, library, settings, keys)
    service = server.service
    adapters = [card["id"] for card in service.names.cards()[1:]]
    cache_line = f"key/value cache {size(service.cache_bytes)} · {service.cache_tokens:,} tokens"
    page = {"page": "train, judge and keep adapters"} if settings.studio else {}
    screen_lines = describe(
        service.names.base_name, adapters, cache_line, server.url, keys, args.host, **page
    )
    return ListeningServer(server.server, server.socket, screen_lines)


def _read_settings(args: Namespace) -> ServeSettings:
    from veneer.decoding.schedule.limits import Limits
    from veneer.serve.start import ServeSettings

    steps = max(Limits.step_tokens, args.rows)
    return ServeSettings(
        host=args.host,
        port=args.port,
        name=args.name,
        limits=Limits(
            rows=args.rows,
            step_tokens=steps,
            max_waiting=args.max_waiting,
            max_adapters=args.max_adapters,
        ),
        cache_bytes=None if args.cache_mib is None else args.cache_mib * 2**20,
        adapters_bytes=args.adapters_mib * 2**20,
        seconds=args.seconds,
        drain_seconds=args.drain,
        keys=None if args.keys is None else Path(args.keys),
        hosts=args.allow_host,
        origins=args.allow_origin,
        pinned=args.pin,
        system=args.system,
        variables=parse_variables(args),
        runs=None if args.runs is None else Path(args.runs),
        lookup=args.lookup,
        auto=args.auto,
        train=_read_train_settings(args),
    )


def _read_train_settings(args: Namespace) -> TrainSettings | None:
    """Returns the settings of --train. Raises ConfigError for its flags without it."""
    names = [name for name in ("jobs", "jobs_mib", "train_share") if getattr(args, name)]
    if not args.train:
        if names:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ConfigError(f"{flags}: only with --train", [], "Give --train too.")
        return None
    from veneer.jobs.store import TRAIN_SHARE
    from veneer.serve.engine.fine_tuning import TrainSettings
    from veneer.serve.limits import JOB_LIMITS

    limits = JOB_LIMITS
    if args.jobs_mib is not None:
        limits = replace(limits, disk_bytes=args.jobs_mib * 2**20)
    run = {"base": args.base, "dtype": args.dtype, "device": args.device}
    quantize = {} if args.quantize is None else {"quantize": args.quantize}
    return TrainSettings(
        run={**run, **quantize},
        folder=None if args.jobs is None else Path(args.jobs),
        share=args.train_share or TRAIN_SHARE,
        limits=limits,
    )


def describe(
    base: str,
    adapters: Sequence[str],
    capacity_line: str,
    url: str,
    keys: ApiKeys,
    host: str,
    *,
    page: str = "base and adapters side by side",
) -> list[str]:
    """Lists the lines of the start screen: models, address, access. page: what the page shows"""
    from veneer.serve.run import is_loopback

    count = f"{len(adapters):,} adapter" + ("" if len(adapters) == 1 else "s")
    first_names = ", ".join(adapters[:NAMES_SHOWN]) + (", …" if len(adapters) > NAMES_SHOWN else "")
    if not keys:
        access = "no API key required"
    else:
        access = "API key required" + (
            "" if is_loopback(host) else " · no TLS: put a proxy in front"
        )
    return [
        folded(f"{base} · {count}" + (f" · {first_names}" if first_names else ""), COLUMNS),
        f"  {capacity_line}",
        f"  {url}/v1 · {access}",
        f"  {url}/ in a browser: {page}",
        "  Ctrl-C stops the server",
    ]


def make_key(args: Namespace) -> int:
    from veneer.serve.http.keys import new_key

    if not args.keys:
        raise ConfigError("--new-key needs a file for the key's hash", [], "Give --keys FILE.")
    print(new_key(Path(args.keys), args.new_key))
    print("Keep this key: it is shown only once. The file has only its hash.", file=sys.stderr)
    return 0


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as fault:
        raise ConfigError(
            f"serving needs a package that is not installed: {fault.name}",
            [],
            "pip install 'veneer[serve]'",
        ) from None


def _configure_logging() -> None:
    """Logs a line per request on stderr, and warnings of uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("veneer.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
