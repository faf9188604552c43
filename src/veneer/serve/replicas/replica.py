"""A replica: one base and its adapters in a process of Ray Serve, behind the front end that clients
reach (front.py).

The front end forwards a request with its caller. It goes through the usual routes (http/app.py),
and the response returns message by message. Only the front end reaches a replica, so no key is
checked here.

The front end keeps what an administrator has changed (names, pins). Every request brings these
changes, and a replica makes those that it has not made yet, because it may have started later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Message

from veneer.bases.compute import HeldAs
from veneer.library.library import Library
from veneer.models.load import load_base
from veneer.quant.config import Quantize
from veneer.serve.engine.vllm_adapters import card_of
from veneer.serve.http.app import application
from veneer.serve.http.json_body import parsed
from veneer.serve.http.keys import Caller
from veneer.serve.refusals import Refusal
from veneer.serve.start import ServeSettings, service_of

log = logging.getLogger("veneer.serve")


@dataclass(frozen=True)
class ReplicaConfig:
    """Configures what every replica loads. library: a folder that all nodes share."""

    base: str
    library: str
    dtype: HeldAs
    device: str
    quantize: Quantize | None
    settings: ServeSettings


@dataclass(frozen=True)
class ForwardedRequest:
    """A request that the front end sends to a replica. caller: None if no key is required."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    caller: Caller | None
    request_id: str


@dataclass(frozen=True)
class AdminChange:
    """An administrator's request that succeeded. Numbers count up."""

    number: int
    request: ForwardedRequest


class Replica:
    """Serves one base in a process of Ray Serve.

    model_known: called with each request's model, so that the next request for it comes here.
    """

    def __init__(self, served: ReplicaConfig, name: str, model_known: Any) -> None:
        base = load_base(
            served.base, dtype=served.dtype, device=served.device, quantize=served.quantize
        )
        self.name = name
        self._service = service_of(base, Library(served.library), served.settings)
        self._app = application(self._service)
        self._model_known = model_known
        self._changed = 0
        self._changing = asyncio.Lock()
        self._began = False

    async def answer(
        self, request: ForwardedRequest, model: str, changes: Sequence[AdminChange]
    ) -> AsyncIterator[Message]:
        """Yields the response as ASGI messages."""
        await self.adopt(changes)
        if model:
            await self._model_known(model)
        async for message in self._answer(request):
            yield message

    async def adopt(self, changes: Sequence[AdminChange]) -> None:
        """Makes the changes that this replica has not made yet."""
        if not self._began:
            self._began = True
            self._service.loop.start()
        async with self._changing:
            for change in changes:
                if change.number > self._changed:
                    async for message in self._answer(change.request):
                        if message["type"] == "http.response.start" and message["status"] >= 400:
                            log.error(
                                "%s: this replica refused a change: %d",
                                change.request.path,
                                message["status"],
                            )
                    self._changed = change.number

    async def metrics(self) -> tuple[str, str]:
        """Returns the replica's name and its metrics."""
        await self.adopt(())
        return self.name, await self._service.metrics_text()

    async def shown(self) -> tuple[str, list[dict[str, Any]]]:
        """Returns the replica's name and what /v1/adapters lists."""
        return self.name, [card_of(adapter) for adapter in self._service.residents.tiers.shown()]

    async def _answer(self, request: ForwardedRequest) -> AsyncIterator[Message]:
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await asyncio.Event().wait()  # cancelled once the client has gone
            raise AssertionError

        async def run() -> None:
            try:
                await self._app(_scope(request), receive, sent.put)
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _scope(request: ForwardedRequest) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "headers": list(request.headers),
        "client": None,
        "server": None,
        "root_path": "",
        "state": {"caller": request.caller, "request_id": request.request_id},
    }


def model_of(body: bytes) -> str:
    """Returns the name that chooses the replica: of the adapter, or of several together; empty if
    there is none. The replica validates the body."""
    try:
        fields = parsed(body)
    except Refusal:
        return ""
    adapters = fields.get("adapters")
    if not isinstance(adapters, list):
        adapters = []
    names = [adapter.get("name") for adapter in adapters if isinstance(adapter, dict)]
    model = "+".join(name for name in names if isinstance(name, str)) or fields.get("model")
    return model[:400] if isinstance(model, str) else ""
