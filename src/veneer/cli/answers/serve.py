"""Serve a base and every adapter of a library over HTTP, with OpenAI's API.

For instance:

  veneer serve --base smollm2-135m
  curl http://127.0.0.1:8000/v1/chat/completions \\
    -H 'content-type: application/json' -d '{"model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Hello"}]}'

Adapters added to the library are served at once, under their names. docs/serve.md describes
clients, fields and keys.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.bounds import COUNT
from veneer.cli.answers.server import (
    ListeningServer,
    Start,
    add_server_flags,
    describe,
    make_key,
    run_server,
    start_here,
)
from veneer.cli.flags import add_value
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.library.library import Library
    from veneer.serve.http.keys import ApiKeys
    from veneer.serve.start import ServeSettings


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer serve --base B [--library DIR] [--port N] [--keys FILE] ..."
    add_value(parser, "--base", "B", "hub id, folder, .gguf file or named default")
    access = add_server_flags(parser)
    add_value(
        access,
        "--new-key",
        None,
        "make a key, print it, store its hash in FILE of --keys, and exit",
        choices=["use", "train", "admin"],
    )
    where = parser.add_argument_group("where to run")
    add_value(
        where,
        "--on",
        None,
        "in this process or on Ray; default: here",
        default="here",
        choices=PLACES,
    )
    add_value(
        where, "--address", "A", "address of the Ray cluster, or auto; default: start one here"
    )
    add_value(where, "--replicas", "N", "minimum number of replicas; default: 1", type=COUNT)
    add_value(
        where,
        "--max-replicas",
        "N",
        "maximum number of replicas; more start while requests wait; default: --replicas",
        type=COUNT,
    )
    add_value(where, "--cpus", "N", "CPUs per replica; default: an equal share", type=COUNT)


def run(args: Namespace) -> int:
    if args.new_key:
        return make_key(args)
    if not args.base:
        raise ConfigError(
            "no base is named",
            [],
            "Give --base (a hub id, a folder, a .gguf file or smollm2-135m).",
        )
    return run_server(args, PLACES[args.on])


def _start_here(
    args: Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
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
    return start_here(args, settings, keys, library)


def _start_on_ray(
    args: Namespace, settings: ServeSettings, keys: ApiKeys, library: Library
) -> ListeningServer:
    from veneer.files.home import name_of
    from veneer.serve.replicas.front import open_front
    from veneer.serve.replicas.ray_replicas import RayReplicas, ReplicaSize
    from veneer.serve.replicas.replica import ReplicaConfig
    from veneer.serve.start import url_of

    if settings.train is not None:
        raise ConfigError("--train: only for a server in this process", [], "Leave out --on ray.")
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
    screen_lines = describe(
        str(settings.name), adapters, replica_line, url_of(listener), keys, args.host
    )
    return ListeningServer(server, listener, screen_lines, replica_set.close)


PLACES: dict[str, Start] = {"here": _start_here, "ray": _start_on_ray}
ON_RAY = ("address", "replicas", "max_replicas", "cpus")
