"""Sends an answer to a client, whole or as a stream, and cancels it once the client has gone."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from veneer.serve.engine.generation import Generation
from veneer.serve.engine.service import Service
from veneer.serve.http.connection import ChunkWriter, chunk_writer
from veneer.serve.http.guard import error_response
from veneer.serve.limits import LARGE_LOGPROBS
from veneer.serve.protocols.answers import (
    AnswerDelta,
    AnswerWriter,
    ApiProtocol,
    EndReason,
    GeneratedAnswer,
    ResponseHead,
)
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal, refusal_of, shutting_down

log = logging.getLogger("veneer.serve")
T = TypeVar("T")
HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"))
PROXIES = (b"x-accel-buffering", b"no")
"""Keeps proxies from buffering the stream."""
TURNS = 3
"""Turns of the event loop before a request goes on: requests that came with it are read in them,
so that they are expected too."""


class ClientGone(Exception):
    """The client has closed its connection."""


class Exchange(Response):
    """Answers one request. The status goes out with the first delta, so that an adapter that fails
    is 4xx."""

    def __init__(
        self,
        service: Service,
        protocol: ApiProtocol,
        request: GenerationRequest,
        key_digest: str,
        path: str,
    ) -> None:
        self._service, self._protocol, self._request = service, protocol, request
        self._key_digest, self._path = key_digest, path
        self._start = time.monotonic()
        self._has_begun = False
        self._first_token_wait = ExitStack()
        """Suspends the trainer until it is closed, when the first token has come."""
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None = None
        try:
            with self._first_token_wait as wait:
                wait.enter_context(self._service.trainer_suspended())
                response = await unless_gone(receive, self._answer(send, chunk_writer(scope)))
        except ClientGone:
            return
        except Refusal as refusal:
            response = error_response(refusal, self._path)
        except asyncio.CancelledError:  # the server ends, and the drain's time is over
            response = None if self._has_begun else error_response(shutting_down(), self._path)
        except Exception as fault:
            log.exception("a bug: %s", type(fault).__name__)
            response = None if self._has_begun else error_response(refusal_of(fault), self._path)
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, send: Send, chunks: ChunkWriter | None) -> Response | None:
        """Returns the whole answer; None if it was streamed. chunks: a faster way to write the
        stream."""
        self._request, choice = await self._service.choose(self._request, self._key_digest)
        with self._service.loop.expecting_request():
            for _ in range(TURNS):
                await asyncio.sleep(0)
            model, generation = await self._service.begin(self._request, self._key_digest)
        fingerprint = self._service.fingerprint(model)
        name, prefix = self._request.model, self._protocol.id_prefix
        head = ResponseHead(name, fingerprint, prefix, choice=choice)
        metrics, reason = self._service.metrics, None
        writer = self._protocol.writer(head, self._request)
        try:
            async with generation:
                deltas = generation.deltas()
                first = await anext(deltas)
                self._first_token_wait.close()
                metrics.count_first_token(time.monotonic() - self._start)
                if self._request.stream:
                    reason = await self._stream(send, chunks, writer, generation, first, deltas)
                    return None
                count = len(self._request.prompts) * self._request.choices
                answers = [GeneratedAnswer(index) for index in range(count)]
                _add(answers, first)
                async for more in deltas:
                    _add(answers, more)
                reason = answers[0].end.reason if answers[0].end else None
                usage = generation.usage
                return await _unblocked(
                    lambda: JSONResponse(writer.whole(answers, usage)), self._num_logprobs(answers)
                )
        finally:
            metrics.count_answer(reason, time.monotonic() - self._start, generation.usage)

    async def _stream(
        self,
        send: Send,
        chunks: ChunkWriter | None,
        writer: AnswerWriter,
        generation: Generation,
        first: Sequence[AnswerDelta],
        deltas: AsyncIterator[list[AnswerDelta]],
    ) -> EndReason | None:
        """Returns why the last answer ended; None if it failed."""
        reason = _end_reason(None, first)
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, PROXIES]})
        beginning = "".join(writer.begin(generation.usage))
        await _send(send, beginning + await self._events(writer, first))
        if chunks is not None:
            generation.hand_to(_ChunkSink(chunks, writer))
        try:
            async for more in deltas:
                await _send(send, await self._events(writer, more))
                reason = _end_reason(reason, more)
        except asyncio.CancelledError:  # the client has gone, or the server ends
            await _send(send, "".join(writer.fail(shutting_down())), last=True)
            raise
        except Exception as fault:
            await _send(send, "".join(writer.fail(refusal_of(fault))), last=True)
            if not isinstance(fault, Refusal):
                raise
            return None
        await _send(send, "".join(writer.finish(generation.usage)), last=True)
        return reason

    async def _events(self, writer: AnswerWriter, deltas: Sequence[AnswerDelta]) -> str:
        return await _unblocked(
            lambda: "".join(event for delta in deltas for event in writer.write(delta)),
            self._num_logprobs(deltas),
        )

    def _num_logprobs(self, answers: Sequence[AnswerDelta] | Sequence[GeneratedAnswer]) -> int:
        tokens = sum(len(answer.logprobs) for answer in answers)
        return tokens * (1 + (self._request.sampling.logprobs or 0))


async def _unblocked(write: Callable[[], T], num_logprobs: int) -> T:
    """Runs a function that writes an answer; in a thread if it has many log-probabilities."""
    if num_logprobs > LARGE_LOGPROBS:
        return await asyncio.to_thread(write)
    return write()


class _ChunkSink:
    """Writes deltas to the connection as soon as they come."""

    def __init__(self, chunks: ChunkWriter, writer: AnswerWriter) -> None:
        self._chunks, self._writer = chunks, writer

    @property
    def open(self) -> bool:
        return self._chunks.open

    def take(self, delta: AnswerDelta) -> None:
        if text := "".join(self._writer.write(delta)):
            self._chunks.write(text.encode())


def _add(answers: Sequence[GeneratedAnswer], deltas: Sequence[AnswerDelta]) -> None:
    for delta in deltas:
        answers[delta.index].add(delta)


def _end_reason(before: EndReason | None, deltas: Sequence[AnswerDelta]) -> EndReason | None:
    """Returns why the answer that ended last has ended."""
    return next((delta.end.reason for delta in reversed(deltas) if delta.end), before)


async def _send(send: Send, text: str, *, last: bool = False) -> None:
    if text or last:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Returns the work's result. ClientGone: the client went away, and the work is cancelled."""
    gone, done = asyncio.create_task(_wait_until_gone(receive)), asyncio.create_task(work)
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


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
