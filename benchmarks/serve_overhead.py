"""What a server costs beside the engine that answers in it: the same requests in process and over
HTTP.

    python benchmarks/serve_overhead.py
        smollm2-135m; 1 and 16 requests in flight
    python benchmarks/serve_overhead.py --flights 16 --turns 5

Prints `measurements`, as docs/results/*.json hold them. Prompts of 64 tokens, 64 new ones, greedy,
nothing stops, the base's own answers; ways alternate within a turn, the first is left out. In
process: an engine that knows no library, and one beside a library of which 16 adapters (LoRA of
rank 8 on q and v) are in memory and none acts. Over HTTP: `veneer serve` over the same library in a
process of its own, whole answers and streams, asked by plain sockets. `first token`: of a stream,
from the request's sending, the mean of those that begin together. Of later ones in process and over
HTTP are not the same: here one follows within the step that ends the one before it, there it comes
when the next step has begun, which may read a whole step's prompts, and it waits for that one. What
is read when is alike.
"""

import argparse
import asyncio
import json
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from decoding_step import spread
from many_adapters import in_flight, make_library

import veneer
from veneer.base import Base
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.library.residents.residents import Residents

PROMPT, NEW, ADAPTERS = 64, 64, 16


def prompts(count: int, turn: int) -> list[list[int]]:
    """Of each turn others: nothing is found that was read before."""
    draw = torch.Generator().manual_seed(turn)
    return torch.randint(100, 40000, (count, PROMPT), generator=draw).tolist()


def found(seconds: float, first: list[float], count: int, flight: int) -> dict[str, float]:
    """first: in the order in which they came; those that begin together are the first of them."""
    own = {"tokens/s": count * NEW / seconds}
    if first:
        own |= {"first token ms": 1e3 * statistics.mean(first[:flight])}
        own |= {"of those that come later ms": 1e3 * statistics.mean(first[flight:])}
    return own


def in_process(engine: Engine, flight: int, requests: int, turn: int) -> dict[str, float]:
    asked = [Request(prompt=tuple(each), max_new_tokens=NEW) for each in prompts(requests, turn)]
    return found(*in_flight(engine, asked, flight), requests, flight)


class Asking(asyncio.Protocol):
    """One after another, over one connection. Little of its own: it takes processors from whom it
    asks.

    first: seconds from a stream's request to its first event, appended. ended: done when nothing
    waits any more.
    """

    def __init__(
        self, port: int, waiting: list[list[int]], streamed: bool, first: list[float]
    ) -> None:
        self._port, self._waiting, self._streamed, self._first = port, waiting, streamed, first
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        body = {
            "model": "base",
            "prompt": self._waiting.pop(),
            "max_tokens": NEW,
            "temperature": 0,
            "ignore_eos": True,
        }
        text = json.dumps(body | ({"stream": True} if self._streamed else {})).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type:"
            " application/json\r\n"
        )
        self._heard, self._told, self._sent = b"", False, time.perf_counter()
        self._transport.write(
            head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text
        )

    def data_received(self, data: bytes) -> None:
        if not self._told and self._streamed and b"data: " in data:
            self._told = True
            self._first.append(time.perf_counter() - self._sent)
        if self._streamed and self._told:
            self._heard = (self._heard + data)[-7:]
            whole = self._heard == b"\r\n0\r\n\r\n"
        else:
            self._heard += data
            whole = self._answered()
        if whole and self._waiting:
            self._ask()
        elif whole:
            self._transport.close()

    def _answered(self) -> bool:
        head, _, rest = self._heard.partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(self._heard.decode())
        length = next(
            (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")),
            None,
        )
        if length is None or len(rest) < int(length.split(b":")[1]):
            return False
        if (used := json.loads(rest)["usage"])["completion_tokens"] != NEW:
            raise RuntimeError(f"another answer: {used}")
        return True

    def connection_lost(self, fault: Exception | None) -> None:
        self.ended.set_exception(fault) if fault else self.ended.set_result(None)


def over_http(
    port: int, flight: int, requests: int, turn: int, *, streamed: bool
) -> dict[str, float]:
    waiting, first = prompts(requests, 2 * turn + streamed), list[float]()  # one server hears both

    async def all_() -> None:
        def made() -> Asking:
            return Asking(port, waiting, streamed, first)

        events = asyncio.get_running_loop()
        opened = await asyncio.gather(
            *(events.create_connection(made, "127.0.0.1", port) for _ in range(flight))
        )
        await asyncio.gather(*(asking.ended for _, asking in opened))

    start, own = time.perf_counter(), time.thread_time()
    asyncio.run(all_())
    values = found(time.perf_counter() - start, first, requests, flight)
    return values | {
        "its client's processor us a token": 1e6 * (time.thread_time() - own) / (requests * NEW)
    }


def serving(base: str, library: Path) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "veneer",
        "serve",
        "--base",
        base,
        "--library",
        str(library),
        "--name",
        "base",
    ]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"):
                return process, port
        except OSError:
            if process.poll() is not None:
                raise RuntimeError("veneer serve has ended") from None
            time.sleep(0.2)
    raise RuntimeError("veneer serve does not answer")


def beside_a_library(base: Base, folder: Path, room: int) -> Engine:
    """With all of its adapters in memory."""
    library = make_library(folder, base, ADAPTERS)
    residents = Residents(base, library, budget_bytes=2**30)
    engine = Engine(base, budget_bytes=room, adapters=residents.tiers)
    names = [residents.resolve(f"a{number}") for number in range(ADAPTERS)]
    in_flight(
        engine,
        [Request(prompt=(5, 6, 7), max_new_tokens=2, adapter=each) for each in names],
        ADAPTERS,
    )
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--flights", default="1,16")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the server ends too
    base = veneer.load(asked.base)
    _ = base.paths
    room = 64 * (PROMPT + NEW + 16) * bytes_per_token(base)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        bare = Engine(base, budget_bytes=room, adapters=FixedAdapters({}))
        engine = beside_a_library(base, Path(folder), room)
        process, port = serving(asked.base, Path(folder) / "library")
        try:
            for flight in map(int, asked.flights.split(",")):
                requests = 2 * flight
                ways: dict[str, Callable[[int], dict[str, float]]] = {
                    "in process": partial(in_process, bare, flight, requests),
                    "in process, beside a library": partial(in_process, engine, flight, requests),
                    "HTTP": partial(over_http, port, flight, requests, streamed=False),
                    "HTTP, streamed": partial(over_http, port, flight, requests, streamed=True),
                }
                each: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
                for turn in range(asked.turns + 1):
                    for name, run in ways.items():
                        measured = run(turn)
                        each[name] += [measured] if turn else []
                values = {
                    name: {what: spread([own[what] for own in all_]) for what in all_[0]}
                    for name, all_ in each.items()
                }
                measurements.append(
                    {
                        "what": (
                            f"the base's answers in process and over HTTP: {asked.base}, {flight}"
                            f" in flight of {requests}, {PROMPT} tokens read and {NEW} new ones"
                        ),
                        "machine": (
                            f"{platform.processor() or platform.machine()}; torch"
                            f" {torch.__version__}"
                        ),
                        "commit": commit.stdout.strip(),
                        "command": (
                            f"python benchmarks/serve_overhead.py --flights {flight} --turns"
                            f" {asked.turns}"
                        ),
                        "values": {
                            "threads": torch.get_num_threads(),
                            "dtype": str(base.dtype),
                            **values,
                        },
                    }
                )
        finally:
            process.terminate()
            process.wait()
    print(json.dumps({"measurements": measurements}, indent=1))


if __name__ == "__main__":
    main()
