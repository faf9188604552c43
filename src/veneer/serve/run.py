"""The server as a process: its socket, its signals, and how it ends.

SIGTERM or Ctrl-C: new requests are refused, open ones are answered for a while; then, or at a
second signal, they end with an error.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from veneer.errors import ConfigError
from veneer.serve.http.connection import (
    Connection,
    Connections,
    raise_open_files,
    room_for_connections,
)
from veneer.serve.http.keys import ApiKeys
from veneer.serve.limits import KEEP_ALIVE_SECONDS, MOST_HEADER_BYTES

BACKLOG = 2048
"""Connections that the system holds until they are accepted."""
ENDING_SECONDS = 0.5
"""For answers to end with an error once the drain's time is over. Requests that are still open then
are cancelled, such as those whose body has not arrived."""


def check_reach(host: str, keys: ApiKeys) -> None:
    """ConfigError: others would reach it, and nobody would be asked for a key."""
    if not is_loopback(host) and not keys:
        raise ConfigError(
            f"{host} is reached from other machines, and no API key is required",
            next_step=(
                "Make one: veneer serve --new-key use --keys FILE, and give --keys FILE; or --host"
                " 127.0.0.1."
            ),
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """ConfigError: the port is taken, or not for us."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # For the connections too: asyncio sets it only where a socket's protocol is named. Without
        # it an answer on a connection that is used again waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as fault:
        number = fault.errno or 0  # of a look-up: below 0
        said = os.strerror(number) if number > 0 else str(fault)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {said}", next_step="Give another --port or --host."
        ) from None


class Server(uvicorn.Server):
    """Serves until the first signal, and drains then: the socket stays open, so that /readyz can
    say 503.

    closing   called at the first signal; new requests are refused from then on
    ending    called when the drain's time is over, or at a second signal; open answers end with an
              error
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        drain_seconds: float,
        closing: Callable[[], None],
        ending: Callable[[], None],
    ) -> None:
        raise_open_files()
        most, at_once = room_for_connections()
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
                timeout_graceful_shutdown=1,  # all answers have ended by then, or are cancelled
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                backlog=at_once,
            )
        )
        self.server_state = Connections(most)
        self._drain_seconds, self._closing, self._ending = drain_seconds, closing, ending
        self._hurried = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self._hurried = True
            signal.signal(sig, signal.SIG_DFL)  # a third one ends the process at once
        self._closing()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:  # uvicorn's backlog is how many are accepted at once too
            listener.listen(BACKLOG)

    async def main_loop(self) -> None:
        await super().main_loop()
        self._closing()
        await self._requests_ended(self._drain_seconds, hurry=lambda: self._hurried)
        if self.server_state.tasks:
            self._ending()
            await self._requests_ended(ENDING_SECONDS)
            for task in list(self.server_state.tasks):
                task.cancel()
            await self._requests_ended(ENDING_SECONDS)

    async def _requests_ended(
        self, seconds: float, hurry: Callable[[], bool] = lambda: False
    ) -> None:
        """Waits until no request is open, at most so long."""
        end = time.monotonic() + seconds
        while self.server_state.tasks and time.monotonic() < end and not hurry():
            await self.on_tick(0)  # answers have the date in their headers
            await asyncio.sleep(0.05)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Taken for as long as it runs, and not raised once more when it has ended: draining is
        what they ask for."""
        try:
            before = {
                sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def run(server: Server, sockets: Sequence[socket.socket]) -> None:
    """What is loaded by now stays: a search of it all for garbage takes 0.2 s, in which nobody is
    answered."""
    gc.freeze()
    try:
        asyncio.run(server.serve(list(sockets)))
    finally:
        gc.unfreeze()
