"""Serve a base and every adapter of a library over HTTP, with OpenAI's API.

For instance:

  veneer serve --base smollm2-135m
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}]}'

Adapters that you add to the library are served without a restart; the adapter's name is the model
name. docs/serve.md describes clients, fields and keys.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.bounds import COUNT, MIB, PORT, ROWS, SECONDS
from veneer.cli.bases import add_dtype
from veneer.cli.common import (
    add_library,
    add_lookup,
    add_variables,
    make_console,
    parse_variables,
    pause_collection,
)
from veneer.cli.early import check_base
from veneer.errors import ConfigError
from veneer.quant.config import FORMATS
from veneer.wording import folded, shown, size

if TYPE_CHECKING:
    import socket

    from veneer.library.library import Library
    from veneer.serve.http.connection import Server
    from veneer.serve.http.keys import ApiKeys
    from veneer.serve.start import ServeSettings

NAMES_SHOWN = 6
COLUMNS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "veneer serve --base B [--library DIR] [--port N] [--keys FILE] ..."
    parser.add_argument("--base", metavar="B", help="hub id, folder, .gguf file or named default")
    add_library(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; default: 127.0.0.1 (this machine only)",
    )
    parser.add_argument(
        "--port",
        type=PORT,
        default=8000,
        metavar="N",
        help="port; 0 picks a free one; default: 8000",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="model name of the base; default: its --base name"
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="default system message; default: the one each adapter was trained with; '': none",
    )
    add_variables(
        parser,
        "; default: as each adapter was trained; chat_template_kwargs of a request override it",
    )
    parser.add_argument(
        "--pin", action="append", default=[], metavar="A", help="always keep this adapter in memory"
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of runs to show on the page")
    add_dtype(parser)
    parser.add_argument(
        "--quantize", choices=FORMATS, help="format of the base's linear layers in memory"
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ...; default: auto"
    )
    add_lookup(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--rows", type=ROWS, default=64, metavar="N", help="answers computed at once; default: 64"
    )
    limits.add_argument(
        "--max-waiting",
        type=COUNT,
        default=256,
        metavar="N",
        help="waiting requests allowed; beyond that, 429; default: 256",
    )
    limits.add_argument(
        "--max-adapters",
        type=COUNT,
        default=64,
        metavar="N",
        help="adapters active at once; default: 64",
    )
    limits.add_argument(
        "--cache-mib",
        type=MIB,
        metavar="N",
        help="MiB for the key/value cache; default: a quarter of memory",
    )
    limits.add_argument(
        "--adapters-mib",
        type=MIB,
        default=1024,
        metavar="N",
        help="MiB for adapters; default: 1024",
    )
    limits.add_argument(
        "--seconds",
        type=SECONDS,
        default=600.0,
        metavar="S",
        help="time limit of a request; default: 600",
    )
    limits.add_argument(
        "--drain",
        type=SECONDS,
        default=30.0,
        metavar="S",
        help="seconds to finish open requests after SIGTERM; default: 30",
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--keys",
        metavar="FILE",
        help="file with hashes of API keys; VENEER_API_KEY and VENEER_ADMIN_KEY also work",
    )
    access.add_argument(
        "--new-key",
        choices=["use", "admin"],
        help="make a key, print it, store its hash in FILE of --keys, and exit",
    )
    access.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="extra host name to accept",
    )
    access.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web site whose pages may send requests",
    )
    where = parser.add_argument_group("where to run")
    where.add_argument(
        "--on", choices=PLACES, default="here", help="in this process or on Ray; default: here"
    )
    where.add_argument(
        "--address",
        metavar="A",
        help="address of the Ray cluster, or auto; default: start one here",
    )
    where.add_argument(
        "--replicas", type=COUNT, metavar="N", help="minimum number of replicas; default: 1"
    )
    where.add_argument(
        "--max-replicas",
        type=COUNT,
        metavar="N",
        help="maximum number of replicas; more start while requests wait; default: --replicas",
    )
    where.add_argument(
        "--cpus",
        type=COUNT,
        metavar="N",
        help="CPUs per replica; default: the cluster's CPUs, shared equally",
    )


def run(args: argparse.Namespace) -> int:
    if args.new_key:
        return _make_key(args)
    if not args.base:
        raise ConfigError(
            "no base is named",
            [],
            "Give --base (a hub id, a folder, a .gguf file or smollm2-135m).",
        )
    _require_extra()
    check_base(args.base)
    from veneer.library.library import Library
    from veneer.training.output.working import working

    # Errors hide the library's path, and a relative path may equal a word of their text.
    library = Library(args.library and Path(args.library).resolve())
    library.entries()  # checks the library before a base is loaded
    with working(f"loading {args.base}"):
        with pause_collection():
            from veneer.serve.run import listening
            from veneer.serve.run import run as run_server

            listening(args.host, args.port).close()  # checks the port before a base is loaded
            from veneer.serve.start import keys_of
        settings = _read_settings(args)
        keys = keys_of(settings, os.environ)
        server = PLACES[args.on](args, settings, keys, library)
    _configure_logging()
    console = make_console(json=False)
    for line in server.screen_lines:
        console.print(shown(line), soft_wrap=True)
    try:
        run_server(server.server, [server.socket])
    finally:
        server.close()
    console.print("stopped")
    return 0


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


def _start_here(
    args: argparse.Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
) -> ListeningServer:
    """Starts a server in this process. Raises ConfigError for flags that need a cluster."""
    ray_flags = [
        f"--{flag.replace('_', '-')}" for flag in ON_RAY if getattr(args, flag) is not None
    ]
    if ray_flags:
        raise ConfigError(
            f"{', '.join(ray_flags)}: only for replicas on Ray",
            [],
            "Give --on ray too, or leave them out.",
        )
    with pause_collection():
        from veneer import api
        from veneer.serve.start import open_server
    base = api.load(args.base, dtype=args.dtype, device=args.device, quantize=args.quantize)
    server = open_server(base, library, settings, keys)
    service = server.service
    adapters = [card["id"] for card in service.names.cards()[1:]]
    cache_line = f"key/value cache {size(service.cache_bytes)} · {service.cache_tokens:,} tokens"
    screen_lines = _describe(
        service.names.base_name, adapters, cache_line, server.url, keys, args.host
    )
    return ListeningServer(server.server, server.socket, screen_lines)


def _start_on_ray(
    args: argparse.Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
) -> ListeningServer:
    from veneer.files.home import name_of
    from veneer.serve.replicas.front import open_front
    from veneer.serve.replicas.ray_replicas import RayReplicas, ReplicaSize
    from veneer.serve.replicas.replica import ReplicaConfig
    from veneer.serve.start import url_of

    replicas = args.replicas or 1
    max_replicas = args.max_replicas or replicas
    if max_replicas < replicas:
        raise ConfigError(
            f"--max-replicas {max_replicas} is less than --replicas {replicas}",
            [],
            "Give --max-replicas as many or more.",
        )
    base = str(Path(args.base).resolve()) if Path(args.base).exists() else args.base
    settings = replace(settings, name=settings.name or name_of(args.base))
    served = ReplicaConfig(
        base, str(library.folder), args.dtype, args.device, args.quantize, settings
    )
    replica_set = RayReplicas(args.address, served, ReplicaSize(replicas, max_replicas, args.cpus))
    try:
        server, listener = open_front(replica_set, settings, keys)
    except BaseException:
        replica_set.close()
        raise
    count = f"{replicas} replica{'' if replicas == 1 else 's'} on Ray"
    replica_line = count + (
        f", up to {max_replicas} while requests wait" if max_replicas > replicas else ""
    )
    adapters = [entry.name for entry in library.entries()]
    screen_lines = _describe(
        str(settings.name), adapters, replica_line, url_of(listener), keys, args.host
    )
    return ListeningServer(server, listener, screen_lines, replica_set.close)


PLACES: dict[
    str, Callable[[argparse.Namespace, ServeSettings, ApiKeys, Library], ListeningServer]
] = {"here": _start_here, "ray": _start_on_ray}
ON_RAY = ("address", "replicas", "max_replicas", "cpus")


def _read_settings(args: argparse.Namespace) -> ServeSettings:
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
    )


def _describe(
    base: str, adapters: list[str], capacity_line: str, url: str, keys: ApiKeys, host: str
) -> list[str]:
    """Lists the lines of the start screen: models, address, access."""
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
        f"  {url}/ in a browser: base and adapters side by side",
        "  Ctrl-C stops the server",
    ]


def _make_key(args: argparse.Namespace) -> int:
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
