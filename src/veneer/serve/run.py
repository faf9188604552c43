"""The server as a process: its socket, its signals, and how it ends.

SIGTERM or Ctrl-C: no new requests, those that are open are answered, for a while; a second one ends them.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from veneer.errors import ConfigError
from veneer.serve.connection import Connection
from veneer.serve.keys import Keys

MOST_HEADER_BYTES = 64 * 2**10
KEEP_ALIVE_SECONDS = 30


def check_reach(host: str, keys: Keys) -> None:
    """ConfigError: others would reach it, and nobody would be asked for a key."""
    if not is_loopback(host) and not keys:
        raise ConfigError(
            f"{host} is reached from other machines, and no key is asked for",
            next_step="Make one: veneer serve --new-key use --keys FILE, and give --keys FILE; or --host 127.0.0.1.",
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
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # For the connections too: asyncio sets it only where a socket's protocol is named. Without it an answer on a
        # connection that is used again waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as fault:
        number = fault.errno or 0  # of a look-up: below 0
        said = os.strerror(number) if number > 0 else str(fault)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {said}", next_step="Give another --port or --host."
        ) from None


class Server(uvicorn.Server):
    """closing is called at the first signal."""

    def __init__(self, app: ASGIApp, *, drain_seconds: float, closing: Callable[[], None]) -> None:
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
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(drain_seconds) + 1,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            )
        )
        self._closing = closing

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._closing()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Taken for as long as it runs, and not raised once more when it has ended: draining is what they ask for."""
        try:
            before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def run(server: Server, sockets: Sequence[socket.socket]) -> None:
    """What is loaded by now stays: a search of it all for garbage takes 0.2 s, in which nobody is answered."""
    gc.freeze()
    try:
        asyncio.run(server.serve(list(sockets)))
    finally:
        gc.unfreeze()
