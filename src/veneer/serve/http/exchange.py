"""An answer on its way to a client: whole or piece by piece, and nothing computed for one that has
gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from veneer.serve.engine.answering import Generation
from veneer.serve.engine.service import Service
from veneer.serve.http.connection import ChunkWriter, chunks_of
from veneer.serve.http.guard import answer_to
from veneer.serve.protocols.answers import (
    AnswerDelta,
    ApiProtocol,
    EventStream,
    GeneratedAnswer,
    Reason,
    ResponseHead,
)
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal, refusal_of, shutting_down

log = logging.getLogger("veneer.serve")
HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"))
PROXIES = (b"x-accel-buffering", b"no")
"""They must not gather pieces."""
TURNS = 3
"""Of the event loop, before a request goes on: those that came with it are read meanwhile, and are
coming too."""


class ClientGone(Exception):
    """Nobody reads what would be sent."""


class Exchange(Response):
    """The status is sent when the first piece is there, so that an adapter that
    fails is 4xx."""

    def __init__(
        self,
        service: Service,
        protocol: ApiProtocol,
        asked: GenerationRequest,
        caller: str,
        path: str,
    ) -> None:
        self._service, self._protocol, self._asked = service, protocol, asked
        self._caller, self._path = caller, path
        self._began = time.monotonic()
        self._sent = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None = None
        try:
            response = await unless_gone(receive, self._exchange(send, chunks_of(scope)))
        except ClientGone:
            return
        except Refusal as refusal:
            response = answer_to(refusal, self._path)
        except asyncio.CancelledError:  # the server ends, and this request has outlived the drain
            response = None if self._sent else answer_to(shutting_down(), self._path)
        except Exception as fault:
            log.exception("a bug: %s", type(fault).__name__)
            response = None if self._sent else answer_to(refusal_of(fault), self._path)
        if response is not None:
            await response(scope, receive, send)

    async def _exchange(self, send: Send, chunks: ChunkWriter | None) -> Response | None:
        """The whole answer; None: it has been sent in pieces. chunks: how they may be written
        too."""
        with self._service.loop.coming():
            for _ in range(TURNS):
                await asyncio.sleep(0)
            model, answering = await self._service.begin(self._asked, self._caller)
        head = ResponseHead(
            self._asked.model, self._service.fingerprint(model), self._protocol.id_prefix
        )
        reason = None
        try:
            async with answering:
                pieces = answering.pieces()
                first = await anext(pieces)
                self._service.metrics.first(time.monotonic() - self._began)
                if self._asked.stream:
                    streamed = self._protocol.stream(head, self._asked)
                    reason = await self._stream(send, chunks, streamed, answering, first, pieces)
                    return None
                answers = [
                    GeneratedAnswer(index)
                    for index in range(len(self._asked.prompts) * self._asked.choices)
                ]
                _add(answers, first)
                async for some in pieces:
                    _add(answers, some)
                reason = answers[0].end.reason if answers[0].end else None
                return JSONResponse(
                    self._protocol.respond(head, self._asked, answers, answering.usage)
                )
        finally:
            self._service.metrics.found(answering.usage.cached)
            self._service.metrics.ended(reason, time.monotonic() - self._began, answering.usage.new)

    async def _stream(
        self,
        send: Send,
        chunks: ChunkWriter | None,
        streamed: EventStream,
        answering: Generation,
        first: Sequence[AnswerDelta],
        pieces: AsyncIterator[list[AnswerDelta]],
    ) -> Any:
        reason = _reason(None, first)
        self._sent = True
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, PROXIES]})
        await _send(send, "".join([*streamed.begin(answering.usage), *_events(streamed, first)]))
        if chunks is not None:
            answering.hand_to(_ChunkSink(chunks, streamed))
        try:
            async for some in pieces:
                await _send(send, "".join(_events(streamed, some)))
                reason = _reason(reason, some)
        except asyncio.CancelledError:  # the client has gone, or the server ends
            await _send(send, "".join(streamed.fail(shutting_down())), last=True)
            raise
        except Exception as fault:
            await _send(send, "".join(streamed.fail(refusal_of(fault))), last=True)
            if not isinstance(fault, Refusal):
                raise
            return None
        await _send(send, "".join(streamed.finish(answering.usage)), last=True)
        return reason


class _ChunkSink:
    """Pieces that are written as soon as they are told."""

    def __init__(self, chunks: ChunkWriter, streamed: EventStream) -> None:
        self._chunks, self._streamed = chunks, streamed

    @property
    def open(self) -> bool:
        return self._chunks.open

    def take(self, piece: AnswerDelta) -> None:
        if text := "".join(self._streamed.write(piece)):
            self._chunks.write(text.encode())


def _add(answers: Sequence[GeneratedAnswer], pieces: Sequence[AnswerDelta]) -> None:
    for piece in pieces:
        answers[piece.index].add(piece)


def _events(streamed: EventStream, pieces: Sequence[AnswerDelta]) -> Iterator[str]:
    for piece in pieces:
        yield from streamed.write(piece)


def _reason(before: Reason | None, pieces: Sequence[AnswerDelta]) -> Reason | None:
    """Of the answer that ended last."""
    return next((piece.end.reason for piece in reversed(pieces) if piece.end), before)


async def _send(send: Send, text: str, *, last: bool = False) -> None:
    if text or last:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work returns; ClientGone, and the work is cancelled, when the client goes."""
    gone, done = asyncio.create_task(_gone(receive)), asyncio.create_task(work)
    try:
        await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise ClientGone
    finally:
        for task in (gone, done):
            task.cancel()
        for task in (gone, done):
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
