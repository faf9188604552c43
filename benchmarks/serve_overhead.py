"""What a server costs beside the engine that answers in it: the same requests in process and over HTTP.

    python benchmarks/serve_overhead.py                       smollm2-135m; 1 and 16 requests in flight
    python benchmarks/serve_overhead.py --flights 16 --turns 5

Prints `measurements`, as docs/results/*.json hold them. Prompts of 64 tokens, 64 new ones, greedy, nothing stops, the
base's own answers; ways alternate within a turn, the first is left out. In process: an engine that knows no library,
and one beside a library of which 16 adapters (LoRA of rank 8 on q and v) are in memory and none acts. Over HTTP:
`veneer serve` over the same library in a process of its own, whole answers and streams, asked by plain sockets.
`first token`: of a stream, from the request's sending.
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
from veneer.decoding.adapters import Fixed
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.sequence import Request
from veneer.library.residents import Residents

PROMPT, NEW, ADAPTERS = 64, 64, 16


def prompts(count: int, turn: int) -> list[list[int]]:
    """Of each turn others: nothing is found that was read before."""
    draw = torch.Generator().manual_seed(turn)
    return torch.randint(100, 40000, (count, PROMPT), generator=draw).tolist()


def found(seconds: float, first: list[float], count: int) -> dict[str, float]:
    own = {"tokens/s": count * NEW / seconds}
    return own | ({"first token ms": 1e3 * statistics.median(first)} if first else {})


def in_process(engine: Engine, flight: int, requests: int, turn: int) -> dict[str, float]:
    asked = [Request(prompt=tuple(each), max_new_tokens=NEW) for each in prompts(requests, turn)]
    return found(*in_flight(engine, asked, flight), requests)


async def _asked(port: int, waiting: list[list[int]], streamed: bool, first: list[float]) -> None:
    """One after another, over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while waiting:
        body = {"model": "base", "prompt": waiting.pop(), "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        text = json.dumps(body | ({"stream": True} if streamed else {})).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        sent = time.perf_counter()
        writer.write(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
        answered = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answered.split(b"\r\n")[0]:
            raise RuntimeError(answered.decode())
        if not streamed:
            length = next(line for line in answered.lower().split(b"\r\n") if line.startswith(b"content-length"))
            used = json.loads(await reader.readexactly(int(length.split(b":")[1])))["usage"]
            if used["completion_tokens"] != NEW:
                raise RuntimeError(f"another answer: {used}")
            continue
        heard = 0
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            heard += chunk.count(b"data: ")
            if heard and chunk and not chunk.startswith(b":"):
                first.append(time.perf_counter() - sent) if heard == chunk.count(b"data: ") else None
        await reader.readline()
    writer.close()


def over_http(port: int, flight: int, requests: int, turn: int, *, streamed: bool) -> dict[str, float]:
    waiting, first = prompts(requests, 2 * turn + streamed), list[float]()  # one server hears both

    async def all_() -> None:
        await asyncio.gather(*(_asked(port, waiting, streamed, first) for _ in range(flight)))

    start = time.perf_counter()
    asyncio.run(all_())
    return found(time.perf_counter() - start, first, requests)


def serving(base: str, library: Path) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "veneer", "serve", "--base", base, "--library", str(library), "--name", "base"]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    residents = Residents(base, library, budget_bytes=2**30, base_names=["base"])
    engine = Engine(base, budget_bytes=room, adapters=residents)
    names = [residents.resolve(f"a{number}") for number in range(ADAPTERS)]
    in_flight(engine, [Request(prompt=(5, 6, 7), max_new_tokens=2, adapter=each) for each in names], ADAPTERS)
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        bare = Engine(base, budget_bytes=room, adapters=Fixed({}))
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
                    name: {what: spread([own[what] for own in all_]) for what in all_[0]} for name, all_ in each.items()
                }
                measurements.append(
                    {
                        "what": f"the base's answers in process and over HTTP: {asked.base}, {flight} in flight of "
                        f"{requests}, {PROMPT} tokens read and {NEW} new ones",
                        "machine": f"{platform.processor() or platform.machine()}; torch {torch.__version__}",
                        "commit": commit.stdout.strip(),
                        "command": f"python benchmarks/serve_overhead.py --flights {flight} --turns {asked.turns}",
                        "values": {"threads": torch.get_num_threads(), "dtype": str(base.dtype), **values},
                    }
                )
        finally:
            process.terminate()
            process.wait()
    print(json.dumps({"measurements": measurements}, indent=1))


if __name__ == "__main__":
    main()
