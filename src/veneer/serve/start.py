"""Makes a server from its settings: a base, its adapters, and how much memory they may use."""

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
from veneer.decoding.schedule.lookup import LookupMode, check_lookup
from veneer.errors import UnknownNameError
from veneer.files.home import name_of
from veneer.files.system_errors import explained
from veneer.library.library import Library
from veneer.library.residents.residents import Residents
from veneer.models.frozen_base import FrozenBase
from veneer.plan.machine import memory_bytes
from veneer.serve.engine.fine_tuning import FineTuning, TrainSettings
from veneer.serve.engine.names import ModelNames
from veneer.serve.engine.service import ServeLimits, Service
from veneer.serve.http.app import TeachTab, application
from veneer.serve.http.connection import Server
from veneer.serve.http.fine_tuning import fine_tuning_routes
from veneer.serve.http.guard import Guard, check_origins, for_browsers
from veneer.serve.http.keys import ApiKeys, read_keys
from veneer.serve.http.paths import PATHS
from veneer.serve.refusals import Refusal
from veneer.serve.run import check_reach, listening
from veneer.serve.runs import Runs

MOST_CACHE_BYTES = 8 * 2**30
CACHE_SHARE = 4
"""By default the KV cache gets this fraction (1/4) of the memory."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of `veneer serve`.

    name               model name of the base; None: as it was loaded
    cache_bytes        size of the KV cache; None: a part of the machine's memory
    adapters_bytes     memory for all adapters together
    keys               file of the hashes of API keys
    hosts, origins     further host names and sites whose requests are accepted
    pinned             adapters that are loaded at the start and stay in memory
    system, variables  default system message and template variables, in place of those that
                       adapters were trained with; "" and None: the adapters' own
    runs               folder of the runs that the page shows
    studio             whether the page has the tab Teach; needs `train`
    bases              folders of models that the tab Teach offers as bases
    lookup             as in Base.generate
    train              None: the server does not train
    auto               whether requests for `model: auto` are answered (engine/chooser.py)
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
    studio: bool = False
    bases: Sequence[Path] = ()
    lookup: LookupMode = "auto"
    train: TrainSettings | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        check_numbers(
            cache_bytes=(BYTES, self.cache_bytes),
            adapters_bytes=(BYTES, self.adapters_bytes),
            seconds=(SECONDS, self.seconds),
            drain_seconds=(SECONDS, self.drain_seconds),
        )
        check_origins(self.origins)
        check_lookup(self.lookup)


@dataclass(frozen=True)
class OpenServer:
    """A server that is ready to run. Its socket listens already."""

    server: Server
    socket: socket.socket
    service: Service
    residents: Residents
    keys: ApiKeys

    @property
    def url(self) -> str:
        return url_of(self.socket)


def keys_of(settings: ServeSettings, environment: Mapping[str, str]) -> ApiKeys:
    """Reads the API keys, before anything is loaded. VeneerError: keys are required, or wrong."""
    keys = read_keys(settings.keys, environment)
    check_reach(settings.host, keys)
    return keys


def service_of(base: FrozenBase, library: Library, settings: ServeSettings) -> Service:
    """Makes the service. VeneerError: the base cannot be served, a pinned adapter does not fit."""
    name = settings.name or name_of(base.source)
    residents = Residents(base, library, budget_bytes=settings.adapters_bytes)
    engine = Engine(
        base,
        budget_bytes=cache_bytes(settings),
        adapters=residents.tiers,
        limits=settings.limits,
        lookup=settings.lookup,
    )
    positions = engine.scheduler.positions
    names = ModelNames(name, library, residents, created=int(time.time()), positions=positions)
    limits = ServeLimits(seconds=settings.seconds, drain_seconds=settings.drain_seconds)
    asked = partial(Preamble.overridden, system=settings.system, variables=settings.variables)
    fine_tuning = None
    if settings.train is not None:
        fine_tuning = FineTuning(settings.train, library, names, base=base, length=positions)
    service = Service(
        base,
        engine,
        names,
        residents,
        limits=limits,
        routes=PATHS,
        asked_as=asked,
        runs=Runs(_runs_folder(settings, fine_tuning)),
        fine_tuning=fine_tuning,
        auto=settings.auto,
    )
    residents.tiers.changed = service.loop.wake
    for adapter in settings.pinned:
        residents.pin(_pinned_reference(names, adapter))
    return service


def _pinned_reference(names: ModelNames, adapter: str) -> str:
    """Returns the library's reference of an adapter to pin. UnknownNameError: there is none."""
    try:
        return names.reference(adapter)
    except Refusal as refusal:
        step = "Name an adapter of the library; veneer adapters ls lists them."
        raise UnknownNameError(f"--pin {adapter[:80]}", [refusal.message], step) from None


def _runs_folder(settings: ServeSettings, fine_tuning: FineTuning | None) -> Path | None:
    """Returns the folder of runs that the page shows: of --runs, else of the jobs."""
    if settings.runs is not None or fine_tuning is None:
        return settings.runs
    folder = fine_tuning.store.runs_folder
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_server(
    base: FrozenBase, library: Library, settings: ServeSettings, keys: ApiKeys
) -> OpenServer:
    """Makes the server and opens its port. VeneerError: as service_of, or the port is in use."""
    service = service_of(base, library, settings)
    server, listener = guarded(
        application(
            service,
            routes=fine_tuning_routes(service),
            teach_tab=_make_teach_tab(service, base, library, settings.bases)
            if settings.studio
            else None,
        ),
        settings,
        keys,
        counted=service.metrics.count_http,
        closing=service.loop.refuse_new,
        ending=service.loop.abort,
    )
    return OpenServer(server, listener, service, service.residents, keys)


def _make_teach_tab(
    service: Service, base: FrozenBase, library: Library, folders: Sequence[Path]
) -> TeachTab:
    from veneer.serve.studio.bases import StudioBases
    from veneer.serve.studio.routes import studio_routes
    from veneer.serve.studio.studio import Studio

    assert service.fine_tuning is not None, "the studio trains"
    fine_tuning = service.fine_tuning
    bases = StudioBases(base, service.names.base_name, fine_tuning.run, folders)
    studio = Studio(fine_tuning, bases, library)
    return TeachTab(studio_routes(studio, lambda: service.loop.closing), studio.close)


def guarded(
    app: ASGIApp,
    settings: ServeSettings,
    keys: ApiKeys,
    *,
    counted: Callable[[str, int], None],
    closing: Callable[[], None],
    ending: Callable[[], None] = lambda: None,
) -> tuple[Server, socket.socket]:
    """Returns a server for the application, and its listening socket. ConfigError: the port is in
    use."""
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
