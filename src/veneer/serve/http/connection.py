"""The server and its connections: everything here that relies on uvicorn's and h11's own classes.

Neither promises to keep them. This file was tried with uvicorn 0.54 and h11 0.16; after an upgrade
run tests/serve/http/test_connections.py, test_streams.py and test_process.py.

A chunk of a stream that goes through a task's turn, the application's layers and h11 is changed by
none of them, and that is most of what a token costs the event loop. `ChunkWriter` writes to the
transport what h11 would. Where there is none (HTTP/1.0, another server), chunks are sent as usual.

h11 is used whatever else is installed, because it bounds the size of a header. Clients that send
nothing, send slowly, or do not read are disconnected.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from veneer.serve import limits
from veneer.serve.http.open_files import raise_open_files, room_for_connections
from veneer.serve.limits import KEEP_ALIVE_SECONDS, MOST_HEADER_BYTES

CHUNKS = "veneer.chunks"
"""The writer of chunks among the extensions of a request's scope."""
BODY_CLOCK = "veneer.body_clock"
"""The clock of a request's body, also among the extensions."""
LATE_SECONDS = 5.0
TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection:"
    b" close\r\n\r\n"
)
BACKLOG = 2048
"""Connections that the system holds until they are accepted."""
ENDING_SECONDS = 0.5
"""Time for answers to end with an error after the drain. Requests that are still open then are
cancelled, such as those whose body has not arrived."""


class AwaitedInput(Enum):
    """The input that the server waits for: the next request, the rest of its header or body, or
    that the client reads the last answer."""

    REQUEST = auto()
    HEADER = auto()
    BODY = auto()
    END = auto()


class ChunkWriter:
    """Writes chunks of one answer, which begins and ends by `send`."""

    def __init__(self, connection: H11Protocol) -> None:
        self._cycle, self._flow = connection.cycle, connection.flow
        self._transport = connection.transport

    @property
    def open(self) -> bool:
        """Whether the answer has begun and the client reads it and keeps up."""
        cycle = self._cycle
        return cycle.response_started and not (
            cycle.response_complete or cycle.disconnected or self._flow.write_paused
        )

    def write(self, body: bytes) -> None:
        """Writes one chunk. Call it while the writer is open, on the event loop."""
        assert body, "an empty chunk ends an answer"
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class Connections(ServerState):
    """All open connections. idle: those without a request, the longest idle first."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.idle: dict[Connection, None] = {}


class Connection(H11Protocol):
    """A connection that is closed if the client is too slow, or if there are too many.

    uvicorn's own clock runs only between two requests, and the first byte of the next one stops it.
    """

    server_state: Connections
    _clock: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _awaited: AwaitedInput | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.server_state.most:
            longest_idle = next(iter(self.server_state.idle))
            if longest_idle is self:  # all others are being answered
                transport.write(TOO_MANY)
            longest_idle.drop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.server_state.idle.pop(self, None)
        for clock in (self._clock, self._stalled):
            if clock is not None:
                clock.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(limits.STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def drop(self) -> None:
        """Closes the connection, at once if the client has not read everything."""
        self.server_state.idle.pop(self, None)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and self.scope["http_version"] == "1.1":  # 1.0 has no chunks
            extensions = self.scope.setdefault("extensions", {})
            if CHUNKS not in extensions:
                extensions[CHUNKS] = {"of": ChunkWriter(self)}
                extensions[BODY_CLOCK] = {"restart": self._restart_body_clock}

    def _restart_body_clock(self) -> None:
        """Gives the client the whole time for a body again."""
        if self._awaited is AwaitedInput.BODY and self._clock is not None:
            self._clock.cancel()
            self._clock = self.loop.call_later(_most_seconds(AwaitedInput.BODY), self.drop)

    def _watch(self) -> None:
        """Starts the clock for what the server waits for now."""
        awaited = self._find_awaited()
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        self.server_state.idle.pop(self, None)
        if awaited in (AwaitedInput.REQUEST, AwaitedInput.HEADER):
            self.server_state.idle[self] = None
        if awaited is not None:
            self._clock = self.loop.call_later(_most_seconds(awaited), self.drop)

    def _find_awaited(self) -> AwaitedInput | None:
        """Returns what the client has to do; None while it waits for an answer."""
        state = self.conn.their_state
        if self.transport.is_closing():
            return AwaitedInput.END
        if state is h11.SEND_BODY:
            return AwaitedInput.BODY
        if state is not h11.IDLE:
            return None
        in_header = self._awaited is AwaitedInput.HEADER or self.conn.trailing_data[0]
        return AwaitedInput.HEADER if self.cycle is None or in_header else AwaitedInput.REQUEST


def allow_more_time(scope: Scope) -> None:
    """Restarts the clock of a request's body: an upload that goes on is not too late."""
    restart = (scope.get("extensions") or {}).get(BODY_CLOCK, {}).get("restart")
    if restart is not None:
        restart()


def _most_seconds(awaited: AwaitedInput) -> float:
    if awaited is AwaitedInput.BODY:  # the application has answered 408 a little earlier
        return limits.BODY_SECONDS + LATE_SECONDS
    if awaited is AwaitedInput.REQUEST:
        return limits.KEEP_ALIVE_SECONDS
    return limits.HEADER_SECONDS


def chunk_writer(scope: Scope) -> ChunkWriter | None:
    """Returns the writer of chunks for a request's answer; None if there is none."""
    writer: ChunkWriter | None = (scope.get("extensions") or {}).get(CHUNKS, {}).get("of")
    return writer


class Server(uvicorn.Server):
    """Serves until the first signal, then drains. The socket stays open meanwhile, so that /readyz
    can say 503.

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
            signal.signal(sig, signal.SIG_DFL)  # a third signal ends the process at once
        self._closing()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:  # uvicorn accepts as many at once as its backlog has
            listener.listen(BACKLOG)

    async def main_loop(self) -> None:
        await super().main_loop()
        self._closing()
        await self._wait_for_requests(self._drain_seconds, hurry=lambda: self._hurried)
        if self.server_state.tasks:
            self._ending()
            await self._wait_for_requests(ENDING_SECONDS)
            for task in list(self.server_state.tasks):
                task.cancel()
            await self._wait_for_requests(ENDING_SECONDS)

    async def _wait_for_requests(
        self, seconds: float, hurry: Callable[[], bool] = lambda: False
    ) -> None:
        """Waits until no request is open, or the time is over."""
        end = time.monotonic() + seconds
        while self.server_state.tasks and time.monotonic() < end and not hurry():
            await self.on_tick(0)  # answers have the date in their headers
            await asyncio.sleep(0.05)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs. Unlike uvicorn, it does not raise them again at
        the end: the drain is what they ask for."""
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
