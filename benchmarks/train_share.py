"""Measures the time to first token of a server while it trains, and while its trainer rests.

    python benchmarks/train_share.py
        smollm2-135m; --train-share 0.25, 0.5 and 1; under four minutes
    python benchmarks/train_share.py --shares 0.5 --turns 40

Prints `measurements`, as docs/results/*.json hold them. For each share, `veneer serve --train` runs
in a process of its own and a job trains. A client sends streamed requests one after another, in
turns: one while the trainer is stopped (SIGSTOP, so that memory is the same), one beside the
running trainer, which the server suspends until the first token. Prompts have 64 random tokens, so
that no cache has them; 8 new tokens. `ratio`: the medians and the 95th percentiles beside the
trainer, divided by those alone. `trained steps/s`: while the client sends one request after
another, and while it sends none.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from veneer.jobs.record import OPEN
from veneer.jobs.store import JobStore

PROMPT, NEW = 64, 8
REST_SECONDS = 0.3
"""Time between a change of the trainer's state and a request."""
RATE_SECONDS = 10.0
START_SECONDS = 300.0
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Name the queue for ticket {number}: {text}"},
            {"role": "assistant", "content": queue},
        ]
    }
    for number in range(16)
    for text, queue in (
        ("The hinge broke, and the door does not close any more.", "hardware"),
        ("I was charged twice for the order of last week.", "billing"),
        ("The parcel has been at the depot for nine days.", "shipping"),
        ("I cannot log in since the password was reset.", "accounts"),
    )
]


@contextmanager
def training_server(base: str, folder: Path, *flags: str) -> Iterator[httpx.Client]:
    """Runs `veneer serve --train` in a process of its own; yields a client of it. Its log is
    folder/server.log. Jobs that have not ended are cancelled at the end of the block."""
    command = [sys.executable, "-m", "veneer", "serve", "--base", base, "--name", "base", "--train"]
    places = ["--library", str(folder / "library"), "--jobs", str(folder / "jobs"), "--port", "0"]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *places, *flags], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"veneer serve did not start: {log.read_text()}")
            time.sleep(0.2)
        with httpx.Client(base_url=found[0], timeout=600) as client:
            yield client
    finally:
        process.terminate()
        process.wait()
        cancel_jobs(JobStore(folder / "jobs"))


def cancel_jobs(store: JobStore) -> None:
    """Cancels all jobs, which go on without a server, and waits until they have ended."""
    for job in store.jobs():
        if job.state in OPEN:
            store.cancel(job.id)
    deadline = time.monotonic() + START_SECONDS
    while any(job.state in OPEN for job in store.jobs()) and time.monotonic() < deadline:
        time.sleep(0.2)


def upload(client: httpx.Client, rows: list[dict[str, Any]]) -> str:
    """Uploads rows; returns the file's id."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    answer = client.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", content)}
    )
    return str(answer.raise_for_status().json()["id"])


def start_job(client: httpx.Client, file_id: str, epochs: int) -> str:
    """Starts a job and returns its id."""
    body = {
        "model": "base",
        "training_file": file_id,
        "hyperparameters": {"n_epochs": epochs, "batch_size": 8},
    }
    return str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])


def first_token_seconds(client: httpx.Client, draw: random.Random) -> float:
    """Sends a streamed request; returns the seconds until its first token."""
    body = {
        "model": "base",
        "prompt": [draw.randrange(100, 40_000) for _ in range(PROMPT)],
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    start, first = time.perf_counter(), 0.0
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and not first:
                first = time.perf_counter() - start
    if answer.status_code != 200 or not first:
        raise RuntimeError(f"status {answer.status_code}")
    return first


class Trainer:
    """The process that trains a job, stopped and continued by signals."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._store, self._job_id = store, job_id
        deadline = time.monotonic() + START_SECONDS
        while self._facts().get("step", 0) < 1:
            if store.get(job_id).state != "running" or time.monotonic() > deadline:
                raise RuntimeError(f"the job does not train: {store.get(job_id).error}")
            time.sleep(0.2)
        pattern = f"veneer.jobs.trainer .*{job_id}"
        found = subprocess.run(["pgrep", "-n", "-f", pattern], capture_output=True, text=True)
        self._pid = int(found.stdout)

    def _facts(self) -> dict[str, Any]:
        return self._store.get(self._job_id).facts()

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def rate(self, work: Callable[[], object]) -> float:
        """Returns the steps a second while this process repeats some work."""
        step, start = self._facts()["step"], time.perf_counter()
        while time.perf_counter() - start < RATE_SECONDS:
            work()
        return float((self._facts()["step"] - step) / (time.perf_counter() - start))


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median ms": 1e3 * statistics.median(ordered),
        "95% ms": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }


def measure(base: str, share: float, turns: int) -> dict[str, Any]:
    """Measures a server with this share of the processor for training."""
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {"alone": [], "beside": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with training_server(base, folder, "--train-share", str(share)) as client:
            job_id = start_job(client, upload(client, ROWS), epochs=100)
            trainer = Trainer(JobStore(folder / "jobs"), job_id)
            try:
                for turn in range(turns + 1):
                    trainer.stop()
                    time.sleep(REST_SECONDS)
                    alone = first_token_seconds(client, draw)
                    trainer.go_on()
                    time.sleep(REST_SECONDS)
                    beside = first_token_seconds(client, draw)
                    if turn:  # the first one warms up
                        seconds["alone"].append(alone)
                        seconds["beside"].append(beside)
                rates = {
                    "beside requests": trainer.rate(lambda: first_token_seconds(client, draw)),
                    "without": trainer.rate(lambda: time.sleep(REST_SECONDS)),
                }
            finally:
                trainer.go_on()
    alone, beside = percentiles(seconds["alone"]), percentiles(seconds["beside"])
    return {
        "alone": alone,
        "beside a trainer": beside,
        "ratio": {name: beside[name] / alone[name] for name in alone},
        "trained steps/s": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--shares", default="0.25,0.5,1")
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the server and its jobs end too
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    shares = [float(share) for share in args.shares.split(",")]
    measurements = [
        {
            "what": (
                f"time to first token while training: {args.base}, a share of {share:g}, {PROMPT}"
                " tokens read"
            ),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "commit": commit.stdout.strip(),
            "command": f"python benchmarks/train_share.py --shares {share:g} --turns {args.turns}",
            "values": measure(args.base, share, args.turns),
        }
        for share in shares
    ]
    print(json.dumps({"measurements": measurements}, indent=1))


if __name__ == "__main__":
    main()
