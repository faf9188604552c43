"""Sends requests of 200 clients to a server that trains, while uploads are cut off: nothing may be
lost, and no response may be a 5xx.

    python benchmarks/train_load.py
        smollm2-135m; 200 clients with 3 requests each, 3 broken uploads, a job of 6 epochs
    python benchmarks/train_load.py --clients 20 --requests 1

`veneer serve --train` runs in a process of its own, and the job's trainer in another. Each client
sends chats one after another, every other one streamed, and checks that each answer is complete. A
client that gets a 429 waits as long as it is told, and sends the request again. Meanwhile uploads
are sent: some whole, and some that are cut off in one of three ways (closed, reset, or left open
until the end). The program prints counts and latencies, and exits with 1 if

- a request has no complete answer, or a status is 500 or more
- the job does not succeed, or its model does not answer
- a whole upload is missing or differs, or a broken one has left a file
- the server's log has a bug
"""

import argparse
import asyncio
import json
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from train_share import ROWS, Trainer, percentiles, start_job, training_server, upload

from veneer.jobs.store import JobStore

NEW = 16
BROKEN_BYTES = 200_000
"""Bytes that a broken upload sends of the bytes that it announces."""
JOB_SECONDS = 1800.0


@dataclass
class Counts:
    """Counts what the clients have seen. Seconds are of complete answers."""

    statuses: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, number: int, turn: int, counts: Counts) -> None:
    """Sends one request until it is answered."""
    streamed = (number + turn) % 2 == 0
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": f"Client {number} asks question {turn}: why?"}],
        "max_tokens": NEW,
        "temperature": 0,
        "stream": streamed,
    }
    while True:
        try:
            status, wait = await answered(client, body, counts)
        except httpx.HTTPError as fault:
            counts.lost.append(f"client {number}, request {turn}: {type(fault).__name__}: {fault}")
            return
        counts.statuses[str(status)] += 1
        if status != 429:
            return
        await asyncio.sleep(wait)


async def answered(
    client: httpx.AsyncClient, body: dict[str, Any], counts: Counts
) -> tuple[int, float]:
    """Sends a request and reads its answer; returns the status and how long to wait after a 429."""
    start, first, reason = time.perf_counter(), 0.0, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return answer.status_code, float(answer.headers.get("retry-after", 1))
        if body["stream"]:
            lines = [""]
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    first = first or time.perf_counter() - start
                    lines.append(line.removeprefix("data: "))
            choices = [json.loads(line)["choices"] for line in lines[1:-1]]
            reasons = [c[0]["finish_reason"] for c in choices if c and c[0]["finish_reason"]]
            reason = reasons[0] if len(reasons) == 1 and lines[-1] == "[DONE]" else None
        else:
            reason = json.loads(await answer.aread())["choices"][0]["finish_reason"]
    if reason not in ("stop", "length"):
        counts.lost.append(f"an answer ended with {reason}")
    counts.whole_seconds.append(time.perf_counter() - start)
    counts.first_seconds += [first] if first else []
    return 200, 0.0


def cut_off(address: tuple[str, int], kind: str) -> socket.socket:
    """Begins an upload and breaks it; returns its socket, which a "left" one still needs."""
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: {address[0]}\r\ncontent-length: {2 * BROKEN_BYTES}\r\n"
        "content-type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="file"; filename="broken.jsonl"\r\n\r\n'
    )
    connection = socket.create_connection(address)
    connection.sendall(head.encode() + b"x" * BROKEN_BYTES)
    if kind == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if kind != "left":
        connection.close()
    return connection


async def send_uploads(client: httpx.Client, broken: int) -> tuple[list[str], list[socket.socket]]:
    """Sends a whole upload after each broken one; returns ids and sockets."""
    address = (str(client.base_url.host), int(client.base_url.port or 80))
    ids, sockets = [], []
    for number in range(broken):
        kind = ("closed", "reset", "left")[number % 3]
        sockets.append(await asyncio.to_thread(cut_off, address, kind))
        ids.append(await asyncio.to_thread(upload, client, ROWS[: 10 + number]))
        await asyncio.sleep(1)
    return ids, sockets


