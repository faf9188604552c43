"""Several servers behind one address: a model's requests go where its adapter is in memory.

    veneer serve --base B --library L --port 8001 &
    veneer serve --base B --library L --port 8002 &
    python examples/affinity.py --port 8000 http://127.0.0.1:8001 http://127.0.0.1:8002

It reads /metrics of each server every second. Of the servers that have the adapter the least busy
one answers; an adapter that none has goes where a hash of both names says, so that every router
says the same; a server whose queue is full, or that does not answer, is passed over. It asks for no
key and adds none: put it where only you reach it. It needs `pip install 'veneer[serve]' httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

EVERY_SECONDS = 1.0
FULL = 1.0
"""Requests that wait for each one that runs: beyond that an adapter may as well be loaded
elsewhere."""
KEPT = ("content-type", "authorization", "x-api-key", "accept", "x-request-id")
METRIC = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Replica:
    url: str
    there: bool = True
    running: float = 0.0
    waiting: float = 0.0
    base: str = ""
    adapters: set[str] = field(default_factory=set)

    def read(self, metrics: str) -> None:
        """In memory now, or asked for by requests that run or wait."""
        self.there, self.adapters = True, set()
        for found in METRIC.finditer(metrics):
            name, labels = found["name"], dict(LABEL.findall(found["labels"] or ""))
            if name == "vllm:num_requests_running":
                self.running, self.base = float(found["value"]), labels["model_name"]
            elif name == "vllm:num_requests_waiting":
                self.waiting = float(found["value"])
            elif name == "vllm:lora_requests_info":
                named = ",".join(
                    labels.get(f"{state}_lora_adapters", "") for state in ("running", "waiting")
                )
                self.adapters.update(filter(None, named.split(",")))
            elif name == "veneer:adapter_in_memory_bytes":
                self.adapters.add(labels["adapter"])


def ordered(replicas: Sequence[Replica], model: str) -> list[Replica]:
    """Where a model's requests go, the best first."""
    adapter = model.rpartition(":")[2].partition("@")[0]

    def rank(replica: Replica) -> tuple[bool, bool, bool, float, bytes]:
        full = replica.waiting > FULL * max(replica.running, 1)
        has = model in ("", replica.base) or adapter in replica.adapters
        load = replica.running + replica.waiting if has else 0.0
        place = blake2b(f"{adapter} {replica.url}".encode(), digest_size=8).digest()
        return not replica.there, full, not has, load, place

    return sorted(replicas, key=rank)


def application(urls: Sequence[str], *, every: float = EVERY_SECONDS) -> Starlette:
    replicas = [Replica(url.rstrip("/")) for url in urls]
    client = httpx.AsyncClient(
        timeout=httpx.Timeout(600, connect=2), limits=httpx.Limits(max_connections=1000)
    )

    async def look(replica: Replica) -> None:
        try:
            replica.read(
                (await client.get(f"{replica.url}/metrics", timeout=2)).raise_for_status().text
            )
        except httpx.HTTPError:
            replica.there = False

    async def watch() -> None:
        while True:
            await asyncio.gather(*map(look, replicas))
            await asyncio.sleep(every)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch())
        yield
        watching.cancel()
        await client.aclose()

    async def forward(request: Request) -> Response:
        body = await request.body()
        try:
            model = str(json.loads(body).get("model", "")) if body else ""
        except (ValueError, AttributeError):
            model = ""  # the server says what is wrong with it
        headers = {name: value for name, value in request.headers.items() if name in KEPT}
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        best = ordered(replicas, model)
        for replica in best:
            asked = client.build_request(
                request.method, replica.url + path, headers=headers, content=body
            )
            try:
                answer = await client.send(asked, stream=True)
            except httpx.TransportError:
                replica.there = False
                continue
            if answer.status_code not in (429, 503) or replica is best[-1]:
                return Passed(answer, replica)
            await answer.aclose()
        error = {
            "message": "No server answers.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        return JSONResponse({"error": error}, 503)

    return Starlette(
        routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], lifespan=lifespan
    )


class Passed(StreamingResponse):
    """An answer as it comes. Who asked may go at any time, and the server is told."""

    def __init__(self, answer: httpx.Response, replica: Replica) -> None:
        named = ("content-type", "retry-after", "x-request-id", "x-should-retry")
        headers = {name: answer.headers[name] for name in named if name in answer.headers}
        super().__init__(
            answer.aiter_raw(), answer.status_code, {"x-replica": replica.url, **headers}
        )
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answer.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("servers", nargs="+", metavar="URL")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(application(args.servers), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
