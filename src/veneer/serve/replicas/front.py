"""The front end of several replicas: it reads a request, chooses a replica by its model, and
forwards the replica's response.

If a replica is lost before it has sent anything, another one answers. If part of the response is
sent already, the response ends with an error, and the client must ask again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from veneer.errors import LostProcessError, QueueFullError
from veneer.serve.engine.metrics import MEDIA_TYPE, answers_lines, joined, merged
from veneer.serve.engine.service import ServeLimits
from veneer.serve.http.connection import Server
from veneer.serve.http.exchange import ClientGone, unless_gone
from veneer.serve.http.guard import error_response
from veneer.serve.http.json_body import read_bytes
from veneer.serve.http.keys import ApiKeys
from veneer.serve.http.paths import ADMIN_BODIES, PATHS
from veneer.serve.limits import LARGE_BODY
from veneer.serve.refusals import Refusal, refusal_of, shutting_down
from veneer.serve.replicas.replica import AdminChange, ForwardedRequest, model_of
from veneer.serve.start import ServeSettings, guarded

log = logging.getLogger("veneer.serve")
PATIENCE_SECONDS = 30.0
"""Time to wait for a free replica, in addition to the request's own time."""
ATTEMPTS = 3
"""Replicas that are tried before the request fails."""


class Replicas(Protocol):
    """Sends requests to replicas. LostProcessError: the replica is gone. QueueFullError: too many
    requests wait."""

    def answer(
        self, request: ForwardedRequest, model: str, changes: Sequence[AdminChange]
    ) -> AsyncIterator[Message]:
        """Answers by a replica that has the model in memory, or by the least busy one."""
        ...

    async def adopt(self, changes: Sequence[AdminChange]) -> None:
        """Makes all replicas adopt the changes now."""
        ...

    async def metrics(self) -> dict[str, str]:
        """Returns the metrics of each replica, by its name."""
        ...

    async def shown(self) -> dict[str, list[dict[str, Any]]]:
        """Returns what /v1/adapters lists at each replica, by its name."""
        ...


class Frontend:
    """An ASGI application, behind Guard. seconds: a request's time at a replica."""

    def __init__(self, replicas: Replicas, *, body_bytes: int, seconds: float) -> None:
        self._replicas, self._body_bytes, self._seconds = (
            replicas,
            body_bytes,
            seconds + PATIENCE_SECONDS,
        )
        self._changes: list[AdminChange] = []
        self._answers: Counter[tuple[str, int]] = Counter()
        self._closing = False

    def refuse_new(self) -> None:
        self._closing = True

    def count_http(self, path: str, status: int) -> None:
        """Counts an HTTP request, whatever its status."""
        self._answers[path if path in PATHS else "other", status] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        request, out = Request(scope, receive), _ClientResponse(send)
        try:
            response = await self._answer_here(request)
            if response is not None:
                await response(scope, receive, send)
            else:
                forwarded = await self._read(request)
                await unless_gone(receive, self._forward(forwarded, out))
        except ClientGone:
            return
        except (Exception, asyncio.CancelledError) as fault:  # cancelled: the drain's time is over
            answer = error_response(_refusal(fault), request.url.path)
            if not out.status:
                await answer(scope, receive, send)
            elif out.streams:
                await send(
                    {"type": "http.response.body", "body": b"data: " + bytes(answer.body) + b"\n\n"}
                )
            else:
                raise  # the connection is closed, because the response is incomplete

    async def _answer_here(self, request: Request) -> Response | None:
        """Answers what needs no replica; None if the request needs one."""
        match request.url.path:
            case "/healthz":
                return PlainTextResponse("ok\n")
            case "/readyz":
                return (
                    PlainTextResponse("closing\n", 503)
                    if self._closing
                    else PlainTextResponse("ready\n")
                )
            case "/metrics":
                lines = [*merged(await self._replicas.metrics()), *answers_lines(self._answers)]
                return PlainTextResponse(joined(lines), media_type=MEDIA_TYPE)
            case "/v1/adapters" if request.method == "GET":
                lists = await self._replicas.shown()
                cards = [
                    {**card, "replica": name}
                    for name, cards in sorted(lists.items())
                    for card in cards
                ]
                return JSONResponse({"object": "list", "data": cards})
        return None

    async def _read(self, request: Request) -> ForwardedRequest:
        """Reads the request. Refusal: the server is shutting down, or the body did not arrive."""
        if self._closing:
            raise shutting_down()
        body = await read_bytes(request, self._body_bytes)
        scope, state = request.scope, request.scope["state"]
        return ForwardedRequest(
            request.method,
            scope["path"],
            scope["query_string"],
            tuple(scope["headers"]),
            body,
            state.get("caller"),
            state["request_id"],
        )

    async def _forward(self, request: ForwardedRequest, out: _ClientResponse) -> None:
        large = len(request.body) > LARGE_BODY  # parsed in a thread, so that others need not wait
        model = await asyncio.to_thread(model_of, request.body) if large else model_of(request.body)
        for left in reversed(range(ATTEMPTS)):
            try:
                async with asyncio.timeout(self._seconds) as until:
                    async for message in self._replicas.answer(
                        request, model, tuple(self._changes)
                    ):
                        until.reschedule(None)  # from now on the replica checks the time
                        await out(message)
                break
            except TimeoutError:
                raise Refusal(503, "No replica has answered in time.", code="no_replica") from None
            except LostProcessError:
                if out.status or not left:
                    raise
                log.warning("lost a replica: request %s goes to another one", request.request_id)
        if out.status == 200 and request.path in ADMIN_BODIES:  # new replicas make the change too
            self._changes = changed(self._changes, request)
            await self._replicas.adopt(tuple(self._changes))


class _ClientResponse:
    """Sends the response, and remembers its status (0 before it has begun)."""

    def __init__(self, send: Send) -> None:
        self.status, self.streams, self._send = 0, False, send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streams = any(
                value.startswith(b"text/event-stream") for _, value in message["headers"]
            )
        await self._send(message)


def open_front(
    replicas: Replicas, settings: ServeSettings, keys: ApiKeys
) -> tuple[Server, socket.socket]:
    """Opens the front end's port. ConfigError: the port is in use."""
    front = Frontend(replicas, body_bytes=ServeLimits.body_bytes, seconds=settings.seconds)
    return guarded(front, settings, keys, counted=front.count_http, closing=front.refuse_new)


def changed(changes: Sequence[AdminChange], request: ForwardedRequest) -> list[AdminChange]:
    """Adds a change, and drops earlier ones of the same name and kind."""
    kind, name = _subject(request)
    number = changes[-1].number + 1 if changes else 1
    return [
        *(change for change in changes if _subject(change.request) != (kind, name)),
        AdminChange(number, request),
    ]


def _subject(request: ForwardedRequest) -> tuple[bool, str]:
    body = json.loads(request.body)
    return "pin" in request.path, str(body.get("lora_name") or body.get("name"))


def _refusal(fault: BaseException) -> Refusal:
    if isinstance(fault, asyncio.CancelledError):
        return shutting_down()
    if isinstance(fault, LostProcessError):
        return Refusal(503, "The replica was lost. Send the request again.", code="replica_lost")
    assert isinstance(fault, Exception)
    if not isinstance(fault, Refusal | QueueFullError):
        log.exception("a bug: %s", type(fault).__name__)
    return refusal_of(fault)


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    assert message["type"] == "lifespan.shutdown"
    await send({"type": "lifespan.shutdown.complete"})
