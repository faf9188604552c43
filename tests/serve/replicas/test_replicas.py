"""Several replicas behind one front, without a cluster: which one answers, what all of them are
told, what is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from starlette.types import Message

from tests.serve.server import BASE, add_adapter
from tests.support.tiny import save_tiny
from veneer.decoding.engine import bytes_per_token
from veneer.errors import LostProcessError, QueueFullError
from veneer.library.library import Library
from veneer.serve.http.guard import Guard
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed
from veneer.serve.http.paths import ADMIN_BODIES, PATHS
from veneer.serve.replicas.front import Frontend, changed
from veneer.serve.replicas.replica import (
    AdminChange,
    ForwardedRequest,
    Replica,
    ReplicaConfig,
    model_of,
)
from veneer.serve.start import ServeSettings

HELLO = [{"role": "user", "content": "hello"}]
USE, ADMIN = "use-" + "u" * 32, "admin-" + "a" * 32


class Two:
    """Real replicas in this process. asked: (which, model) of each request. loses: how many are yet
    to be lost, after so many messages."""

    def __init__(self, served: ReplicaConfig) -> None:
        self.asked: list[tuple[str, str]] = []
        self.loses, self.after, self.next = 0, 0, 0
        self.homes: dict[str, int] = {}
        self.replicas = [Replica(served, name, self._known) for name in ("one", "two")]

    async def _known(self, model: str) -> str:
        return model

    async def answer(
        self, request: ForwardedRequest, model: str, changes: Sequence[AdminChange]
    ) -> AsyncIterator[Message]:
        which = self.next % 2
        self.next += 1
        self.asked.append((self.replicas[which].name, model))
        sent = 0
        if self.loses and not self.after:
            self.loses -= 1
            raise LostProcessError("gone")
        async for message in self.replicas[which].answer(request, model, changes):
            yield message
            sent += 1
            if self.loses and sent >= self.after:
                self.loses -= 1
                raise LostProcessError("gone")

    async def adopt(self, changes: Sequence[AdminChange]) -> None:
        """Nobody hears it, as where a replica begins later: requests bring it."""

    async def metrics(self) -> dict[str, str]:
        return dict([await replica.metrics() for replica in self.replicas])

    async def shown(self) -> dict[str, list[dict[str, Any]]]:
        return dict([await replica.shown() for replica in self.replicas])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ReplicaConfig:
    from veneer import api

    folder = tmp_path_factory.mktemp("replicas")
    save_tiny(folder / "tiny", "llama_untied")
    base = api.load(str(folder / "tiny"))
    library = Library(folder / "adapters")
    add_adapter(library, folder / "made", "tickets", 1, base)
    settings = ServeSettings(name=BASE, cache_bytes=2048 * bytes_per_token(base))
    return ReplicaConfig(
        str(folder / "tiny"), str(folder / "adapters"), "auto", "cpu", None, settings
    )


def asking(served: ReplicaConfig, question: Any, *, keys: ApiKeys | None = None) -> Any:
    """What `question(client, two)` finds out; both replicas are new."""

    async def run() -> Any:
        two = Two(served)
        front = Frontend(two, body_bytes=2**20, seconds=600)
        app = Guard(front, keys=keys or ApiKeys([]), counted=front.count_http)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=60
        ) as client:
            return await question(client, two, front)

    return asyncio.run(run())


def chat(model: str = "tickets", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": 6, "temperature": 0, **fields}


async def ask(client: httpx.AsyncClient, model: str, **fields: Any) -> str:
    answer = await client.post("/v1/chat/completions", json=chat(model, **fields))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_every_replica_answers_alike_and_hears_which_model_is_meant(served: ReplicaConfig) -> None:
    async def question(client: Any, two: Two, front: Frontend) -> None:
        tickets = [await ask(client, "tickets") for _ in range(2)]
        bases = [await ask(client, BASE) for _ in range(2)]
        assert tickets[0] == tickets[1] != bases[0] == bases[1]
        assert two.asked == [("one", "tickets"), ("two", "tickets"), ("one", BASE), ("two", BASE)]
        async with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as stream:
            lines = [line async for line in stream.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 3
        unknown = await client.post("/v1/chat/completions", json=chat("nobody"))
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        faulty = await client.post(
            "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
        )
        assert faulty.status_code == 400
        large = await client.post("/v1/chat/completions", json=chat(user="x" * 2**21))
        assert large.status_code == 413

    asking(served, question)


def test_a_replica_that_is_lost_before_it_answers_is_not_noticed_and_one_lost_later_is_told(
    served: ReplicaConfig,
) -> None:
    async def question(client: Any, two: Two, front: Frontend) -> None:
        whole = await ask(client, "tickets")
        two.loses = 2
        assert await ask(client, "tickets") == whole
        two.loses = 3
        lost = await client.post("/v1/chat/completions", json=chat())
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "replica_lost")
        assert lost.headers["retry-after"]
        two.loses, two.after = 1, 1
        async with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as stream:
            lines = [line async for line in stream.aiter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"
        assert await ask(client, "tickets") == whole

    asking(served, question)


def test_what_an_administrator_changes_holds_on_all_replicas(served: ReplicaConfig) -> None:
    keys = ApiKeys([ApiKey("use", hashed(USE), "u"), ApiKey("admin", hashed(ADMIN), "a")])

    async def question(client: Any, two: Two, front: Frontend) -> None:
        use, admin = ({"authorization": f"Bearer {key}"} for key in (USE, ADMIN))
        body = {"lora_name": "other", "lora_path": "tickets@1"}
        assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 401
        assert (
            await client.post("/v1/load_lora_adapter", json=body, headers=use)
        ).status_code == 403
        assert (
            await client.post("/v1/load_lora_adapter", json=body, headers=admin)
        ).status_code == 200
        for _ in range(2):  # one of them was not there when it was said
            answer = await client.post("/v1/chat/completions", json=chat("other"), headers=use)
            assert answer.status_code == 200
        cards = (await client.get("/v1/adapters", headers=use)).json()["data"]
        assert {card["replica"] for card in cards} == {"one", "two"}
        gone = await client.post(
            "/v1/unload_lora_adapter", json={"lora_name": "other"}, headers=admin
        )
        assert gone.status_code == 200
        for _ in range(2):
            answer = await client.post("/v1/chat/completions", json=chat("other"), headers=use)
            assert answer.status_code == 404
        assert len(front._changes) == 1  # the later one of a name is all that counts

    asking(served, question, keys=keys)


def test_a_later_change_of_a_name_drops_the_earlier_one_of_its_kind() -> None:
    def request(path: str, **body: str) -> ForwardedRequest:
        return ForwardedRequest("POST", path, b"", (), json.dumps(body).encode(), None, "id")

    changes: list[AdminChange] = []
    requests = [
        request("/v1/load_lora_adapter", lora_name="a", lora_path="x"),
        request("/v1/load_lora_adapter", lora_name="b", lora_path="x"),
        request("/v1/adapters/pin", name="a"),
        request("/v1/adapters/pin", name="b"),
        request("/v1/unload_lora_adapter", lora_name="a"),
        request("/v1/adapters/unpin", name="b"),
    ]
    for admin_request in requests:
        changes = changed(changes, admin_request)
    assert [(change.number, change.request) for change in changes] == [
        (number, requests[number - 1]) for number in (2, 3, 5, 6)
    ]


def test_all_that_only_an_administrator_may_ask_is_told_to_all_replicas(
    served: ReplicaConfig,
) -> None:
    keys = ApiKeys([ApiKey("use", hashed(USE), "u")])

    async def question(client: Any, two: Two, front: Frontend) -> None:
        use = {"authorization": f"Bearer {USE}"}
        refused = [
            path
            for path in PATHS
            if (await client.post(path, json={}, headers=use)).status_code == 403
        ]
        assert sorted(refused) == sorted(ADMIN_BODIES)

    asking(served, question, keys=keys)


def test_metrics_are_those_of_every_replica_and_of_the_front(served: ReplicaConfig) -> None:
    async def question(client: Any, two: Two, front: Frontend) -> None:
        for _ in range(2):
            await ask(client, "tickets")
        lines = (await client.get("/metrics")).text.splitlines()
        for name in ("one", "two"):
            assert (
                f'vllm:generation_tokens_total{{model_name="{BASE}",replica="{name}"}} 6' in lines
            )
            assert f'veneer:adapters_ready{{replica="{name}"}} 1' in lines
        assert 'veneer:http_answers_total{path="/v1/chat/completions",status="200"} 2' in lines
        heads = [line for line in lines if line.startswith("#")]
        assert len(heads) == len(set(heads))

    asking(served, question)


def test_one_that_is_closing_refuses_a_full_queue_is_429_and_nobody_is_503(
    served: ReplicaConfig,
) -> None:
    async def question(client: Any, two: Two, front: Frontend) -> None:
        async def full(*_: Any) -> AsyncIterator[Message]:
            raise QueueFullError(9, 9)
            yield

        async def nobody(*_: Any) -> AsyncIterator[Message]:
            await asyncio.sleep(60)
            yield {}

        two.answer = full  # type: ignore[method-assign]
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 429
        two.answer = nobody  # type: ignore[method-assign]
        front._seconds = 0.1
        late = await client.post("/v1/chat/completions", json=chat())
        assert (late.status_code, late.json()["error"]["code"]) == (503, "no_replica")
        assert (await client.get("/readyz")).status_code == 200
        front.refuse_new()
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 503
        assert (await client.get("/healthz")).status_code == 200

    asking(served, question)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a"}', "a"),
        (b'{"model": "base", "adapters": [{"name": "a", "weight": 1}, {"name": "b"}]}', "a+b"),
        (b'{"model": 3}', ""),
        (b"[]", ""),
        (b"", ""),
        (b"\xff", ""),
        (b'{"model": "a", "adapters": 7}', "a"),
        (b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
        (b'{"model": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_affinity_goes_by_the_name_in_the_body_whatever_else_is_in_it(
    body: bytes, model: str
) -> None:
    assert model_of(body) == model
