"""The server as a process: its socket, and how it starts and ends.

SIGTERM or Ctrl-C: new requests are refused, open ones are answered for a while. Then, or at a
second signal, they end with an error.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import socket
from collections.abc import Sequence

from veneer.errors import ConfigError
from veneer.serve.http.connection import BACKLOG, Server
from veneer.serve.http.keys import ApiKeys


def check_reach(host: str, keys: ApiKeys) -> None:
    """Raises ConfigError if other machines reach the server without an API key."""
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
    """Opens the listening socket. ConfigError: the port is in use or not allowed."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # Connections inherit it: asyncio sets it only where a socket's protocol is named. Without
        # it an answer on a reused connection waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as fault:
        number = fault.errno or 0  # below 0 if the host was not found
        reason = os.strerror(number) if number > 0 else str(fault)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}", next_step="Give another --port or --host."
        ) from None


def run(server: Server, sockets: Sequence[socket.socket]) -> None:
    """Serves until a signal. Garbage collections skip what is loaded by now: each would take 0.2 s
    and delay all answers."""
    gc.freeze()
    try:
        asyncio.run(server.serve(list(sockets)))
    finally:
        gc.unfreeze()
