"""A real server on loopback over a tiny random model, in a thread of this process."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.helpers import fill
from tests.support.tiny import tiny_model, tiny_tokenizer
from veneer.adapters.config import LoRA
from veneer.base import Base
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.lookup import LookupMode
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.library.prompts import NAME, write_prompts
from veneer.serve.engine.fine_tuning import TrainSettings
from veneer.serve.engine.service import Service
from veneer.serve.http.connection import Server
from veneer.serve.http.keys import ApiKeys
from veneer.serve.start import ServeSettings, open_server

BASE = "tiny"


def read_status(client: socket.socket) -> int:
    """Reads one whole response, in however many parts it arrives, and returns its status code."""
    response = HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


def made_base(family: str = "llama_untied", **overrides: Any) -> Base:
    return Base(
        model=tiny_model(family, **overrides),
        tokenizer=tiny_tokenizer(),
        source="tiny-llama",
        name_or_path="tiny-llama",
    )


def add_adapter(
    library: Library,
    folder: Path,
    name: str,
    seed: int,
    base: Base | None = None,
    *,
    prompts: Sequence[str] = (),
    note: str = "",
) -> None:
    """One that changes every answer, as the next version of a name. prompts: as a run writes
    them."""
    base = base or made_base()
    made = base.attach(
        LoRA(rank=3, alpha=5.0, targets=["q_proj", "v_proj", "down_proj"]), name="a", seed=seed
    )
    fill(made.parameters().values(), seed=seed)
    adapter = folder / "adapter" if prompts else folder
    write_adapter(adapter, made, manifest_for(base, method="lora"), model=base.model)
    if prompts:
        write_prompts(folder / NAME, prompts)
    library.add(adapter, name=name, note=note)


@contextmanager
def server_process(base: Path, library: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Runs `veneer serve` on a free port, and kills it at the end of the block."""
    settings = {"base": base, "library": library, "port": 0, "cache-mib": 8, "drain": 20}
    command = [sys.executable, "-P", "-m", "veneer.cli.main", "serve"]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Running:
    """url: its root. server, service: what runs in the thread."""

    url: str
    service: Service
    server: Server
    base: Base
    library: Library

    def ask_engine(self, function: Any) -> Any:
        """What a function finds between two steps."""
        return asyncio.run_coroutine_threadsafe(
            self.service.loop.run_between_steps(function), self.service.loop.events
        ).result(30)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Each step takes 10 ms more meanwhile, as a larger base's do: 900 tokens are on their way
        for 9 s."""

        def slow(engine: Engine) -> None:
            step = engine.step

            def slower(now: float) -> list[Answer]:
                time.sleep(0.01)
                return step(now)

            engine.step = slower  # type: ignore[method-assign]

        self.ask_engine(slow)
        try:
            yield
        finally:
            self.ask_engine(lambda engine: engine.__dict__.pop("step"))

    def openai(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **settings}
        )

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **settings)


@contextmanager
def running(
    library: Library,
    *,
    base: Base | None = None,
    name: str = BASE,
    keys: ApiKeys | None = None,
    tokens: int = 4096,
    limits: Limits | None = None,
    seconds: float | None = None,
    runs: Path | None = None,
    studio: bool = False,
    drain_seconds: float = 30.0,
    lookup: LookupMode = "auto",
    train: TrainSettings | None = None,
    bases: list[Path] | None = None,
    auto: bool = False,
) -> Iterator[Running]:
    base = base or made_base()
    settings = ServeSettings(
        port=0,
        name=name,
        limits=limits or Limits(),
        cache_bytes=tokens * bytes_per_token(base),
        runs=runs,
        studio=studio,
        drain_seconds=drain_seconds,
        lookup=lookup,
        train=train,
        bases=bases or [],
        auto=auto,
        **({} if seconds is None else {"seconds": seconds}),
    )
    opened = open_server(base, library, settings, keys or ApiKeys([]))
    server, service, listener = opened.server, opened.service, opened.socket
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        for _ in range(200):
            if server.started:
                break
            thread.join(0.05)
        yield Running(opened.url, service, server, base, library)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
