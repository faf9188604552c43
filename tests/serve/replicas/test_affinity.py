"""Two servers behind examples/affinity.py: a model's requests go where its adapter is."""

import asyncio
import importlib.util
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from tests.serve.server import BASE, add_adapter, running
from veneer.library.library import Library
from veneer.serve.run import listening

EXAMPLE = Path(__file__).parents[3] / "examples" / "affinity.py"
NAMES = ["one", "two", "three", "four", "five", "six"]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def affinity():
    spec = importlib.util.spec_from_file_location("affinity", EXAMPLE)
    made = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["affinity"] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    library = Library(folder / "adapters")
    for seed, name in enumerate(NAMES):
        add_adapter(library, folder / name, name, seed)
    return library


@contextmanager
def routed(affinity, urls):
    server = uvicorn.Server(
        uvicorn.Config(affinity.application(urls, every=0.05), log_config=None, lifespan="on")
    )
    listener = listening("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def in_memory(server):
    return {
        resident.reference.partition("@")[0] for resident in server.service.residents.tiers.shown()
    }


def ask(url, model, **more):
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_each_adapter_lives_in_one_place_and_is_asked_there(affinity, library):
    with (
        running(library) as first,
        running(library) as second,
        routed(affinity, [first.url, second.url]) as url,
    ):
        places = {}
        for _ in range(3):
            for name in NAMES:
                for model in (name, f"{name}@1", f"{BASE}:{name}"):
                    found = ask(url, model)
                    assert found.status_code == 200, found.text
                    places.setdefault(name, set()).add(found.headers["x-replica"])
            time.sleep(0.1)
        assert all(len(place) == 1 for place in places.values()), places
        assert in_memory(first) | in_memory(second) == set(NAMES) and not in_memory(
            first
        ) & in_memory(second)
        assert ask(url, BASE).status_code == 200 and ask(url, "nobody").status_code == 404
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [card.id for card in client.models.list()] == [BASE, *sorted(NAMES)]
        stream = client.chat.completions.create(
            model="two", messages=HELLO, max_tokens=9, stream=True
        )
        whole = client.chat.completions.create(
            model="two", messages=HELLO, max_tokens=9, temperature=0
        )
        assert [c.choices[0].finish_reason for c in stream][-1] in ("length", "stop")
        assert whole.usage.completion_tokens > 0


def test_an_adapter_that_was_loaded_by_hand_is_found_where_nobody_asks_for_it(
    affinity, library, monkeypatch
):
    read, known = affinity.Replica.read, []

    def remembered(replica, metrics):
        read(replica, metrics)
        known.append((replica.url, replica.adapters))

    monkeypatch.setattr(affinity.Replica, "read", remembered)
    with (
        running(library) as first,
        running(library) as second,
        routed(affinity, [first.url, second.url]) as url,
    ):
        for name in NAMES:
            second.post(
                "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name}
            ).raise_for_status()
        assert (
            f'veneer:adapter_in_memory_bytes{{adapter="{NAMES[0]}"}}'
            in second.http().get("/metrics").text
        )
        while (second.url, set(NAMES)) not in known:
            time.sleep(0.01)
        assert {ask(url, name).headers["x-replica"] for name in NAMES} == {second.url}


def test_where_one_server_goes_the_other_answers(affinity, library):
    with (
        running(library) as first,
        running(library) as second,
        routed(affinity, [first.url, second.url]) as url,
    ):
        for name in NAMES:
            assert ask(url, name).status_code == 200
        second.server.should_exit = True
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                second.http().get("/healthz")
            except httpx.TransportError:
                break
        found = [ask(url, name) for name in NAMES]
        assert [result.status_code for result in found] == [200] * len(NAMES)
        assert {result.headers["x-replica"] for result in found} == {first.url}


def replica(affinity, url, metrics):
    made = affinity.Replica(url)
    made.read(metrics)
    return made


def test_a_full_server_is_passed_over_and_the_base_goes_where_least_is_done(affinity):
    metrics = (
        'vllm:num_requests_running{{model_name="tiny"}} {0}\n'
        'vllm:num_requests_waiting{{model_name="tiny"}} {1}\n'
        'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{2}",'
        'waiting_lora_adapters=""}} 1\n'
    )
    busy = replica(affinity, "http://a", metrics.format(8, 3, "tickets"))
    idle = replica(affinity, "http://b", metrics.format(1, 0, ""))
    full = replica(affinity, "http://c", metrics.format(8, 30, "poems"))
    some = [full, busy, idle]
    assert affinity.ordered(some, "tickets@2")[0] is busy
    assert affinity.ordered(some, "tiny")[0] is idle
    assert affinity.ordered(some, "poems")[0] is not full
    busy.there = False
    assert affinity.ordered(some, "tickets")[0] is idle
    assert affinity.ordered(some, "x") == affinity.ordered(some[::-1], "x")
