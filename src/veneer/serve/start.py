"""A server from its settings: a base, its adapters, and how much of the machine they may take."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from veneer.adapters.preamble import Preamble
from veneer.bounds import BYTES, SECONDS, check_numbers
from veneer.decoding.engine import Engine
from veneer.decoding.schedule.limits import Limits
from veneer.files.home import name_of
from veneer.library.library import Library
from veneer.library.residents.residents import Residents
from veneer.models.frozen_base import FrozenBase
from veneer.plan.machine import memory_bytes
from veneer.serve.engine.names import ModelNames
from veneer.serve.engine.service import ServeLimits, Service
from veneer.serve.http.app import PATHS, application
from veneer.serve.http.guard import Guard, check_origins, for_browsers
from veneer.serve.http.keys import ApiKeys, read_keys
from veneer.serve.run import Server, check_reach, listening
from veneer.serve.runs import Runs

MOST_CACHE_BYTES = 8 * 2**30
CACHE_SHARE = 4
"""Keys and values get one of so many parts of the memory, where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """name            of the base as a model; None: as it was loaded
    cache_bytes     of keys and values; None: a part of the machine's memory
    adapters_bytes  of all adapters in memory
    keys            file of hashes; hosts, origins: names and sites that are answered beside this
                    machine's own
    pinned          adapters that are loaded at the start and stay
    system, variables  of conversations, in place of what adapters were trained with; "" and None:
                       none
    runs            a folder that has the folders of runs, which the page shows
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    limits: Limits = field(default_factory=Limits)
    cache_bytes: int | None = None
    adapters_bytes: int = 2**30
    seconds: float = 600.0
    drain_seconds: float = 30.0
    keys: Path | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    pinned: Sequence[str] = ()
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    runs: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(
            cache_bytes=(BYTES, self.cache_bytes),
            adapters_bytes=(BYTES, self.adapters_bytes),
            seconds=(SECONDS, self.seconds),
            drain_seconds=(SECONDS, self.drain_seconds),
        )
        check_origins(self.origins)


@dataclass(frozen=True)
class OpenServer:
    """Ready to run. socket: listens already."""

    server: Server
    socket: socket.socket
    service: Service
    residents: Residents
    keys: ApiKeys

    @property
    def url(self) -> str:
        return url_of(self.socket)


def keys_of(settings: ServeSettings, environment: Mapping[str, str]) -> ApiKeys:
    """Before anything is loaded. VeneerError: no keys where they are needed, or such that are
    none."""
    keys = read_keys(settings.keys, environment)
    check_reach(settings.host, keys)
    return keys


def service_of(base: FrozenBase, library: Library, settings: ServeSettings) -> Service:
    """What answers. VeneerError: the base cannot be served, an adapter that is to stay does not
    fit."""
    runs = Runs(settings.runs)
    name = settings.name or name_of(base.source)
    names_of_base = {name, base.source, base.name_or_path}
    residents = Residents(
        base, library, budget_bytes=settings.adapters_bytes, base_names=names_of_base
    )
    engine = Engine(
        base, budget_bytes=cache_bytes(settings), adapters=residents, limits=settings.limits
    )
    positions = engine.scheduler.positions
    names = ModelNames(name, library, residents, created=int(time.time()), positions=positions)
    limits = ServeLimits(seconds=settings.seconds, drain_seconds=settings.drain_seconds)
    asked = partial(Preamble.asked, system=settings.system, variables=settings.variables)
    service = Service(
        base, engine, names, residents, limits=limits, routes=PATHS, asked_as=asked, runs=runs
    )
    residents.on_change(service.loop.wake)
    for each in settings.pinned:
        residents.pin(each)
    return service


def open_server(
    base: FrozenBase, library: Library, settings: ServeSettings, keys: ApiKeys
) -> OpenServer:
    """VeneerError: as service_of, and the port is taken."""
    service = service_of(base, library, settings)
    server, listener = guarded(
        application(service),
        settings,
        keys,
        counted=service.metrics.count_http,
        closing=service.loop.refuse_new,
        ending=service.loop.abort,
    )
    return OpenServer(server, listener, service, service.residents, keys)


def guarded(
    app: ASGIApp,
    settings: ServeSettings,
    keys: ApiKeys,
    *,
    counted: Callable[[str, int, float], None],
    closing: Callable[[], None],
    ending: Callable[[], None] = lambda: None,
) -> tuple[Server, socket.socket]:
    """The application as a server, and the socket that it listens on. ConfigError: the port is
    taken."""
    hosts = [settings.host, *settings.hosts]
    guard = Guard(app, keys=keys, hosts=hosts, origins=settings.origins, counted=counted)
    listener = listening(settings.host, settings.port)
    served = for_browsers(guard, settings.origins)
    return Server(
        served, drain_seconds=settings.drain_seconds, closing=closing, ending=ending
    ), listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def cache_bytes(settings: ServeSettings) -> int:
    if settings.cache_bytes is not None:
        return settings.cache_bytes
    return min((memory_bytes() or 4 * 2**30) // CACHE_SHARE, MOST_CACHE_BYTES)
