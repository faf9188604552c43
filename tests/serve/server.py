"""A real server on loopback over a tiny random model, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.helpers import fill
from tests.tiny import tiny_model, tiny_tokenizer
from veneer.adapters.config import LoRA
from veneer.base import Base
from veneer.decoding.adapters import front_places
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.scheduler import Limits
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.serve.app import PATHS, application
from veneer.serve.guard import Guard
from veneer.serve.keys import Keys
from veneer.serve.names import Names
from veneer.serve.run import Server, listening
from veneer.serve.service import ServeLimits, Service

BASE = "tiny"


def made_base(family: str = "llama_untied", **overrides: Any) -> Base:
    return Base(
        model=tiny_model(family, **overrides),
        tokenizer=tiny_tokenizer(),
        source="tiny-llama",
        name_or_path="tiny-llama",
    )


def add_adapter(library: Library, folder: Path, name: str, seed: int, base: Base | None = None) -> None:
    """One that changes every answer, as the next version of a name."""
    base = base or made_base()
    made = base.attach(LoRA(rank=3, alpha=5.0, targets=["q_proj", "v_proj", "down_proj"]), name="a", seed=seed)
    fill(made.parameters().values(), seed=seed)
    write_adapter(folder, made, manifest_for(base, method="lora"), model=base.model)
    library.add(folder, name=name)


class AtOnce:
    """Adapters of a library that are loaded where they are looked up."""

    def __init__(self, base: Base, library: Library) -> None:
        self.base, self.library, self.lock = base, library, threading.Lock()

    def resolve(self, reference: str) -> Any:
        entry = self.library.get(reference)
        content = entry.version.facts.content_hash
        with self.lock:
            if content not in self.base.attachments:
                self.base.load_adapter(self.library.path(reference), name=content)
        return ((content, 1.0),)

    def expect(self, identity: Any) -> None: ...

    def ready(self, identity: Any) -> int:
        return front_places(self.base, self.applied(identity))

    def settle(self) -> tuple[str, ...]:
        return ()

    def hold(self, identity: Any) -> None: ...

    def release(self, identity: Any) -> None: ...

    def applied(self, identity: Any) -> Any:
        return self.base.routing.applied(identity)


@dataclass
class Running:
    """url: its root. server, service: what runs in the thread."""

    url: str
    service: Service
    server: Server
    base: Base
    library: Library

    def openai(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **settings)


@contextmanager
def running(
    library: Library,
    *,
    base: Base | None = None,
    keys: Keys | None = None,
    tokens: int = 4096,
    limits: Limits | None = None,
    serve: ServeLimits | None = None,
) -> Iterator[Running]:
    base = base or made_base()
    adapters = AtOnce(base, library)
    engine = Engine(base, budget_bytes=tokens * bytes_per_token(base), adapters=adapters, limits=limits)
    names = Names(BASE, base.fingerprint().digest, library, adapters.resolve, positions=1024)
    service = Service(base, engine, names, limits=serve, routes=PATHS)
    app = Guard(application(service), keys=keys or Keys([]), counted=service.metrics.answered)
    server = Server(app, drain_seconds=service.limits.drain_seconds, closing=service.loop.refuse_new)
    listener = listening("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        for _ in range(200):
            if server.started:
                break
            thread.join(0.05)
        yield Running(url, service, server, base, library)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