async def send_all(
    client: httpx.Client, clients: int, requests: int, broken: int
) -> tuple[Counts, list[str]]:
    counts = Counts()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=600) as asking:

        async def one_client(number: int) -> None:
            for turn in range(requests):
                await ask(asking, number, turn, counts)

        uploads = asyncio.create_task(send_uploads(client, broken))
        await asyncio.gather(*(one_client(number) for number in range(clients)))
        ids, sockets = await uploads
    for connection in sockets:
        connection.close()
    return counts, ids


def wait_for_job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + JOB_SECONDS
    while True:
        job: dict[str, Any] = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        if job["status"] in ("succeeded", "failed", "cancelled") or time.monotonic() > deadline:
            return job
        time.sleep(0.5)


def file_faults(client: httpx.Client, folder: Path, sent: list[str]) -> list[str]:
    """Says which uploads are missing or differ, and what broken ones have left."""
    faults = []
    for number, file_id in enumerate(sent):
        content = client.get(f"/v1/files/{file_id}/content").content
        rows = "".join(json.dumps(row) + "\n" for row in ROWS[: 10 + number]).encode()
        faults += [f"{file_id} differs from what was sent"] if content != rows else []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # an upload that was left open ends after 30 seconds
        stored = {path.name for path in (folder / "jobs" / "files").iterdir()}
        if not (left := {name for name in stored if not name.startswith("file-")}):
            break
        time.sleep(1)
    return [*faults, *(f"a broken upload left {name}" for name in sorted(left))]


def run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was counted, and every fault."""
    with training_server(args.base, folder) as client:
        job_id = start_job(client, upload(client, ROWS), epochs=args.epochs)
        Trainer(JobStore(folder / "jobs"), job_id)  # it has trained a step
        start = time.perf_counter()
        counts, sent = asyncio.run(send_all(client, args.clients, args.requests, args.broken))
        asked_seconds = time.perf_counter() - start
        status_then = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"]
        job = wait_for_job(client, job_id)
        faults = [*counts.lost, *file_faults(client, folder, sent)]
        files = client.get("/v1/files").json()["data"]
        if job["status"] != "succeeded":
            faults.append(f"the job is {job['status']}: {job['error']}")
        else:
            body = {"model": job["fine_tuned_model"], "messages": ROWS[0]["messages"][:1]}
            answer = client.post("/v1/chat/completions", json={**body, "max_tokens": 4})
            faults += [] if answer.status_code == 200 else ["the job's model does not answer"]
    expected = args.clients * args.requests
    if (complete := counts.statuses["200"]) != expected:
        faults.append(f"{complete} of {expected} requests were answered")
    faults += [f"{n} with status {s}" for s, n in counts.statuses.items() if int(s) >= 500]
    log = (folder / "server.log").read_text()
    faults += [line for line in log.splitlines() if "a bug" in line or "Traceback" in line]
    return {
        "clients": args.clients,
        "requests": expected,
        "statuses": dict(counts.statuses),
        "lost": len(counts.lost),
        "uploads": {"whole": len(sent), "cut off": args.broken, "files listed": len(files)},
        "job": {"when the clients had ended": status_then, "at the end": job["status"]},
        "seconds": asked_seconds,
        "whole answer": percentiles(counts.whole_seconds),
        "first token": percentiles(counts.first_seconds),
    }, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=3, help="requests of each client")
    parser.add_argument("--broken", type=int, default=3, help="uploads that are cut off")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the server and its jobs end too
    with tempfile.TemporaryDirectory() as name:
        counted, faults = run(args, Path(name))
    print(json.dumps({**counted, "faults": faults}, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
