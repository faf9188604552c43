"""A connection to a client: uvicorn's over h11, with a short way for the pieces of an answer.

A piece that is sent passes a task's turn, the application's layers and h11, and none of them
changes it: most of what a token costs the event loop. `Chunks` writes what h11 would. Who has none
(HTTP/1.0, another server) is sent to.

h11 whatever else is installed: it bounds what the header of a request may take. Clients that send
nothing, slowly, or that do not read, are let go.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from enum import Enum, auto

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from veneer.serve import limits
from veneer.serve.limits import MOST_CONNECTIONS

CHUNKS = "veneer.chunks"
"""Among the extensions of a request's scope."""
LATE_SECONDS = 5.0
RESERVED_FILES = 96
"""What the process opens beside its connections: files of a base and of adapters, pipes to the
template's process."""
MOST_AT_ONCE = 256
TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection:"
    b" close\r\n\r\n"
)


class AwaitedInput(Enum):
    """What a client owes: the next request, the rest of its header or its body, or to read the last
    answer."""

    REQUEST = auto()
    HEADER = auto()
    BODY = auto()
    END = auto()


class ChunkWriter:
    """Of one answer, which has begun by `send` and ends by it."""

    def __init__(self, connection: H11Protocol) -> None:
        self._cycle, self._flow, self._transport = (
            connection.cycle,
            connection.flow,
            connection.transport,
        )

    @property
    def open(self) -> bool:
        """Whether the answer has begun, somebody reads it, and keeps up."""
        cycle = self._cycle
        return cycle.response_started and not (
            cycle.response_complete or cycle.disconnected or self._flow.write_paused
        )

    def write(self, body: bytes) -> None:
        """A chunk of it; while it is open, in the event loop."""
        assert body, "an empty one ends an answer"
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class Connections(ServerState):
    """All open connections, and those among them that have no request under way, the longest idle
    first."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.idle: dict[Connection, None] = {}


class Connection(H11Protocol):
    """uvicorn's, with a limit of time for whatever the client owes, and one for the number of
    connections.

    uvicorn's own clock runs between two requests alone, and the first byte of the next one stops
    it.
    """

    server_state: Connections
    _clock: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _owed: AwaitedInput | None = None

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
        """Closes it; at once, if there is something that the client does not read."""
        self.server_state.idle.pop(self, None)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _watch(self) -> None:
        """Starts the clock for what the client owes now: a request, the rest of its header or of
        its body, or to read the last answer."""
        owed = self._owed_now()
        if owed is self._owed:
            return
        self._owed = owed
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        self.server_state.idle.pop(self, None)
        if owed in (AwaitedInput.REQUEST, AwaitedInput.HEADER):
            self.server_state.idle[self] = None
        if owed is not None:
            self._clock = self.loop.call_later(_seconds(owed), self.drop)

    def _owed_now(self) -> AwaitedInput | None:
        """None: the client waits for an answer."""
        state = self.conn.their_state
        if self.transport.is_closing():
            return AwaitedInput.END
        if state is h11.SEND_BODY:
            return AwaitedInput.BODY
        if state is not h11.IDLE:
            return None
        begun = (
            self.cycle is None or self._owed is AwaitedInput.HEADER or self.conn.trailing_data[0]
        )
        return AwaitedInput.HEADER if begun else AwaitedInput.REQUEST

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and self.scope["http_version"] == "1.1":  # others know no chunks
            extensions = self.scope.setdefault("extensions", {})
            if CHUNKS not in extensions:
                extensions[CHUNKS] = {"of": ChunkWriter(self)}


def _seconds(owed: AwaitedInput) -> float:
    """How long the client has for it."""
    if (
        owed is AwaitedInput.BODY
    ):  # the application has told the client that it is late, a little earlier
        return limits.BODY_SECONDS + LATE_SECONDS
    return limits.KEEP_ALIVE_SECONDS if owed is AwaitedInput.REQUEST else limits.HEADER_SECONDS


def raise_open_files() -> None:
    """Raises the number of files that this process may open to what MOST_CONNECTIONS need, or to
    the hard limit.

    A shell often allows 1,024, although the system allows many more.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS + RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(ValueError, OSError):  # macOS has a further limit, which it does not tell here
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def room_for_connections() -> tuple[int, int]:
    """How many connections may be open, and how many are accepted at once.

    Where accepting one fails for want of a file, asyncio tries as often as it may accept at once,
    with a traceback each, and nobody is answered. Some turns of the event loop pass until what was
    accepted is counted.
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows has none
        return MOST_CONNECTIONS, MOST_AT_ONCE
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS, MOST_AT_ONCE
    free = max(limit - RESERVED_FILES, 16)
    return min(free // 2, MOST_CONNECTIONS), min(free // 8, MOST_AT_ONCE)


def chunk_writer(scope: Scope) -> ChunkWriter | None:
    """Returns the writer of chunks for a request's answer; None if there is none."""
    writer: ChunkWriter | None = (scope.get("extensions") or {}).get(CHUNKS, {}).get("of")
    return writer
