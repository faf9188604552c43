"""A connection to a client: uvicorn's over h11, with a short way for the pieces of an answer.

A piece that is sent passes a task's turn, the application's layers and h11, and none of them changes it: most of what a
token costs the event loop. `Chunks` writes what h11 would. Who has none (HTTP/1.0, another server) is sent to.

h11 whatever else is installed: it bounds what the header of a request may take.
"""

from __future__ import annotations

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

CHUNKS = "veneer.chunks"
"""Among the extensions of a request's scope."""


class Chunks:
    """Of one answer, which has begun by `send` and ends by it."""

    def __init__(self, connection: H11Protocol) -> None:
        self._cycle, self._flow, self._transport = connection.cycle, connection.flow, connection.transport

    @property
    def open(self) -> bool:
        """Whether the answer has begun, somebody reads it, and keeps up."""
        cycle = self._cycle
        return cycle.response_started and not (cycle.response_complete or cycle.disconnected or self._flow.write_paused)

    def write(self, body: bytes) -> None:
        """A chunk of it; while it is open, in the event loop."""
        assert body, "an empty one ends an answer"
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class Connection(H11Protocol):
    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and self.scope["http_version"] == "1.1":  # others know no chunks
            extensions = self.scope.setdefault("extensions", {})
            if CHUNKS not in extensions:
                extensions[CHUNKS] = {"of": Chunks(self)}


def chunks_of(scope: Scope) -> Chunks | None:
    """How pieces of the answer to a request are written, where they can be."""
    found: Chunks | None = (scope.get("extensions") or {}).get(CHUNKS, {}).get("of")
    return found
